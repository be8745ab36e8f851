// Threads that work together on one call, layer by layer.
#ifndef RIGL_KERAS_TEAM_H_
#define RIGL_KERAS_TEAM_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace rigl_serving {

// A barrier for threads that arrive within microseconds of one another: they
// spin, and give way only where a core has more than one of them.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void Wait();

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

// One for each network. Its threads start with the first call that needs them
// and wait for more: for a moment awake, then asleep.
class Team {
 public:
  // `threads`: the caller's included; 0: one for each core that this process
  // may use.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int threads() const { return threads_; }

  // Calls run(thread, threads) for each thread in [0, threads), the caller
  // being 0. Where another caller has the team at the moment, this one works
  // alone: run(0, 1). `run` must not throw.
  void Run(const std::function<void(int, int)>& run);

 private:
  struct Crew;
  const int threads_;
  std::mutex busy_;
  std::unique_ptr<Crew> crew_;
};

}  // namespace rigl_serving

#endif  // RIGL_KERAS_TEAM_H_
