/*
 * Macula Studio: draws with a model and its concepts in a window.
 *
 *     studio [MODEL] [--pictures FOLDER] [--trace]
 *
 * MODEL is a model folder to open at once; FOLDER is where pictures are saved, `macula-pictures` by default. `--trace`
 * writes what trace.hpp describes to standard output.
 *
 * This file opens the window and keeps the pace of its frames; engine.hpp does the work on a thread of its own, and
 * interface.hpp shows it.
 */
#include "engine.hpp"
#include "interface.hpp"
#include "theme.hpp"
#include "trace.hpp"

#include <SDL.h>
#include <SDL_opengl.h>
#include <backends/imgui_impl_opengl3.h>
#include <backends/imgui_impl_sdl.h>
#include <imgui.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>

using Clock = std::chrono::steady_clock;

static double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

struct Arguments {
  std::string model, pictures = "macula-pictures";
  bool trace = false;
};

static bool read_arguments(int argc, char **argv, Arguments &read) {
  for (int at = 1; at < argc; ++at) {
    if (!std::strcmp(argv[at], "--trace")) {
      read.trace = true;
    } else if (!std::strcmp(argv[at], "--pictures") && at + 1 < argc) {
      read.pictures = argv[++at];
    } else if (argv[at][0] != '-' && read.model.empty()) {
      read.model = argv[at];
    } else {
      return false;
    }
  }
  return true;
}

enum class Input { none, some, quit };

/** Takes what came since the last frame; waits for it at most `wait` milliseconds. */
static Input take_events(studio::Interface &interface, int wait) {
  SDL_Event event;
  Input input = Input::none;
  for (int some = SDL_WaitEventTimeout(&event, wait); some; some = SDL_PollEvent(&event)) {
    input = Input::some;
    ImGui_ImplSDL2_ProcessEvent(&event);
    if (event.type == SDL_QUIT) return Input::quit;
    if (event.type == SDL_DROPFILE) {
      interface.drop(event.drop.file);
      SDL_free(event.drop.file);
    }
  }
  return input;
}

/**
 * Puts the pointer where SDL's events say that it is. The back end of Dear ImGui asks the X server instead, which does not
 * tell of a pointer that a test moves while it holds a button down.
 */
static void take_pointer(SDL_Window *window) {
  int x = 0, y = 0;
  SDL_GetMouseState(&x, &y);
  if (SDL_GetMouseFocus() == window) ImGui::GetIO().MousePos = {static_cast<float>(x), static_cast<float>(y)};
}

static void run(SDL_Window *window, const Arguments &arguments) {
  Uint32 woken = SDL_RegisterEvents(1);
  studio::Trace trace(arguments.trace);
  studio::Engine engine([woken] {
    SDL_Event event{};
    event.type = woken;
    SDL_PushEvent(&event);
  });
  studio::Interface interface(engine, trace, arguments.pictures, arguments.model);
  if (!arguments.model.empty()) engine.open(arguments.model);

  constexpr double frame_time = 16;
  constexpr int rest_time = 200, frames_after_event = 3;
  auto began = Clock::now();
  for (int lively = frames_after_event;; --lively) {
    bool busy = engine.look().activity != studio::Activity::idle || lively > 0 || trace.on();
    // Some drivers wait for the screen when a frame is handed over; the rest of its time is waited for here.
    int left = std::max(1, static_cast<int>(frame_time - milliseconds_since(began)));
    Input input = take_events(interface, busy ? left : rest_time);
    if (input == Input::quit) return;
    // Dear ImGui needs a few frames to answer an input.
    if (input == Input::some) lively = frames_after_event;

    double since = milliseconds_since(began);
    began = Clock::now();
    studio::State state = engine.look();
    ImGui_ImplOpenGL3_NewFrame();
    ImGui_ImplSDL2_NewFrame();
    take_pointer(window);
    ImGui::NewFrame();
    interface.show(state);
    ImGui::Render();
    int width = 0, height = 0;
    SDL_GL_GetDrawableSize(window, &width, &height);
    glViewport(0, 0, width, height);
    glClearColor(0.09f, 0.10f, 0.12f, 1);
    glClear(GL_COLOR_BUFFER_BIT);
    ImGui_ImplOpenGL3_RenderDrawData(ImGui::GetDrawData());
    SDL_GL_SwapWindow(window);
    trace.frame(state, since);
  }
}

static int fail(const char *what) {
  std::fprintf(stderr, "%s: %s\n", what, SDL_GetError());
  return 1;
}

int main(int argc, char **argv) {
  Arguments arguments;
  if (!read_arguments(argc, argv, arguments)) {
    std::fprintf(stderr, "usage: %s [MODEL] [--pictures FOLDER] [--trace]\n", argv[0]);
    return 2;
  }
  SDL_SetHint(SDL_HINT_MOUSE_FOCUS_CLICKTHROUGH, "1");
  if (SDL_Init(SDL_INIT_VIDEO)) return fail("The screen can't be used");
  SDL_GL_SetAttribute(SDL_GL_CONTEXT_PROFILE_MASK, SDL_GL_CONTEXT_PROFILE_CORE);
  SDL_GL_SetAttribute(SDL_GL_CONTEXT_MAJOR_VERSION, 3);
  SDL_GL_SetAttribute(SDL_GL_CONTEXT_MINOR_VERSION, 2);
  SDL_Window *window =
      SDL_CreateWindow("Macula Studio", SDL_WINDOWPOS_CENTERED, SDL_WINDOWPOS_CENTERED, 1280, 800,
                       SDL_WINDOW_OPENGL | SDL_WINDOW_RESIZABLE);
  if (!window) return fail("No window with OpenGL can be opened");
  SDL_SetWindowMinimumSize(window, 1000, 640);
  SDL_GLContext context = SDL_GL_CreateContext(window);
  if (!context) return fail("OpenGL 3.2 can't be used");
  SDL_GL_SetSwapInterval(1);
  ImGui::CreateContext();
  ImGui::GetIO().IniFilename = nullptr;
  studio::theme::apply();
  ImGui_ImplSDL2_InitForOpenGL(window, context);
  ImGui_ImplOpenGL3_Init("#version 150");

  run(window, arguments);

  ImGui_ImplOpenGL3_Shutdown();
  ImGui_ImplSDL2_Shutdown();
  ImGui::DestroyContext();
  SDL_GL_DeleteContext(context);
  SDL_DestroyWindow(window);
  SDL_Quit();
  return 0;
}
