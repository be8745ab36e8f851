#include "team.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include <sched.h>

#include <unistd.h>

namespace rigl_serving {
namespace {

// How long a thread without work stays awake: calls that follow one another
// find it so.
constexpr auto kAwake = std::chrono::microseconds(150);

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int CoresOfProcess() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

void Barrier::Wait() {
  if (threads_ == 1) return;
  const uint32_t round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; round_.load(std::memory_order_acquire) == round;
       ++spins) {
    if (spins < 4000)
      Pause();
    else
      std::this_thread::yield();
  }
}

// The threads themselves. A forked child has none of them.
struct Team::Crew {
  explicit Crew(int threads) : process(getpid()) {
    for (int i = 1; i < threads; ++i) {
      try {
        members.emplace_back([this, i] { Work(i); });
      } catch (const std::system_error&) {  // no more threads here
        break;
      }
    }
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop.store(true, std::memory_order_relaxed);
      call.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    for (std::thread& member : members) member.join();
  }

  int count() const { return static_cast<int>(members.size()) + 1; }

  void Work(int thread) {
    uint32_t done = 0;
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kAwake;
      for (int spins = 1; call.load(std::memory_order_acquire) == done;
           ++spins) {
        Pause();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) {
          std::unique_lock<std::mutex> lock(mutex);
          asleep.fetch_add(1);
          wake.wait(lock, [&] { return call.load() != done; });
          asleep.fetch_sub(1);
          break;
        }
      }
      done = call.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      (*run)(thread, count());
      working.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void Run(const std::function<void(int, int)>& what) {
    run = &what;
    working.store(count() - 1, std::memory_order_relaxed);
    // Sequentially consistent, as is `asleep`: either this sees a sleeper, or
    // that one sees the call.
    call.fetch_add(1);
    if (asleep.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }
      wake.notify_all();
    }
    what(0, count());
    for (int spins = 0; working.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 4000)
        Pause();
      else
        std::this_thread::yield();
    }
  }

  const pid_t process;
  std::vector<std::thread> members;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> stop{false};
  const std::function<void(int, int)>* run = nullptr;
  alignas(64) std::atomic<uint32_t> call{0};
  alignas(64) std::atomic<int> working{0};
  std::atomic<int> asleep{0};
};

Team::Team(int threads)
    : threads_(threads > 0 ? threads : CoresOfProcess()) {}

Team::~Team() {
  // The threads of a parent are not ours to end.
  if (crew_ && crew_->process != getpid()) (void)crew_.release();
}

void Team::Run(const std::function<void(int, int)>& run) {
  if (threads_ == 1) return run(0, 1);
  std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
  if (!mine) return run(0, 1);
  if (crew_ && crew_->process != getpid()) (void)crew_.release();
  if (!crew_) crew_ = std::make_unique<Crew>(threads_);
  // A system that has no more threads: whoever waits for all of them would
  // wait for ever.
  if (crew_->count() < threads_) return run(0, 1);
  crew_->Run(run);
}

}  // namespace rigl_serving
