/*
 * What the program can do, without a window: open a model, draw, find a concept, save, cancel. One thread of its own does
 * the jobs in turn and owns all that belongs to Macula; any other thread gives orders, which return at once, and looks at
 * the state, which is a copy. It knows nothing of SDL or Dear ImGui.
 */
#ifndef STUDIO_ENGINE_HPP
#define STUDIO_ENGINE_HPP

#include <macula.hpp>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace studio {

/** A concept at work on a picture. */
struct Use {
  std::string file;
  float strength = 0;
  macula_scope scope = MACULA_SCOPE_DEFAULT;
};

/** All that a picture depends on, besides the model. */
struct Recipe {
  std::string prompt;
  int steps = 20;
  float guidance = 4;
  std::uint64_t seed = 1;
  /** Whether early steps run on smaller states. */
  bool decomposed = false;
  std::vector<Use> uses;
};

/** A picture as textures want it, 4 bytes a pixel, and how it came about. */
struct Picture {
  std::uint32_t width = 0, height = 0;
  std::vector<std::uint8_t> rgba;
  Recipe recipe;
  double seconds = 0;
};
using PicturePointer = std::shared_ptr<const Picture>;

/** A concept file that was read. */
struct Concept {
  std::string file, title;
  /** What a prompt says to mean it, e.g. `<s1> apple`. */
  std::string words;
  bool erases = false, local = false;
  std::uint64_t neurons = 0;
  /** Why it can't be used; empty if it can. */
  std::string problem;
};

/** What a new concept is found from. */
struct Search {
  /** A folder of pictures of one subject. */
  std::string pictures;
  std::string trigger, class_noun;
  int batches = 60;
  /** The concept file to write. */
  std::string file;
};

enum class Activity { idle, opening, drawing, searching };

/** Everything that there is to show. */
struct State {
  /** The open model's folder; empty before the first one. */
  std::string model;
  /** What runs it. */
  std::string runtime;
  /** Sides of its pictures. */
  std::uint32_t width = 0, height = 0;
  /** Whether it has a decomposed process. */
  bool decomposes = false;
  std::vector<Concept> concepts;
  Activity activity = Activity::idle;
  std::string stage;
  std::uint64_t done = 0, total = 0;
  /** The running loss of a search; NaN where there is none. */
  double loss = 0;
  /** The picture as it is predicted now; NULL unless one is being drawn. */
  PicturePointer preview;
  /** Finished pictures, the newest last. */
  std::vector<PicturePointer> pictures;
  /** The last thing that happened, for a person, and whether it went wrong. */
  std::string message;
  bool failed = false;
};

/** Does the jobs. */
class Engine {
 public:
  /** `wake` is called after each change of the state, on any thread. */
  explicit Engine(std::function<void()> wake);
  /** Stops what is under way and waits for it. */
  ~Engine();
  Engine(const Engine &) = delete;
  Engine &operator=(const Engine &) = delete;

  /** Opens a model folder in place of the present one, and the concepts of a folder `concepts` beside or above it. */
  void open(std::string folder);
  /** Reads a concept file, or all of a folder. */
  void add_concepts(std::string path);
  void draw(Recipe recipe);
  void find(Search search);
  /** Writes a PNG file, also while a job runs. */
  void save(PicturePointer picture, std::string file);
  /** Stops the running job and drops those that wait; returns at once. */
  void cancel();

  State look() const;

 private:
  /** Work for the thread, which a token of its own stops. */
  struct Job {
    std::function<void(const macula::CancelToken &)> work;
    std::shared_ptr<macula::CancelToken> token;
  };

  void post(std::function<void(const macula::CancelToken &)> work);
  void work();
  template <class Change>
  void change(Change how);
  void begin(Activity activity, std::string stage);
  void end(std::string message, bool failed = false);
  void end(const macula::Error &error);
  macula::Progress watch(const Recipe *recipe);
  macula::Result<void> compose(const Recipe &recipe);
  void open_now(const std::string &folder);
  void draw_now(const Recipe &recipe, const macula::CancelToken &token);
  void find_now(const Search &search, const macula::CancelToken &token);
  void read_concepts(const std::string &path);

  std::function<void()> wake_;
  mutable std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<Job> jobs_;
  bool ends_ = false;
  State state_;
  std::shared_ptr<macula::CancelToken> running_;
  std::vector<std::future<void>> saves_;

  /* The worker's own. */
  std::optional<macula::Runtime> runtime_;
  std::optional<macula::Pipeline> pipeline_;
  std::optional<macula::Schedule> schedule_;
  std::map<std::string, macula::Concept> concepts_;
  std::thread worker_;
};

}  // namespace studio

#endif
