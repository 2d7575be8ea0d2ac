/* Pictures on the graphics card: each is sent there when it is first shown and dropped when nobody holds it any more. */
#ifndef STUDIO_TEXTURES_HPP
#define STUDIO_TEXTURES_HPP

#include "engine.hpp"

#include <imgui.h>

#include <map>

namespace studio {

/** The textures of an OpenGL context, which must outlive it. */
class Textures {
 public:
  Textures() = default;
  ~Textures();
  Textures(const Textures &) = delete;
  Textures &operator=(const Textures &) = delete;

  /** The texture of a picture. */
  ImTextureID of(const PicturePointer &picture);
  /** Drops the textures of pictures that are gone. */
  void sweep();

 private:
  struct Held {
    std::weak_ptr<const Picture> picture;
    unsigned id;
  };
  std::map<const Picture *, Held> held_;
};

}  // namespace studio

#endif
