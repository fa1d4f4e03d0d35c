// Speed of attention and of the elementwise operations beside the machine's limits, all measured
// here. Not a test: run it by hand, on an idle machine.
//
//   attention_bench [threads] [decode | batch | verify | prefill | elementwise] [kind]
//
// The limit of attention is the larger of two times: the cache's bytes (an int8 cache's scales too)
// over the reading rate, and the multiply-accumulates over what each row sees over the peak of the
// dot that the tier uses. That of an elementwise operation is what it reads and writes over the
// reading rate. "share" is limit / measured. Caches take turns so that none stays in the last-level
// cache.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <string>
#include <vector>

#include "attention/attention.h"
#include "cpu.h"
#include "elementwise/elementwise.h"
#include "memory.h"
#include "rates/rates.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int kPageSize = 16;
constexpr size_t kCaches = size_t{128} << 20;  // bytes that take turns

// Of a single thread the time on its CPU, so that what else the machine does matters less.
double now() {
  if (thread_count() > 1) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

template <typename Work>
double best_time(int repeats, Work work) {
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const double start = now();
    work(i);
    best = std::min(best, now() - start);
  }
  return best;
}

struct Limits {
  double read, f32, bf16;
};

Limits measure_limits() {
  const ReadProbe memory(size_t{256} << 20);
  const auto best = [](auto measure) {
    double rate = 0;
    for (int i = 0; i < 25; ++i) rate = std::max(rate, measure());
    return rate;
  };
  return {best([&] { return memory.rate(); }), best([] { return dot_rate(Dot::f32); }),
          best([] { return dot_rate(Dot::bf16); })};
}

struct Kind {
  CacheKind kind;
  const char* name;
};

constexpr Kind kKinds[] = {{CacheKind::bf16, "bf16"},
                           {CacheKind::fp8, "fp8"},
                           {CacheKind::int8, "int8"},
                           {CacheKind::f16, "f16"},
                           {CacheKind::f32, "f32"}};

struct Shape {
  int heads, kv_heads, D, value_D;
};

// `sequences` of `past` entries each, and `rows` new ones; pages are scattered.
void measure(const Limits& limits, const Kind& kind, const Shape& shape, int sequences, int past,
             int rows) {
  const int length = past + rows, T = sequences * rows;
  const int pages = (length + kPageSize - 1) / kPageSize, all = pages * sequences;
  const int64_t slots = int64_t{all} * shape.kv_heads * kPageSize;
  const int64_t key_bytes = slots * shape.D * element_size(kind.kind);
  const int64_t value_bytes = slots * shape.value_D * element_size(kind.kind);
  const int64_t both = key_bytes + value_bytes;
  const int turns = static_cast<int>(std::max<int64_t>(1, kCaches / both));
  const Buffer keys(key_bytes * turns), values(value_bytes * turns);
  // Memory that was never written is one page of zeros, in the cache.
  memset(keys.as<char>(), 0x11, key_bytes * turns);
  memset(values.as<char>(), 0x11, value_bytes * turns);
  std::vector<int32_t> table(all), query_start{0}, kv_len(sequences, length);
  for (int i = 0; i < all; ++i) table[i] = static_cast<int32_t>((int64_t{i} * 7919) % all);
  const int64_t channels = int64_t{T} * shape.heads * shape.D;
  const Buffer query(channels * sizeof(float)), out(channels * sizeof(float));
  std::fill_n(query.as<float>(), channels, 0.5f);
  std::vector<float> scales(slots, 1.0f);
  std::vector<int64_t> positions;
  for (int s = 0; s < sequences; ++s) {
    for (int i = 0; i < rows; ++i) positions.push_back(past + i);
    query_start.push_back((s + 1) * rows);
  }
  Attend task{};
  task.query = query.as<float>();
  task.out = out.as<float>();
  task.T = T;
  task.heads = shape.heads;
  task.kv_heads = shape.kv_heads;
  task.D = shape.D;
  task.value_D = shape.value_D;
  task.sequences = sequences;
  task.query_start = query_start.data();
  task.kv_len = kv_len.data();
  task.block_table = table.data();
  task.max_pages = pages;
  task.positions = positions.data();
  task.page_size = kPageSize;
  task.kind = kind.kind;
  const bool scaled = element_size(kind.kind) == 1;
  task.key_scale = task.value_scale = scaled ? scales.data() : nullptr;
  task.scale = 0.125f;
  const int repeats = rows > 100 ? 7 : std::clamp(4 * turns, 25, 200);
  const double seconds = best_time(repeats, [&](int i) {
    task.key_cache = keys.as<char>() + key_bytes * (i % turns);
    task.value_cache = values.as<char>() + value_bytes * (i % turns);
    attend(task);
  });
  const double scale_bytes = kind.kind == CacheKind::int8 ? 8 : 0;
  const double channels_of_both = shape.D + shape.value_D;
  const double read = 1.0 * sequences * length * shape.kv_heads *
                      (channels_of_both * element_size(kind.kind) + scale_bytes);
  const double macs = 1.0 * sequences * shape.heads * channels_of_both *
                      (double{1} * rows * past + 0.5 * rows * (rows + 1));
  const bool narrow = kind.kind != CacheKind::f32 && kind.kind != CacheKind::f16;
  const double peak = narrow && limits.bf16 > 0 ? limits.bf16 : limits.f32;
  const double limit = std::max(read / limits.read, peak > 0 ? macs / peak : 0);
  printf(
      "%2d/%d heads of %3d, %-4s  %2d x (past %4d, rows %4d)  %9.1f us  %5.1f GB/s %6.1f GMAC/s  "
      "share %3.0f %%\n",
      shape.heads, shape.kv_heads, shape.D, kind.name, sequences, past, rows, seconds * 1e6,
      read / seconds * 1e-9, macs / seconds * 1e-9, 100 * limit / seconds);
  fflush(stdout);
}

