// The pool: every index once, any number of threads, callers at the same time, and a child process.
#include "threads.h"

#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <thread>
#include <vector>

#include "check.h"

namespace fewbits {
namespace {

// The thread sanitizer has a thread of its own, and ends a forked child that starts one.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
constexpr bool kThreadSanitizer = __has_feature(thread_sanitizer);
#else
constexpr bool kThreadSanitizer = false;
#endif

// qemu-user 7.2 fails an assertion of its own when a process with threads forks.
#if defined(FEWBITS_EMULATED)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

void check_once_each(int64_t count) {
  std::vector<uint8_t> seen(count + 1);
  parallel_for(
      count,
      [](void* context, int64_t begin, int64_t end) {
        for (; begin < end; ++begin) ++static_cast<uint8_t*>(context)[begin];
      },
      seen.data());
  for (int64_t i = 0; i < count; ++i)
    CHECK(seen[i] == 1, "index %d of %d ran %d times", int(i), int(count), seen[i]);
  CHECK(seen[count] == 0, "an index behind the last ran");
}

// Each index of a stage sees what all of the stage before it made.
void check_stages(int64_t count) {
  struct Made {
    int64_t count;
    std::vector<int64_t> first, second;
    int64_t total;

    int64_t sum(const std::vector<int64_t>& made) const {
      int64_t sum = 0;
      for (const int64_t value : made) sum += value;
      return sum;
    }
  } made{count, std::vector<int64_t>(count), std::vector<int64_t>(2 * count), 0};
  const Stage stages[] = {
      {count,
       [](void* context, int64_t begin, int64_t end) {
         for (; begin < end; ++begin) static_cast<Made*>(context)->first[begin] = begin + 1;
       }},
      {0, nullptr},
      {2 * count,
       [](void* context, int64_t begin, int64_t end) {
         Made& all = *static_cast<Made*>(context);
         for (; begin < end; ++begin) all.second[begin] = all.sum(all.first);
       }},
      {1,
       [](void* context, int64_t, int64_t) {
         Made& all = *static_cast<Made*>(context);
         all.total += all.sum(all.second);
       }},
  };
  parallel_stages(stages, 4, &made);
  CHECK(made.total == count * count * (count + 1), "%d indices in stages make %d", int(count),
        int(made.total));
}

// Threads of this process, 0 where the system doesn't tell.
int running_threads() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    if (word == "Threads:") {
      int count = 0;
      status >> count;
      return count;
    }
  }
  return 0;
}

void test_counts() {
  for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000, 4099}) check_once_each(count);
  for (const int64_t count : {0, 1, 2, 9, 100, 300}) check_stages(count);
}

// Long enough between two jobs for the workers to fall asleep.
void test_sleep() {
  for (int i = 0; i < 20; ++i) {
    check_once_each(50);
    std::this_thread::sleep_for(std::chrono::microseconds(i * 20));
  }
}

void test_several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int j = 0; j < 100; ++j) check_once_each(33);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void test_fork() {
  const pid_t child = fork();
  CHECK(child >= 0, "fork");
  if (child == 0) {
    test_counts();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child, "waitpid");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with status %d", status);
  test_counts();
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  CHECK(thread_count() >= 1, "%d", thread_count());
  const int before = running_threads();
  set_thread_count(3);
  CHECK(thread_count() == 3, "%d", thread_count());
  CHECK(running_threads() == before, "a thread was started before the first use");
  test_counts();
  if (before != 0 && !kThreadSanitizer) {
    CHECK(running_threads() == before + 2, "%d threads, %d before the first use", running_threads(),
          before);
  }
  for (const int threads : {1, 2, 4, 3}) {
    set_thread_count(threads);
    test_counts();
    test_sleep();
  }
  test_several_callers();
  if (!kThreadSanitizer && !kEmulated) test_fork();
}
