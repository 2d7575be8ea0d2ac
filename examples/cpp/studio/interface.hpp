/* The window's content: what is shown for a state of the engine, and which orders the user's hands give it. */
#ifndef STUDIO_INTERFACE_HPP
#define STUDIO_INTERFACE_HPP

#include "browser.hpp"
#include "engine.hpp"
#include "textures.hpp"
#include "trace.hpp"

#include <map>
#include <string>

namespace studio {

class Interface {
 public:
  /** `pictures` is the folder that pictures are saved in, `model` what the field of the model folder says at first. */
  Interface(Engine &engine, Trace &trace, std::string pictures, std::string model);

  /** Builds one frame of Dear ImGui. */
  void show(const State &state);
  /** A file or folder that was dropped on the window: a concept file, a folder of them, or a model. */
  void drop(const std::string &path);

 private:
  /** How a concept is set, by its file. */
  struct Setting {
    float strength = 0;
    int scope = MACULA_SCOPE_DEFAULT;
  };

  void controls(const State &state, ImVec2 size);
  void model(const State &state);
  void settings(const State &state);
  void concepts(const State &state);
  void concept_row(const Concept &one);
  void prompt(const State &state, ImVec2 size);
  void canvas(const State &state, ImVec2 size);
  void footer(const State &state, ImVec2 size);
  void sheet(const State &state, ImVec2 size);
  void finder(const State &state);
  void progress_bar(const State &state);
  void draw(const State &state);
  void save(const PicturePointer &picture);
  void use(const Recipe &recipe);
  Recipe recipe(const State &state) const;

  Engine &engine_;
  Trace &trace_;
  Textures textures_;
  Browser browser_;
  std::string pictures_, model_, prompt_ = "a <s1> apple on a blue background";
  int steps_ = 20;
  float guidance_ = 4;
  std::uint64_t seed_ = 1;
  bool new_seed_ = false, decomposed_ = false, finds_ = false;
  std::map<std::string, Setting> settings_;
  Search search_;
  /** The picture that is looked at, and the newest one that there was. */
  PicturePointer selected_, newest_;
  Activity activity_ = Activity::idle;
};

}  // namespace studio

#endif
