// Speed of attention beside the reading rate of memory. Not a test: run it by hand, on an idle
// machine.
//
//   attention_bench [threads]
//
// Decode reads the cache once: its limit is bytes over the reading rate. Caches take turns so that
// none stays in the last-level cache. Prefill is shown in multiply-adds.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "attention/attention.h"
#include "cpu.h"
#include "elementwise/elementwise.h"
#include "memory.h"
#include "threads.h"

namespace fewbits {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Work>
double best_time(int repeats, Work work) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const double start = now();
    work(i);
    times.push_back(now() - start);
  }

  return *std::min_element(times.begin(), times.end());
}

constexpr size_t kReadBytes = size_t{256} << 20;

double reading_rate() {
  const Buffer memory(kReadBytes);
  std::vector<uint64_t> sums(1024);
  struct Context {
    const uint64_t* words;
    uint64_t* sums;
  } context{memory.as<uint64_t>(), sums.data()};
  const double seconds = best_time(7, [&](int) {
    parallel_for(
        1024,
        [](void* raw, int64_t begin, int64_t end) {
          const Context& c = *static_cast<Context*>(raw);
          constexpr int64_t kWords = kReadBytes / 8 / 1024;
          for (int64_t i = begin; i < end; ++i) {
            uint64_t sum[8] = {};
            for (int64_t w = 0; w < kWords; w += 8) {
              for (int j = 0; j < 8; ++j) sum[j] += c.words[i * kWords + w + j];
            }
            c.sums[i] = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
          }
        },
        &context);
  });
  return kReadBytes / seconds;
}

struct Shape {
  int heads, kv_heads, D, page_size;
  CacheKind kind;
  const char* kind_name;
};

// One sequence whose pages are scattered.
void measure(const Shape& shape, int past, int rows, double rate) {
  const int length = past + rows, pages = (length + shape.page_size - 1) / shape.page_size;
  const int64_t element = element_size(shape.kind);
  const int64_t bytes = int64_t{pages} * shape.kv_heads * shape.page_size * shape.D * element;
  const int layers = std::max<int64_t>(1, (int64_t{128} << 20) / (2 * bytes));
  const Buffer keys(bytes * layers), values(bytes * layers);
  std::vector<int32_t> table(pages);
  for (int i = 0; i < pages; ++i) table[i] = static_cast<int32_t>((int64_t{i} * 7919) % pages);
  std::vector<float> query(int64_t{rows} * shape.heads * shape.D, 0.5f), out(query.size());
  const bool scaled = element == 1;
  std::vector<float> scale(int64_t{pages} * shape.kv_heads * shape.page_size, 1.0f);
  std::vector<int64_t> positions(rows);
  for (int i = 0; i < rows; ++i) positions[i] = past + i;
  const int32_t query_start[] = {0, rows}, kv_len[] = {length};
  Attend task{};
  task.query = query.data();
  task.out = out.data();
  task.T = rows;
  task.heads = shape.heads;
  task.kv_heads = shape.kv_heads;
  task.D = shape.D;
  task.sequences = 1;
  task.query_start = query_start;
  task.kv_len = kv_len;
  task.block_table = table.data();
  task.max_pages = pages;
  task.positions = positions.data();
  task.page_size = shape.page_size;
  task.kind = shape.kind;
  task.key_scale = task.value_scale = scaled ? scale.data() : nullptr;
  task.scale = 0.125f;
  const double seconds = best_time(std::max(9, std::min(401, 4 * layers)), [&](int i) {
    task.key_cache = keys.as<char>() + bytes * (i % layers);
    task.value_cache = values.as<char>() + bytes * (i % layers);
    attend(task);
  });
  const double macs =
      2.0 * shape.heads * shape.D * (double{1} * rows * past + 0.5 * rows * (rows + 1));
  const double limit = 2.0 * length * shape.kv_heads * shape.D * element / rate;
  printf(
      "%2d/%d heads, D %3d, %-4s past %5d rows %4d: %9.1f us, %6.1f GB/s (share of reading %3.0f "
      "%%), %6.1f GMAC/s\n",
      shape.heads, shape.kv_heads, shape.D, shape.kind_name, past, rows, seconds * 1e6,
      limit * rate / seconds * 1e-9, 100 * limit / seconds, macs / seconds * 1e-9);
}

void measure_elementwise(int64_t T, int64_t H) {
  std::vector<float> x(T * H, 0.5f), w(H, 1.0f), y(T * H);
  const double norm =
      best_time(101, [&](int) { rms_norm(x.data(), w.data(), y.data(), T, H, 1e-6f, 0); });
  const double silu = best_time(101, [&](int) { silu_mul(x.data(), x.data(), y.data(), T, H); });
  printf("rows %4ld of %5ld: rms_norm %8.2f us, silu_mul %8.2f us\n", static_cast<long>(T),
         static_cast<long>(H), norm * 1e6, silu * 1e6);
}

}  // namespace
}  // namespace fewbits

int main(int argc, char** argv) {
  using fewbits::CacheKind;
  if (argc > 1) fewbits::set_thread_count(atoi(argv[1]));
  const double rate = fewbits::reading_rate();
  printf("tier %s, %d threads, reading %.1f GB/s\n", name(fewbits::tier()), fewbits::thread_count(),
         rate * 1e-9);
  for (const fewbits::Shape& shape : {fewbits::Shape{32, 8, 64, 16, CacheKind::bf16, "bf16"},
                                      {32, 8, 128, 16, CacheKind::bf16, "bf16"},
                                      {32, 8, 64, 16, CacheKind::f32, "f32"},
                                      {32, 8, 64, 16, CacheKind::f16, "f16"},
                                      {32, 8, 64, 16, CacheKind::fp8, "fp8"},
                                      {32, 8, 64, 16, CacheKind::int8, "int8"},
                                      {32, 32, 64, 16, CacheKind::bf16, "bf16"},
                                      {14, 2, 64, 16, CacheKind::bf16, "bf16"}}) {
    measure(shape, 2047, 1, rate);
    measure(shape, 2043, 5, rate);
    measure(shape, 0, 512, rate);
    measure(shape, 0, 2048, rate);
  }
  fewbits::measure({6, 2, 64, 16, CacheKind::bf16, "bf16"}, 100, 1, rate);
  fewbits::measure({6, 2, 64, 16, CacheKind::bf16, "bf16"}, 5, 1, rate);
  for (const int64_t T : {1, 4, 16, 64, 512}) {
    for (const int64_t H : {384, 2048, 8192}) fewbits::measure_elementwise(T, H);
  }
}
