/* Fonts by fontconfig and FreeType, and the style of Dear ImGui; see theme.hpp. */
#include "theme.hpp"

#include <fontconfig/fontconfig.h>
#include <imgui_freetype.h>

#include <string>

namespace studio::theme {

ImFont *large = nullptr;

/** The file of the best sans-serif font that the system has; empty if it has none. */
static std::string font_file(int weight) {
  std::string found;
  FcPattern *wanted = FcPatternCreate();
  for (const char *family : {"Inter", "Noto Sans", "Open Sans", "DejaVu Sans", "sans-serif"}) {
    FcPatternAddString(wanted, FC_FAMILY, reinterpret_cast<const FcChar8 *>(family));
  }
  FcPatternAddInteger(wanted, FC_WEIGHT, weight);
  FcPatternAddBool(wanted, FC_VARIABLE, FcFalse);
  FcConfigSubstitute(nullptr, wanted, FcMatchPattern);
  FcDefaultSubstitute(wanted);
  FcResult result;
  if (FcPattern *match = FcFontMatch(nullptr, wanted, &result)) {
    FcChar8 *file = nullptr;
    if (FcPatternGetString(match, FC_FILE, 0, &file) == FcResultMatch) found = reinterpret_cast<const char *>(file);
    FcPatternDestroy(match);
  }
  FcPatternDestroy(wanted);
  return found;
}

static ImFont *load(ImFontAtlas &atlas, int weight, float pixels) {
  // Latin, and the signs that the texts of this program use.
  static const ImWchar ranges[] = {0x20, 0x17f, 0x2010, 0x2027, 0x2190, 0x2193, 0x2212, 0x2212, 0};
  std::string file = font_file(weight);
  ImFont *font = file.empty() ? nullptr : atlas.AddFontFromFileTTF(file.c_str(), pixels, nullptr, ranges);
  return font ? font : atlas.AddFontDefault();
}

void apply() {
  ImFontAtlas &atlas = *ImGui::GetIO().Fonts;
  atlas.FontBuilderIO = ImGuiFreeType::GetBuilderForFreeType();
  atlas.FontBuilderFlags = ImGuiFreeTypeBuilderFlags_LightHinting;
  load(atlas, FC_WEIGHT_REGULAR, 17);
  large = load(atlas, FC_WEIGHT_DEMIBOLD, 21);

  ImGui::StyleColorsDark();
  ImGuiStyle &style = ImGui::GetStyle();
  style.WindowPadding = {18, 16};
  style.FramePadding = {10, 7};
  style.ItemSpacing = {10, 8};
  style.ItemInnerSpacing = {8, 6};
  style.ScrollbarSize = 12;
  style.GrabMinSize = 14;
  style.WindowBorderSize = style.ChildBorderSize = 0;
  style.FrameBorderSize = style.PopupBorderSize = 1;
  style.FrameRounding = style.GrabRounding = 6;
  style.ChildRounding = style.PopupRounding = style.WindowRounding = 8;
  auto set = [&](std::initializer_list<ImGuiCol> which, ImU32 colour) {
    for (ImGuiCol one : which) style.Colors[one] = ImGui::ColorConvertU32ToFloat4(colour);
  };
  set({ImGuiCol_WindowBg}, IM_COL32(23, 25, 31, 255));
  set({ImGuiCol_ChildBg}, IM_COL32(30, 33, 40, 255));
  set({ImGuiCol_PopupBg}, IM_COL32(34, 37, 46, 255));
  set({ImGuiCol_Border, ImGuiCol_Separator}, IM_COL32(58, 63, 77, 255));
  set({ImGuiCol_FrameBg, ImGuiCol_Button}, track);
  set({ImGuiCol_FrameBgHovered, ImGuiCol_ButtonHovered}, IM_COL32(54, 59, 72, 255));
  set({ImGuiCol_FrameBgActive, ImGuiCol_ButtonActive}, IM_COL32(64, 70, 86, 255));
  set({ImGuiCol_SliderGrab, ImGuiCol_CheckMark}, accent);
  set({ImGuiCol_SliderGrabActive}, IM_COL32(146, 170, 255, 255));
  set({ImGuiCol_Header}, IM_COL32(50, 58, 84, 255));
  set({ImGuiCol_HeaderHovered, ImGuiCol_HeaderActive}, IM_COL32(60, 70, 104, 255));
  set({ImGuiCol_TextSelectedBg}, IM_COL32(70, 92, 170, 255));
  set({ImGuiCol_TitleBg, ImGuiCol_TitleBgActive}, IM_COL32(34, 37, 46, 255));
  set({ImGuiCol_ScrollbarBg}, IM_COL32(0, 0, 0, 0));
  set({ImGuiCol_ModalWindowDimBg}, IM_COL32(0, 0, 0, 130));
  set({ImGuiCol_Text}, IM_COL32(230, 232, 237, 255));
  style.Colors[ImGuiCol_TextDisabled] = muted;
}

}  // namespace studio::theme
