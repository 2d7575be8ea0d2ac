/* What is where in the window, from left to right; see interface.hpp. */
#include "interface.hpp"

#include "theme.hpp"

#include <imgui.h>
#include <imgui_stdlib.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <random>

namespace studio {

namespace fs = std::filesystem;

constexpr float controls_width = 384, sheet_width = 252, gap = 12, bar_height = 72, footer_height = 112;
constexpr ImGuiWindowFlags panel = ImGuiWindowFlags_AlwaysUseWindowPadding;

/** A grey caption above a group of widgets. */
static void caption(const char *text) {
  ImGui::Dummy({0, 2});
  ImGui::TextColored(theme::muted, "%s", text);
}

/** Makes the next item as wide as the rest of the line but for `left` pixels. */
static void fill(float left = 0) { ImGui::SetNextItemWidth(ImGui::GetContentRegionAvail().x - left); }

/** A slider with its name before it. */
template <class Slider>
static void named(const char *name, Slider slider) {
  ImGui::AlignTextToFramePadding();
  ImGui::TextUnformatted(name);
  ImGui::SameLine(96);
  fill();
  slider();
}

static std::string file_stem(const Picture &picture) {
  std::string stem;
  for (unsigned char letter : picture.recipe.prompt) {
    if (std::isalnum(letter)) {
      stem += static_cast<char>(std::tolower(letter));
    } else if (!stem.empty() && stem.back() != '-') {
      stem += '-';
    }
    if (stem.size() > 48) break;
  }
  while (!stem.empty() && stem.back() == '-') stem.pop_back();
  return (stem.empty() ? "picture" : stem) + "-" + std::to_string(picture.recipe.seed);
}

/** All that a picture depends on besides its prompt, on one line. */
static std::string summary(const Recipe &made) {
  char text[128];
  std::snprintf(text, sizeof text, "seed %llu · %d steps · guidance %.1f", static_cast<unsigned long long>(made.seed),
                made.steps, static_cast<double>(made.guidance));
  std::string all = text;
  if (made.decomposed) all += " · decomposed";
  for (const Use &use : made.uses) {
    std::snprintf(text, sizeof text, " %.2f", static_cast<double>(use.strength));
    all += " · " + fs::path(use.file).stem().string() + text;
  }
  return all;
}

Interface::Interface(Engine &engine, Trace &trace, std::string pictures, std::string model)
    : engine_(engine), trace_(trace), pictures_(std::move(pictures)), model_(std::move(model)) {}

void Interface::drop(const std::string &path) {
  std::error_code error;
  if (fs::exists(fs::path(path) / "model_index.json", error)) {
    model_ = path;
    engine_.open(path);
  } else {
    engine_.add_concepts(path);
  }
}

void Interface::show(const State &state) {
  // A draw that begins takes the eye off an older picture, a finished one draws it.
  if (state.activity == Activity::drawing && activity_ != Activity::drawing) selected_.reset();
  activity_ = state.activity;
  if (!state.pictures.empty() && state.pictures.back() != newest_) selected_ = newest_ = state.pictures.back();

  const ImGuiViewport &viewport = *ImGui::GetMainViewport();
  ImGui::SetNextWindowPos(viewport.WorkPos);
  ImGui::SetNextWindowSize(viewport.WorkSize);
  ImGui::PushStyleVar(ImGuiStyleVar_WindowPadding, {gap, gap});
  ImGui::PushStyleVar(ImGuiStyleVar_WindowRounding, 0);
  ImGui::Begin("studio", nullptr, ImGuiWindowFlags_NoDecoration | ImGuiWindowFlags_NoBringToFrontOnFocus |
                                      ImGuiWindowFlags_NoSavedSettings | ImGuiWindowFlags_NoMove);
  ImGui::PopStyleVar(2);
  ImVec2 space = ImGui::GetContentRegionAvail();
  float middle = space.x - controls_width - sheet_width - 2 * gap;
  controls(state, {controls_width, space.y});
  ImGui::SameLine(0, gap);
  ImGui::BeginGroup();
  ImGui::PushStyleVar(ImGuiStyleVar_ItemSpacing, {gap, gap});
  prompt(state, {middle, bar_height});
  canvas(state, {middle, space.y - bar_height - footer_height - 2 * gap});
  footer(state, {middle, footer_height});
  ImGui::PopStyleVar();
  ImGui::EndGroup();
  ImGui::SameLine(0, gap);
  sheet(state, {sheet_width, space.y});
  browser_.show();
  finder(state);
  ImGui::End();
  textures_.sweep();
}

/* ----------------------------------------------------------------------------------------------------------------
 * The left side
 * ---------------------------------------------------------------------------------------------------------------- */

void Interface::controls(const State &state, ImVec2 size) {
  ImGui::BeginChild("controls", size, false, panel);
  ImGui::PushFont(theme::large);
  ImGui::TextUnformatted("Macula Studio");
  ImGui::PopFont();
  model(state);
  settings(state);
  concepts(state);
  ImGui::EndChild();
}

void Interface::model(const State &state) {
  caption("MODEL FOLDER");
  fill(2 * 74);
  bool entered = ImGui::InputTextWithHint("##model", "a folder with model_index.json", &model_,
                                          ImGuiInputTextFlags_EnterReturnsTrue);
  trace_.place("model", model_);
  ImGui::SameLine(0, 6);
  if (ImGui::Button("…", {40, 0})) {
    browser_.open("Choose a model folder", model_, "", [this](const std::string &folder) {
      model_ = folder;
      engine_.open(folder);
    });
  }
  trace_.place("browse");
  ImGui::SameLine(0, 6);
  ImGui::BeginDisabled(state.activity != Activity::idle || model_.empty());
  if (ImGui::Button("Open", {ImGui::GetContentRegionAvail().x, 0}) || (entered && state.activity == Activity::idle)) {
    engine_.open(model_);
  }
  ImGui::EndDisabled();
  trace_.place("open");
}

void Interface::settings(const State &state) {
  caption("SETTINGS");
  named("Steps", [&] { ImGui::SliderInt("##steps", &steps_, 1, 60, "%d", ImGuiSliderFlags_AlwaysClamp); });
  trace_.place("steps", std::to_string(steps_));
  named("Guidance", [&] { ImGui::SliderFloat("##guidance", &guidance_, 1, 12, "%.1f", ImGuiSliderFlags_AlwaysClamp); });
  trace_.place("guidance");
  named("Seed", [&] {
    fill(100);
    ImGui::InputScalar("##seed", ImGuiDataType_U64, &seed_);
    trace_.place("seed");
    ImGui::SameLine(0, 8);
    ImGui::Checkbox("change", &new_seed_);
  });
  if (ImGui::IsItemHovered()) ImGui::SetTooltip("A new seed for every picture");
  trace_.place("change");
  if (state.decomposes) {
    ImGui::Checkbox("Decomposed process", &decomposed_);
    if (ImGui::IsItemHovered()) ImGui::SetTooltip("Early steps run on fewer pixels: about half the time");
    trace_.place("decomposed");
  }
}

void Interface::concepts(const State &state) {
  caption("CONCEPTS");
  ImGui::BeginChild("concepts", {0, -44});
  if (state.concepts.empty()) {
    ImGui::PushTextWrapPos(0);
    ImGui::TextColored(theme::muted, "None yet. Add concept files, or find a new concept in a few pictures of a subject.");
    ImGui::PopTextWrapPos();
  }
  // Those that draw come first, then those that forget.
  for (bool erases : {false, true}) {
    for (const Concept &one : state.concepts) {
      if (one.erases == erases) concept_row(one);
    }
  }
  ImGui::EndChild();
  float half = (ImGui::GetContentRegionAvail().x - 8) / 2;
  if (ImGui::Button("Add…", {half, 0})) {
    std::string folder = state.concepts.empty() ? model_ : fs::path(state.concepts.front().file).parent_path().string();
    browser_.open("Add a concept file, or all of a folder", folder, ".safetensors",
                  [this](const std::string &path) { engine_.add_concepts(path); });
  }
  trace_.place("add");
  ImGui::SameLine(0, 8);
  ImGui::BeginDisabled(state.model.empty() || state.activity != Activity::idle);
  if (ImGui::Button("Find…", {half, 0})) finds_ = true;
  ImGui::EndDisabled();
  trace_.place("find");
}

void Interface::concept_row(const Concept &one) {
  Setting &setting = settings_[one.file];
  ImGui::PushID(one.file.c_str());
  bool works = setting.strength > 0 && one.problem.empty();
  ImGui::TextColored(works ? ImGui::ColorConvertU32ToFloat4(theme::accent) : ImGui::GetStyleColorVec4(ImGuiCol_Text), "%s",
                     one.title.c_str());
  ImGui::SameLine(0, 8);
  if (!one.problem.empty()) {
    ImGui::TextColored(theme::warning, "can't be used");
    if (ImGui::IsItemHovered()) ImGui::SetTooltip("%s", one.problem.c_str());
    ImGui::PopID();
    return;
  }
  ImGui::TextColored(theme::muted, one.erases ? "forgets “%s”" : "“%s”", one.words.c_str());
  if (ImGui::IsItemHovered()) {
    ImGui::SetTooltip("%llu neurons\n%s", static_cast<unsigned long long>(one.neurons), one.file.c_str());
  }
  bool is_said = one.words.empty() || prompt_.find(one.words) != std::string::npos;
  if (!is_said && !one.erases) {
    ImGui::SameLine(0, 8);
    // A concept that acts on its own words can't do without them.
    if (works) ImGui::PushStyleColor(ImGuiCol_Text, theme::warning);
    bool says = ImGui::SmallButton("say it");
    if (works) ImGui::PopStyleColor();
    if (says) prompt_ += (prompt_.empty() ? "a " : " and a ") + one.words;
    if (ImGui::IsItemHovered()) ImGui::SetTooltip("Writes its words into the prompt");
  }
  ImGui::PushStyleVar(ImGuiStyleVar_FramePadding, {8, 4});
  fill(112);
  ImGui::SliderFloat("##strength", &setting.strength, 0, 1, setting.strength > 0 ? "%.2f" : "off",
                     ImGuiSliderFlags_AlwaysClamp);
  trace_.place("strength/" + one.title, std::to_string(setting.strength));
  ImGui::SameLine(0, 8);
  fill();
  static const char *const scopes[] = {"as filed", "global", "local"};
  ImGui::Combo("##scope", &setting.scope, scopes, 3);
  ImGui::PopStyleVar();
  if (ImGui::IsItemHovered()) {
    ImGui::SetTooltip("Where it acts: on the whole prompt (global), or on its own words (local).\nIts file says %s.",
                      one.local ? "local" : "global");
  }
  trace_.place("scope/" + one.title);
  ImGui::Dummy({0, 1});
  ImGui::PopID();
}

/* ----------------------------------------------------------------------------------------------------------------
 * The middle
 * ---------------------------------------------------------------------------------------------------------------- */

void Interface::prompt(const State &state, ImVec2 size) {
  ImGui::BeginChild("bar", size, false, panel | ImGuiWindowFlags_NoScrollbar);
  ImVec2 button{132, size.y - 2 * ImGui::GetStyle().WindowPadding.y};
  ImGui::PushStyleVar(ImGuiStyleVar_FramePadding, {12, (button.y - ImGui::GetFontSize()) / 2});
  fill(button.x + 10);
  bool entered =
      ImGui::InputTextWithHint("##prompt", "What to draw", &prompt_, ImGuiInputTextFlags_EnterReturnsTrue);
  ImGui::PopStyleVar();
  trace_.place("prompt", prompt_);
  ImGui::SameLine(0, 10);
  ImGui::PushFont(theme::large);
  if (state.activity == Activity::idle) {
    bool ready = !state.model.empty() && !prompt_.empty();
    ImGui::BeginDisabled(!ready);
    ImGui::PushStyleColor(ImGuiCol_Button, theme::deep);
    ImGui::PushStyleColor(ImGuiCol_ButtonHovered, theme::accent);
    if (ImGui::Button("Draw", button) || (entered && ready)) draw(state);
    ImGui::PopStyleColor(2);
    ImGui::EndDisabled();
    trace_.place("draw");
  } else {
    ImGui::PushStyleColor(ImGuiCol_Button, theme::stop);
    ImGui::PushStyleColor(ImGuiCol_ButtonHovered, theme::stop_hovered);
    ImGui::BeginDisabled(state.activity == Activity::opening);
    if (ImGui::Button("Cancel", button) || ImGui::IsKeyPressed(ImGui::GetKeyIndex(ImGuiKey_Escape), false)) {
      engine_.cancel();
    }
    ImGui::EndDisabled();
    ImGui::PopStyleColor(2);
    trace_.place("cancel");
  }
  ImGui::PopFont();
  ImGui::EndChild();
}

void Interface::canvas(const State &state, ImVec2 size) {
  ImGui::PushStyleColor(ImGuiCol_ChildBg, theme::stage);
  ImGui::BeginChild("canvas", size, false, panel | ImGuiWindowFlags_NoScrollbar);
  ImGui::PopStyleColor();
  ImVec2 from = ImGui::GetCursorScreenPos(), space = ImGui::GetContentRegionAvail();
  PicturePointer shown = selected_ ? selected_ : state.preview;
  if (shown) {
    auto width = static_cast<float>(shown->width), height = static_cast<float>(shown->height);
    float scale = std::min(space.x / width, space.y / height);
    if (scale >= 1) scale = std::floor(scale);
    ImVec2 corner{std::floor(from.x + (space.x - width * scale) / 2), std::floor(from.y + (space.y - height * scale) / 2)};
    ImVec2 end{corner.x + std::floor(width * scale), corner.y + std::floor(height * scale)};
    ImGui::GetWindowDrawList()->AddImage(textures_.of(shown), corner, end);
    trace_.place(selected_ ? "picture" : "preview", corner, end);
  } else {
    const char *hint = state.model.empty()                     ? "Open a model folder to begin"
                       : state.activity == Activity::drawing   ? "The first step is under way"
                       : state.activity == Activity::searching ? "A concept is being found"
                                                               : "Write a prompt and draw";
    ImVec2 text = ImGui::CalcTextSize(hint);
    ImGui::SetCursorScreenPos({from.x + (space.x - text.x) / 2, from.y + (space.y - text.y) / 2});
    ImGui::TextColored(theme::muted, "%s", hint);
  }
  ImGui::EndChild();
}

void Interface::footer(const State &state, ImVec2 size) {
  ImGui::BeginChild("footer", size, false, panel | ImGuiWindowFlags_NoScrollbar);
  ImGui::PushStyleVar(ImGuiStyleVar_ItemSpacing, {10, 6});
  constexpr float buttons = 268;
  float last_line = size.y - ImGui::GetStyle().WindowPadding.y - ImGui::GetFrameHeight();
  if (state.activity != Activity::idle) {
    progress_bar(state);
  } else if (selected_) {
    ImGui::TextUnformatted(selected_->recipe.prompt.c_str());
    ImGui::TextColored(theme::muted, "%s", summary(selected_->recipe).c_str());
    ImGui::SetCursorPos({size.x - buttons - ImGui::GetStyle().WindowPadding.x, last_line});
    if (ImGui::Button("Use its settings", {150, 0})) use(selected_->recipe);
    if (ImGui::IsItemHovered()) ImGui::SetTooltip("Prompt, seed, steps, guidance and concepts");
    trace_.place("use");
    ImGui::SameLine(0, 8);
    if (ImGui::Button("Save PNG", {110, 0})) save(selected_);
    trace_.place("save");
  } else if (!state.model.empty()) {
    ImGui::TextColored(theme::muted, "%s, pictures of %u × %u", state.runtime.c_str(), state.width, state.height);
  }
  if (!state.message.empty()) {
    ImVec2 corner{ImGui::GetStyle().WindowPadding.x, last_line};
    ImGui::SetCursorPos(corner);
    ImVec2 from = ImGui::GetCursorScreenPos();
    float width = size.x - 2 * corner.x - (selected_ && state.activity == Activity::idle ? buttons + 12 : 0);
    ImGui::PushClipRect(from, {from.x + width, from.y + ImGui::GetFrameHeight()}, true);
    ImGui::AlignTextToFramePadding();
    ImGui::TextColored(state.failed ? theme::failure : theme::muted, "%s", state.message.c_str());
    ImGui::PopClipRect();
    if (ImGui::IsItemHovered()) {
      ImGui::BeginTooltip();
      ImGui::PushTextWrapPos(520);
      ImGui::TextUnformatted(state.message.c_str());
      ImGui::PopTextWrapPos();
      ImGui::EndTooltip();
    }
  }
  ImGui::PopStyleVar();
  ImGui::EndChild();
}

void Interface::progress_bar(const State &state) {
  const char *what = state.activity == Activity::opening ? "Opening the model" : state.stage.c_str();
  if (state.activity == Activity::drawing) what = state.stage == "denoise" ? "Drawing" : "Decoding";
  ImGui::TextUnformatted(what);
  ImGui::SameLine();
  if (state.total) {
    ImGui::TextColored(theme::muted, "step %llu of %llu", static_cast<unsigned long long>(state.done),
                       static_cast<unsigned long long>(state.total));
  } else {
    ImGui::TextColored(theme::muted, "…");
  }
  if (!std::isnan(state.loss)) {
    ImGui::SameLine();
    ImGui::TextColored(theme::muted, "loss %.4f", state.loss);
  }
  float share = state.total ? static_cast<float>(state.done) / static_cast<float>(state.total) : 0;
  ImVec2 from = ImGui::GetCursorScreenPos(), to{from.x + ImGui::GetContentRegionAvail().x, from.y + 14};
  ImDrawList &list = *ImGui::GetWindowDrawList();
  list.AddRectFilled(from, to, theme::track, 7);
  float filled = (to.x - from.x) * share;
  if (filled > 0) list.AddRectFilled(from, {from.x + std::max(filled, 14.0f), to.y}, theme::accent, 7);
  trace_.place("progress", from, to);
}

/* ----------------------------------------------------------------------------------------------------------------
 * The right side
 * ---------------------------------------------------------------------------------------------------------------- */

void Interface::sheet(const State &state, ImVec2 size) {
  ImGui::BeginChild("sheet", size, false, panel);
  caption("EARLIER PICTURES");
  ImGui::BeginChild("pictures");
  if (state.pictures.empty()) ImGui::TextColored(theme::muted, "None yet.");
  float side = (ImGui::GetContentRegionAvail().x - 8) / 2;
  for (std::size_t back = 0; back < state.pictures.size(); ++back) {
    const PicturePointer &one = state.pictures[state.pictures.size() - 1 - back];
    if (back % 2) ImGui::SameLine(0, 8);
    ImGui::PushID(one.get());
    ImVec2 corner = ImGui::GetCursorScreenPos();
    if (ImGui::InvisibleButton("picture", {side, side})) selected_ = one;
    bool hovered = ImGui::IsItemHovered();
    trace_.place("sheet/" + std::to_string(back));
    auto width = static_cast<float>(one->width), height = static_cast<float>(one->height);
    float scale = side / std::max(width, height);
    ImVec2 half{width * scale / 2, height * scale / 2}, centre{corner.x + side / 2, corner.y + side / 2};
    ImDrawList &list = *ImGui::GetWindowDrawList();
    list.AddImageRounded(textures_.of(one), {centre.x - half.x, centre.y - half.y}, {centre.x + half.x, centre.y + half.y},
                         {0, 0}, {1, 1}, IM_COL32_WHITE, 5);
    if (selected_ == one || hovered) {
      list.AddRect({centre.x - half.x, centre.y - half.y}, {centre.x + half.x, centre.y + half.y},
                   selected_ == one ? theme::accent : IM_COL32(255, 255, 255, 120), 5, 0, 3);
    }
    if (hovered) {
      ImGui::SetTooltip("%s\nseed %llu", one->recipe.prompt.c_str(), static_cast<unsigned long long>(one->recipe.seed));
    }
    ImGui::PopID();
  }
  ImGui::EndChild();
  ImGui::EndChild();
}

/* ----------------------------------------------------------------------------------------------------------------
 * Orders
 * ---------------------------------------------------------------------------------------------------------------- */

void Interface::finder(const State &state) {
  constexpr const char *title = "Find a concept in pictures";
  if (finds_ && !ImGui::IsPopupOpen(title)) {
    ImGui::OpenPopup(title);
    finds_ = false;
    if (search_.trigger.empty()) search_.trigger = "<s5>";
  }
  ImGui::SetNextWindowSize({560, 0});
  ImGui::SetNextWindowPos(ImGui::GetMainViewport()->GetCenter(), ImGuiCond_Appearing, {0.5f, 0.5f});
  if (!ImGui::BeginPopupModal(title, nullptr, ImGuiWindowFlags_NoSavedSettings)) return;
  caption("Folder with a few pictures of one subject");
  fill();
  ImGui::InputText("##pictures", &search_.pictures);
  trace_.place("find/pictures", search_.pictures);
  caption("Its word: a token of the model that stands for nothing yet");
  fill();
  ImGui::InputText("##trigger", &search_.trigger);
  trace_.place("find/trigger");
  caption("What it is, in a word that the model knows");
  fill();
  ImGui::InputTextWithHint("##noun", "dog", &search_.class_noun);
  trace_.place("find/noun", search_.class_noun);
  caption("Batches: more take longer and find more surely");
  fill();
  ImGui::SliderInt("##batches", &search_.batches, 13, 200, "%d", ImGuiSliderFlags_AlwaysClamp);
  trace_.place("find/batches", std::to_string(search_.batches));
  ImGui::Dummy({0, 6});
  bool whole = !search_.pictures.empty() && !search_.trigger.empty() && !search_.class_noun.empty();
  ImGui::BeginDisabled(!whole || state.activity != Activity::idle);
  if (ImGui::Button("Find", {140, 0})) {
    fs::path folder(search_.pictures);
    std::string name = folder.filename().empty() ? folder.parent_path().filename().string() : folder.filename().string();
    search_.file = (fs::path(pictures_) / "concepts" / (name + ".safetensors")).string();
    engine_.find(search_);
    ImGui::CloseCurrentPopup();
  }
  ImGui::EndDisabled();
  trace_.place("find/start");
  ImGui::SameLine();
  if (ImGui::Button("Close", {110, 0}) || ImGui::IsKeyPressed(ImGui::GetKeyIndex(ImGuiKey_Escape))) {
    ImGui::CloseCurrentPopup();
  }
  ImGui::EndPopup();
}

Recipe Interface::recipe(const State &state) const {
  Recipe made;
  made.prompt = prompt_;
  made.steps = steps_;
  made.guidance = guidance_;
  made.seed = seed_;
  made.decomposed = decomposed_ && state.decomposes;
  for (const Concept &one : state.concepts) {
    auto setting = settings_.find(one.file);
    if (setting != settings_.end() && setting->second.strength > 0 && one.problem.empty()) {
      made.uses.push_back({one.file, setting->second.strength, setting->second.scope});
    }
  }
  return made;
}

void Interface::draw(const State &state) {
  if (new_seed_) seed_ = std::random_device()();
  engine_.draw(recipe(state));
}

void Interface::use(const Recipe &recipe) {
  prompt_ = recipe.prompt;
  steps_ = recipe.steps;
  guidance_ = recipe.guidance;
  seed_ = recipe.seed;
  new_seed_ = false;
  decomposed_ = recipe.decomposed;
  for (auto &[file, setting] : settings_) setting.strength = 0;
  for (const Use &use : recipe.uses) settings_[use.file] = {use.strength, use.scope};
}

void Interface::save(const PicturePointer &picture) {
  std::string stem = file_stem(*picture);
  fs::path file = fs::path(pictures_) / (stem + ".png");
  std::error_code error;
  for (int more = 2; fs::exists(file, error); ++more) {
    file = fs::path(pictures_) / (stem + "-" + std::to_string(more) + ".png");
  }
  engine_.save(picture, file.string());
}

}  // namespace studio
