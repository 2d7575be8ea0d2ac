/* Pictures on the graphics card, by OpenGL; see textures.hpp. */
#include "textures.hpp"

#include <SDL_opengl.h>

namespace studio {

Textures::~Textures() {
  for (auto &[picture, held] : held_) glDeleteTextures(1, &held.id);
}

ImTextureID Textures::of(const PicturePointer &picture) {
  auto [place, is_new] = held_.try_emplace(picture.get());
  Held &held = place->second;
  // A picture that is gone may have left its address to this one.
  if (!is_new && held.picture.expired()) glDeleteTextures(1, &held.id);
  if (is_new || held.picture.expired()) {
    held.picture = picture;
    glGenTextures(1, &held.id);
    glBindTexture(GL_TEXTURE_2D, held.id);
    glTexParameteri(GL_TEXTURE_2D, GL_TEXTURE_MIN_FILTER, GL_LINEAR);
    // A small model's picture is shown as the pixels that it is.
    glTexParameteri(GL_TEXTURE_2D, GL_TEXTURE_MAG_FILTER, GL_NEAREST);
    glTexImage2D(GL_TEXTURE_2D, 0, GL_RGBA8, static_cast<GLsizei>(picture->width), static_cast<GLsizei>(picture->height), 0,
                 GL_RGBA, GL_UNSIGNED_BYTE, picture->rgba.data());
  }
  return reinterpret_cast<ImTextureID>(static_cast<std::uintptr_t>(held.id));
}

void Textures::sweep() {
  for (auto at = held_.begin(); at != held_.end();) {
    if (at->second.picture.expired()) {
      glDeleteTextures(1, &at->second.id);
      at = held_.erase(at);
    } else {
      ++at;
    }
  }
}

}  // namespace studio
