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

// Waking a sleeping worker costs several microseconds; the next product of a model comes sooner
// than that.
constexpr auto kSpinTime = std::chrono::microseconds(50);

// Several chunks per thread, so that a thread that is slowed down doesn't hold up the rest.
constexpr int64_t kChunksPerThread = 8;

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

// The caller opens the gate, workers that are awake join, and the caller closes it when no chunk is
// left: it waits for those who joined and never for a worker that still sleeps.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), parts_(threads) {
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

  void run(int64_t count, void (*fn)(void*, int64_t, int64_t), void* context) {
    fn_ = fn;
    context_ = context;
    chunk_ = std::max<int64_t>(1, count / (threads_ * kChunksPerThread));
    for (int i = 0; i < threads_; ++i) {
      parts_[i].next.store(count * i / threads_, std::memory_order_relaxed);
      parts_[i].end = count * (i + 1) / threads_;
    }
    gate_.store(kOpen, std::memory_order_release);
    announce();
    take_chunks(0);
    gate_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto closed = [this] { return gate_.load(std::memory_order_acquire) == 0; };
    if (spin_until(closed)) return;
    for (uint32_t inside; (inside = gate_.load(std::memory_order_acquire)) != 0;) {
      gate_.wait(inside, std::memory_order_acquire);
    }
  }

 private:
  // Of the work. Neighbours stay with one thread, so that it reads memory in order.
  struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  static constexpr uint32_t kOpen = 1u << 31;  // the other bits of gate_ count the workers inside

  void announce() {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }

  // A thread's own part first, then what others have left of theirs.
  void take_chunks(int thread) {
    for (int i = 0; i < threads_; ++i) {
      Part& part = parts_[(thread + i) % threads_];
      for (;;) {
        const int64_t begin = part.next.fetch_add(chunk_, std::memory_order_relaxed);
        if (begin >= part.end) break;
        fn_(context_, begin, std::min(begin + chunk_, part.end));
      }
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
        take_chunks(thread);
        if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) gate_.notify_one();
        break;
      }
    }
  }

  const int threads_;
  void (*fn_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t chunk_ = 1;
  std::vector<Part> parts_;
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

void parallel_for(int64_t count, void (*fn)(void* context, int64_t begin, int64_t end),
                  void* context) {
  if (count <= 0) return;
  State& s = state();
  if (count == 1 || s.threads.load(std::memory_order_relaxed) == 1) {
    fn(context, 0, count);
    return;
  }
  const std::unique_lock<std::mutex> lock(s.turn, std::try_to_lock);
  if (!lock) {
    fn(context, 0, count);
    return;
  }
  const int threads = s.threads.load(std::memory_order_relaxed);
  if (!s.pool) s.pool = std::make_unique<Pool>(threads);
  s.pool->run(count, fn, context);
}

}  // namespace fewbits
