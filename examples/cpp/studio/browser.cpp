/* The window to choose a folder or a file in; see browser.hpp. Folders are read when they are entered, not in each frame. */
#include "browser.hpp"

#include "theme.hpp"

#include <imgui.h>

#include <algorithm>

namespace studio {

namespace fs = std::filesystem;

void Browser::open(std::string title, const std::string &folder, std::string ending,
                   std::function<void(const std::string &)> take) {
  title_ = std::move(title);
  ending_ = std::move(ending);
  take_ = std::move(take);
  opens_ = true;
  std::error_code error;
  fs::path place = fs::absolute(folder.empty() ? "." : folder, error);
  while (!fs::is_directory(place, error) && place.has_relative_path()) place = place.parent_path();
  enter(place.lexically_normal());
}

void Browser::enter(const fs::path &folder) {
  folder_ = folder;
  folders_.clear();
  files_.clear();
  std::error_code error;
  for (const fs::directory_entry &entry : fs::directory_iterator(folder, error)) {
    fs::path name = entry.path().filename();
    if (name.string().front() == '.') continue;
    if (entry.is_directory(error)) {
      folders_.push_back(name);
    } else if (!ending_.empty() && name.extension() == ending_) {
      files_.push_back(name);
    }
  }
  std::sort(folders_.begin(), folders_.end());
  std::sort(files_.begin(), files_.end());
}

void Browser::show() {
  if (opens_) ImGui::OpenPopup(title_.c_str());
  opens_ = false;
  ImGui::SetNextWindowSize({620, 480}, ImGuiCond_Appearing);
  ImGui::SetNextWindowPos(ImGui::GetMainViewport()->GetCenter(), ImGuiCond_Appearing, {0.5f, 0.5f});
  if (title_.empty() || !ImGui::BeginPopupModal(title_.c_str(), nullptr, ImGuiWindowFlags_NoSavedSettings)) return;
  ImGui::TextColored(theme::muted, "%s", folder_.string().c_str());
  ImGui::BeginChild("entries", {0, -48}, true);
  fs::path next, chosen;
  if (folder_.has_relative_path() && ImGui::Selectable("↑  ..")) next = folder_.parent_path();
  for (const fs::path &name : folders_) {
    if (ImGui::Selectable((name.string() + "/").c_str())) next = folder_ / name;
  }
  for (const fs::path &name : files_) {
    if (ImGui::Selectable(name.string().c_str())) chosen = folder_ / name;
  }
  ImGui::EndChild();
  if (ImGui::Button("Take this folder", {180, 0})) chosen = folder_;
  ImGui::SameLine();
  if (ImGui::Button("Close", {110, 0}) || ImGui::IsKeyPressed(ImGui::GetKeyIndex(ImGuiKey_Escape))) {
    ImGui::CloseCurrentPopup();
  }
  if (!next.empty()) enter(next);
  if (!chosen.empty()) {
    take_(chosen.string());
    ImGui::CloseCurrentPopup();
  }
  ImGui::EndPopup();
}

}  // namespace studio
