// The thread pool that all kernels share.
//
// The pool is made by the first parallel_for that can use it. Its workers inherit the affinity mask
// and block all signals; between jobs they spin for at most 300 us and then sleep. A child made by
// fork() starts without a pool and makes its own.
#pragma once

#include <stdint.h>

namespace fewbits {

// Calls fn(context, begin, end) over disjoint sub-ranges of [0, count), on the pool's threads and
// the caller's, and returns when all of them are done. Who runs which sub-range varies from call to
// call. fn must not throw and must not call parallel_for. While the pool is at work for one thread,
// calls from others run on their caller's thread alone.
void parallel_for(int64_t count, void (*fn)(void* context, int64_t begin, int64_t end),
                  void* context);

// A part of a job that needs what the parts before it made.
struct Stage {
  int64_t count;  // below 2^32
  void (*fn)(void* context, int64_t begin, int64_t end);
};

constexpr int kMaxStages = 5;

// As parallel_for, one stage after the other: each begins when the one before it is done. Threads
// stay between them, which is cheaper than calls.
void parallel_stages(const Stage* stages, int count, void* context);

// fn(begin, end) over [0, count): on the pool where `parallel`, for work that is worth waking it,
// else at once.
template <typename Fn>
void for_range(int64_t count, bool parallel, Fn& fn) {
  if (parallel) {
    parallel_for(
        count,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
        &fn);
  } else if (count > 0) {
    fn(0, count);
  }
}

// Threads that parallel_for uses, the caller's included: the number of CPUs in the affinity mask
// unless set.
int thread_count();
void set_thread_count(int count);

}  // namespace fewbits
