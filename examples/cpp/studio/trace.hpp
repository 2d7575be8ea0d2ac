/*
 * What a program that drives this one from outside must know: where things are in the window, what is under way, and how
 * long frames take. With `--trace` each fact is a line on standard output, written when it changes:
 *
 *     place NAME X0 Y0 X1 Y1        the rectangle of a widget or picture, in pixels of the window
 *     gone NAME                     it is no longer shown
 *     value NAME TEXT               what is entered there
 *     activity NAME                 idle, opening, drawing, searching
 *     progress DONE TOTAL           steps of what is under way
 *     pictures COUNT                finished ones
 *     message ok|failed TEXT
 *     frames ACTIVITY COUNT MAX MEAN    at the end of an activity: milliseconds from one frame's start to the next one's
 *
 * Without it nothing is written.
 */
#ifndef STUDIO_TRACE_HPP
#define STUDIO_TRACE_HPP

#include "engine.hpp"

#include <imgui.h>

#include <map>
#include <string>

namespace studio {

class Trace {
 public:
  explicit Trace(bool on) : on_(on) {}
  bool on() const { return on_; }

  /** The last item that Dear ImGui placed, if it is in sight. */
  void place(const std::string &name);
  void place(const std::string &name, const std::string &value);
  void place(const std::string &name, ImVec2 from, ImVec2 to);
  /** Ends a frame that began `milliseconds` after the one before. */
  void frame(const State &state, double milliseconds);

 private:
  void say(const std::string &subject, const std::string &fact);

  bool on_;
  /** Whether each place was met in this frame. */
  std::map<std::string, bool> shown_;
  /** What was last said of each subject. */
  std::map<std::string, std::string> said_;
  Activity activity_ = Activity::idle;
  long frames_ = 0;
  double longest_ = 0, sum_ = 0;
};

}  // namespace studio

#endif
