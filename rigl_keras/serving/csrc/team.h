// Threads that work together on one call, layer by layer.
#ifndef RIGL_KERAS_TEAM_H_
#define RIGL_KERAS_TEAM_H_

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace rigl_serving {

// How long a thread stays awake while it waits. A wait that ends in time makes
// the next one longer, a vain one shorter. So threads with cores of their own
// never sleep between layers, and where several processes share the cores, a
// thread soon leaves its core to the one that it waits for. Now and then it
// tries a long wait, as the other processes may have ended.
class Patience {
 public:
  std::chrono::nanoseconds time() const { return time_; }
  void InTime();
  void InVain();

 private:
  std::chrono::nanoseconds time_ = std::chrono::microseconds(100);
  uint32_t in_vain_ = 0;
};

// A number that threads wait for, awake at first and then asleep.
class Count {
 public:
  uint32_t Read() const { return value_.load(std::memory_order_acquire); }
  // Adds one and wakes those who wait.
  void Add();
  // Waits until the number is not `value`.
  void WaitWhile(uint32_t value, Patience* patience);

 private:
  alignas(64) std::atomic<uint32_t> value_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Lets no thread pass before all have arrived.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void Wait();

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  Count round_;
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
