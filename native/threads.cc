#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fewbits {
namespace {

using Clock = std::chrono::steady_clock;

// Waking a sleeping worker costs some 15 us; between the passes of a small model and those of its
// drafter lie 100 and more.
constexpr auto kSpinTime = std::chrono::microseconds(300);

// Of what is left of its part a thread takes this share at once: chunks are few, and the last ones
// small, so that a thread that is slowed down doesn't hold up the rest.
constexpr uint32_t kChunksLeft = 4;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Done>
bool spin_until(Done done) {
  const auto deadline = Clock::now() + kSpinTime;
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (done()) return true;
      relax();
    }
    if (Clock::now() > deadline) return done();
  }
}

// Some of a stage's indices, the whole of it one atomic word: begin, and above it end.
class Range {
 public:
  void set(uint32_t begin, uint32_t end) {
    word_.store(pack(begin, end), std::memory_order_relaxed);
  }

  bool take_front(uint32_t* begin, uint32_t* end) {
    return take([&](uint32_t first, uint32_t last) {
      *begin = first;
      *end = first + std::max(1u, (last - first) / kChunksLeft);
      return pack(*end, last);
    });
  }

  bool take_back_half(uint32_t* begin, uint32_t* end) {
    return take([&](uint32_t first, uint32_t last) {
      *begin = first + (last - first) / 2;
      *end = last;
      return pack(first, *begin);
    });
  }

 private:
  static uint64_t pack(uint64_t begin, uint64_t end) { return end << 32 | begin; }

  template <typename Rest>
  bool take(Rest rest) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    for (;;) {
      const auto begin = static_cast<uint32_t>(word), end = static_cast<uint32_t>(word >> 32);
      if (begin >= end) return false;
      if (word_.compare_exchange_weak(word, rest(begin, end), std::memory_order_relaxed)) {
        return true;
      }
    }
  }

  std::atomic<uint64_t> word_{0};
};

// The caller opens the gate, workers that are awake join, and the caller closes it when nothing is
// left to take: it waits for those who joined and never for a worker that still sleeps.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), parts_(kMaxStages * threads) {
    // Signals belong to the program's own threads: Python's main thread must see Ctrl-C.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { worker(i); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Pool() {
    stopping_.store(true, std::memory_order_relaxed);
    announce();
    for (auto& worker : workers_) worker.join();
  }

  void run(const Stage* stages, int count, void* context) {
    stages_ = stages;
    stage_count_ = count;
    context_ = context;
    for (int s = 0; s < count; ++s) {
      done_[s].store(0, std::memory_order_relaxed);
      for (int i = 0; i < threads_; ++i) {
        const int64_t size = stages[s].count;
        part(s, i).set(static_cast<uint32_t>(size * i / threads_),
                       static_cast<uint32_t>(size * (i + 1) / threads_));
      }
    }
    gate_.store(kOpen, std::memory_order_release);
    announce();
    work(0);
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto closed = [this] { return gate_.load(std::memory_order_acquire) == 0; };
    if (spin_until(closed)) return;
    for (uint32_t inside; (inside = gate_.load(std::memory_order_acquire)) != 0;) {
      gate_.wait(inside, std::memory_order_acquire);
    }
  }

 private:
  // Neighbours stay with one thread, so that it reads memory in order.
  struct alignas(64) Part {
    Range range;
  };

  static constexpr uint32_t kOpen = 1u << 31;  // the other bits of gate_ count the workers inside

  Range& part(int stage, int thread) { return parts_[stage * threads_ + thread].range; }

  void announce() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  // What a thread does next of a stage: some of its own part, or of what it takes over from
  // another.
  bool take(int stage, int thread, uint32_t* begin, uint32_t* end) {
    Range& own = part(stage, thread);
    while (!own.take_front(begin, end)) {
      int i = 1;
      while (i < threads_ && !part(stage, (thread + i) % threads_).take_back_half(begin, end)) ++i;
      if (i == threads_) return false;
      own.set(*begin, *end);
    }
    return true;
  }

  void work(int thread) {
    for (int s = 0; s < stage_count_; ++s) {
      const Stage& stage = stages_[s];
      int64_t own = 0;
      for (uint32_t begin, end; take(s, thread, &begin, &end); own += end - begin) {
        stage.fn(context_, begin, end);
      }
      if (s + 1 == stage_count_) break;  // the gate waits for all
      if (own) done_[s].fetch_add(own, std::memory_order_acq_rel);
      const auto done = [&] { return done_[s].load(std::memory_order_acquire) == stage.count; };
      while (!spin_until(done)) std::this_thread::yield();
    }
  }

  void worker(int thread) {
    uint32_t seen = 0;
    for (;;) {
      const auto called = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called)) epoch_.wait(seen, std::memory_order_acquire);
      seen = epoch_.load(std::memory_order_acquire);
      if (stopping_.load(std::memory_order_relaxed)) return;
      uint32_t gate = gate_.load(std::memory_order_relaxed);
      while (gate & kOpen) {
        if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
        work(thread);
        if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) gate_.notify_one();
        break;
      }
    }
  }

  const int threads_;
  const Stage* stages_ = nullptr;
  int stage_count_ = 0;
  void* context_ = nullptr;
  std::vector<Part> parts_;  // [stages][threads]
  alignas(64) std::atomic<int64_t> done_[kMaxStages] = {};
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

int cpus_in_affinity_mask() {
#if defined(__linux__)
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) return CPU_COUNT(&mask);
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct State {
  std::mutex turn;  // held by the thread whose job the pool is running
  std::unique_ptr<Pool> pool;
  std::atomic<int> threads{cpus_in_affinity_mask()};
};

// Never destroyed: at exit the workers are asleep, and the process ends them.
State* g_state = nullptr;

// In the child of a fork the workers don't exist and the mutex may be held by a thread that doesn't
// either, so the parent's state is abandoned.
void start_anew_in_child() {
  const int threads = g_state->threads.load(std::memory_order_relaxed);
  g_state = new State;
  g_state->threads.store(threads, std::memory_order_relaxed);
}

State& state() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_state = new State;
    pthread_atfork(nullptr, nullptr, start_anew_in_child);
  });
  return *g_state;
}

}  // namespace

int thread_count() { return state().threads.load(std::memory_order_relaxed); }

void set_thread_count(int count) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.turn);
  if (count == s.threads.load(std::memory_order_relaxed)) return;
  s.threads.store(count, std::memory_order_relaxed);
  s.pool.reset();
}

void parallel_stages(const Stage* stages, int count, void* context) {
  State& s = state();
  const auto alone = [&] {
    for (int i = 0; i < count; ++i) {
      if (stages[i].count > 0) stages[i].fn(context, 0, stages[i].count);
    }
  };
  const bool small =
      std::all_of(stages, stages + count, [](const Stage& stage) { return stage.count <= 1; });
  if (small || s.threads.load(std::memory_order_relaxed) == 1) return alone();
  const std::unique_lock<std::mutex> lock(s.turn, std::try_to_lock);
  if (!lock) return alone();
  const int threads = s.threads.load(std::memory_order_relaxed);
  if (!s.pool) s.pool = std::make_unique<Pool>(threads);
  s.pool->run(stages, count, context);
}

void parallel_for(int64_t count, void (*fn)(void* context, int64_t begin, int64_t end),
                  void* context) {
  const Stage stage = {count, fn};
  parallel_stages(&stage, 1, context);
}

}  // namespace fewbits
