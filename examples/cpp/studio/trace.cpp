/* Facts for a program that drives this one, a line each; see trace.hpp. */
#include "trace.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace studio {

static const char *name_of(Activity activity) {
  switch (activity) {
    case Activity::opening: return "opening";
    case Activity::drawing: return "drawing";
    case Activity::searching: return "searching";
    case Activity::idle: break;
  }
  return "idle";
}

void Trace::place(const std::string &name) {
  if (!on_) return;
  ImVec2 from = ImGui::GetItemRectMin(), to = ImGui::GetItemRectMax();
  // What is scrolled out of its panel can't be reached.
  if (ImGui::GetWindowDrawList()->GetClipRectMin().y <= from.y && to.y <= ImGui::GetWindowDrawList()->GetClipRectMax().y) {
    place(name, from, to);
  }
}

void Trace::place(const std::string &name, const std::string &value) {
  if (!on_) return;
  place(name);
  say("value " + name, value);
}

void Trace::place(const std::string &name, ImVec2 from, ImVec2 to) {
  if (!on_) return;
  char corners[64];
  std::snprintf(corners, sizeof corners, "%ld %ld %ld %ld", std::lround(from.x), std::lround(from.y), std::lround(to.x),
                std::lround(to.y));
  say("place " + name, corners);
  shown_[name] = true;
}

void Trace::say(const std::string &subject, const std::string &fact) {
  std::string line = fact;
  std::replace(line.begin(), line.end(), '\n', ' ');
  auto [said, is_first] = said_.try_emplace(subject);
  if (!is_first && said->second == line) return;
  std::printf("%s %s\n", subject.c_str(), line.c_str());
  said->second = std::move(line);
}

void Trace::frame(const State &state, double milliseconds) {
  if (!on_) return;
  for (auto &[name, shown] : shown_) {
    if (!shown && said_.erase("place " + name)) std::printf("gone %s\n", name.c_str());
    shown = false;
  }
  ++frames_;
  longest_ = std::max(longest_, milliseconds);
  sum_ += milliseconds;
  if (state.activity != activity_) {
    std::printf("frames %s %ld %.2f %.2f\n", name_of(activity_), frames_, longest_, sum_ / static_cast<double>(frames_));
    activity_ = state.activity;
    frames_ = 0;
    longest_ = sum_ = 0;
  }
  say("progress", std::to_string(state.done) + " " + std::to_string(state.total));
  say("pictures", std::to_string(state.pictures.size()));
  say("message", (state.failed ? "failed " : "ok ") + state.message);
  say("activity", name_of(state.activity));
  std::fflush(stdout);
}

}  // namespace studio
