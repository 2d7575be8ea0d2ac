/* How the program looks: its fonts, colours and distances. */
#ifndef STUDIO_THEME_HPP
#define STUDIO_THEME_HPP

#include <imgui.h>

namespace studio::theme {

constexpr ImU32 accent = IM_COL32(108, 140, 255, 255);
constexpr ImU32 deep = IM_COL32(78, 108, 224, 255);
constexpr ImU32 track = IM_COL32(42, 46, 56, 255);
constexpr ImU32 stage = IM_COL32(17, 19, 23, 255);
inline const ImVec4 muted{0.60f, 0.63f, 0.69f, 1};
inline const ImVec4 warning{0.95f, 0.74f, 0.40f, 1};
inline const ImVec4 failure{0.96f, 0.50f, 0.48f, 1};
constexpr ImU32 stop = IM_COL32(172, 62, 68, 255);
constexpr ImU32 stop_hovered = IM_COL32(198, 76, 82, 255);

/** The larger of the two fonts, for headings and the main button. */
extern ImFont *large;

/** Loads the fonts that the system likes best and sets all colours; after `ImGui::CreateContext`. */
void apply();

}  // namespace studio::theme

#endif