// Arrays that take turns: an operation finds none of its numbers in a core's own caches.
void measure_elementwise(const Limits& limits, int64_t T, int64_t H) {
  const int64_t count = T * H, turns = std::max<int64_t>(1, (int64_t{8} << 20) / count);
  const Buffer x(count * turns * 4), up(count * turns * 4), y(count * turns * 4);
  const std::vector<float> w(H, 1.0f);
  const auto at = [&](const Buffer& buffer, int i) {
    return buffer.as<float>() + count * (i % turns);
  };
  const double norm =
      best_time(100, [&](int i) { rms_norm(at(x, i), w.data(), at(y, i), T, H, 1e-6f, 0); });
  const double silu =
      best_time(100, [&](int i) { gated(at(x, i), at(up, i), at(y, i), T, H, {}); });
  const auto share = [&](int arrays, double seconds) {
    return 100 * 4.0 * arrays * count / limits.read / seconds;
  };
  printf("%4ld rows of %4ld  rms_norm %8.1f us, share %3.0f %%  gated %8.1f us, share %3.0f %%\n",
         static_cast<long>(T), static_cast<long>(H), norm * 1e6, share(2, norm), silu * 1e6,
         share(3, silu));
  fflush(stdout);
}

}  // namespace
}  // namespace fewbits

int main(int argc, char** argv) {
  using namespace fewbits;
  if (argc > 1) set_thread_count(std::max(1, atoi(argv[1])));
  const std::string part = argc > 2 ? argv[2] : "", wanted = argc > 3 ? argv[3] : "";
  const auto chosen = [&](const char* name) { return part.empty() || part == name; };
  const int threads = thread_count();
  const Limits limits = measure_limits();
  printf("%s, %d threads: reads %.1f GB/s, f32 %.1f GMAC/s, bf16 %.1f GMAC/s\n", name(tier()),
         threads, limits.read / 1e9, limits.f32 / 1e9, limits.bf16 / 1e9);
  const Shape llama = {32, 8, 64, 64};
  for (const Kind& kind : kKinds) {
    if (!wanted.empty() && wanted != kind.name) continue;
    if (chosen("decode")) {
      for (const int past : {127, 2047, 8191}) measure(limits, kind, llama, 1, past, 1);
      for (const int sequences : {4, 16}) measure(limits, kind, llama, sequences, 1023, 1);
    }
    if (chosen("batch")) {
      for (const int sequences : {8, 16}) {
        for (const int past : {31, 64, 255, 2047}) measure(limits, kind, llama, sequences, past, 1);
      }
    }
    if (chosen("verify")) {
      for (const int rows : {1, 2, 4, 8, 16}) {
        for (const int past : {512, 2048}) measure(limits, kind, llama, 1, past - rows, rows);
      }
    }
    if (chosen("prefill")) {
      for (const int rows : {512, 2048}) measure(limits, kind, llama, 1, 0, rows);
    }
  }
  if (part.empty()) {
    for (const Shape& shape : {Shape{32, 8, 128, 128}, Shape{32, 32, 64, 64}, Shape{14, 2, 64, 64},
                               Shape{16, 16, 192, 128}}) {
      for (const int rows : {1, 5}) measure(limits, kKinds[0], shape, 1, 2048 - rows, rows);
      measure(limits, kKinds[0], shape, 1, 0, 512);
    }
  }
  if (chosen("elementwise")) {
    for (const int64_t T : {1, 16, 512, 2048}) {
      for (const int64_t H : {2048, 8192}) measure_elementwise(limits, T, H);
    }
  }
}
