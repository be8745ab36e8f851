#include "team.h"

#include <algorithm>
#include <chrono>
#include <system_error>

#include <sched.h>

#include <unistd.h>

namespace rigl_serving {
namespace {

constexpr std::chrono::nanoseconds kShortest = std::chrono::microseconds(1);
constexpr std::chrono::nanoseconds kLongest = std::chrono::microseconds(150);

// For waits between layers, which are alike for all networks of a thread.
thread_local Patience patience_between_layers;

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

void Patience::InTime() { time_ = std::min(2 * time_, kLongest); }

void Patience::InVain() {
  time_ = ++in_vain_ % 128 == 0 ? kLongest : std::max(time_ / 2, kShortest);
}

void Count::Add() {
  // Both sequentially consistent, as in WaitWhile: either this sees a sleeper,
  // or that one sees the new number.
  value_.fetch_add(1);
  if (asleep_.load() == 0) return;
  { std::lock_guard<std::mutex> lock(mutex_); }
  wake_.notify_all();
}

void Count::WaitWhile(uint32_t value, Patience* patience) {
  const auto begin = std::chrono::steady_clock::now();
  for (int spins = 1; Read() == value; ++spins) {
    Pause();
    if (spins % 16 != 0 ||
        std::chrono::steady_clock::now() - begin < patience->time())
      continue;
    patience->InVain();
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return value_.load() != value; });
    asleep_.fetch_sub(1);
    return;
  }
  patience->InTime();
}

void Barrier::Wait() {
  if (threads_ == 1) return;
  const uint32_t round = round_.Read();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.Add();
  } else {
    round_.WaitWhile(round, &patience_between_layers);
  }
}

// The threads themselves. A forked child has none of them.
struct Team::Crew {
  explicit Crew(int threads) : process(getpid()) {
    members.reserve(static_cast<size_t>(threads));  // before any of them runs
    for (int i = 1; i < threads; ++i) {
      try {
        members.emplace_back([this, i] { Work(i); });
      } catch (const std::system_error&) {  // no more threads here
        break;
      }
    }
  }

  ~Crew() {
    stop.store(true, std::memory_order_relaxed);
    calls.Add();
    for (std::thread& member : members) member.join();
  }

  int count() const { return static_cast<int>(members.size()) + 1; }

  void Work(int thread) {
    Patience patience;
    for (uint32_t done = 0;; ++done) {  // no call begins before all have left
      calls.WaitWhile(done, &patience);
      if (stop.load(std::memory_order_relaxed)) return;
      (*run)(thread, count());
      if (working.fetch_sub(1, std::memory_order_acq_rel) == 1) finished.Add();
    }
  }

  void Run(const std::function<void(int, int)>& what) {
    run = &what;
    working.store(count() - 1, std::memory_order_relaxed);
    const uint32_t before = finished.Read();
    calls.Add();
    what(0, count());
    finished.WaitWhile(before, &patience_between_layers);
  }

  const pid_t process;
  std::vector<std::thread> members;
  std::atomic<bool> stop{false};
  const std::function<void(int, int)>* run = nullptr;
  alignas(64) std::atomic<int> working{0};
  Count calls;
  Count finished;
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
