/* A window to choose a folder or a file in, because neither SDL nor Dear ImGui has one. */
#ifndef STUDIO_BROWSER_HPP
#define STUDIO_BROWSER_HPP

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace studio {

class Browser {
 public:
  /**
   * Opens the window in a folder. What is chosen, a file with the ending or a folder, goes to `take`; without an ending
   * folders only.
   */
  void open(std::string title, const std::string &folder, std::string ending,
            std::function<void(const std::string &)> take);
  /** Shows the window, if it is open. */
  void show();

 private:
  void enter(const std::filesystem::path &folder);

  std::string title_, ending_;
  std::function<void(const std::string &)> take_;
  std::filesystem::path folder_;
  std::vector<std::filesystem::path> folders_, files_;
  bool opens_ = false;
};

}  // namespace studio

#endif
