// Speed of the products beside the machine's limits, both measured here. Not a test: run it by
// hand, on an idle machine.
//
//   gemm_bench [threads] [N] [K]
//
// The limit of a product is the larger of two times: its packed bytes over the reading rate, and
// its multiply-accumulates over the peak of the dot that its tier uses. "share" is limit /
// measured.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "cpu.h"
#include "gemm/gemm.h"
#include "rates/rates.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int kRepeats = 25;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename Work>
double best_time(Work work) {
  double best = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const double start = now();
    work();
    best = std::min(best, now() - start);
  }
  return best;
}

// Of several measurements, each of a few milliseconds.
template <typename Measure>
double best_rate(Measure measure) {
  double best = 0;
  for (int i = 0; i < kRepeats; ++i) best = std::max(best, measure());
  return best;
}

std::shared_ptr<PackedWeight> random_weight(WeightKind kind, int64_t N, int64_t K) {
  const bool integer = kind == WeightKind::int4 || kind == WeightKind::int8;
  const int64_t group_size = kind == WeightKind::int4 ? std::min<int64_t>(K, 128) : K;
  auto weight = std::make_shared<PackedWeight>(kind, N, K, group_size, kind == WeightKind::int4);
  std::vector<uint8_t> codes(N * weight->code_row_bytes());
  uint32_t state = 1;
  // 0x3c01 keeps every float finite and normal in each of the formats.
  for (uint8_t& code : codes)
    code = (state = state * 1664525 + 1013904223) >> 24 & (integer ? 255 : 0x3c);
  const std::vector<float> scale(N * weight->groups(), 0.01f), zero(N * weight->groups(), 7.0f);
  weight->fill(0, N, codes.data(), integer ? scale.data() : nullptr,
               weight->has_zero() ? zero.data() : nullptr);
  return weight;
}

void measure(const char* label, WeightKind kind, int64_t N, int64_t K, double read, double peak) {
  // Enough copies that no cache holds what the next call reads.
  std::vector<Gemm> products;
  int64_t bytes = 0;
  for (int64_t total = 0; total < int64_t{96} << 20; total += bytes) {
    auto weight = random_weight(kind, N, K);
    bytes = weight->nbytes();
    products.push_back(Gemm({weight}, {{}}));
  }
  size_t next = 0;
  for (const int64_t M : {1, 2, 4, 8, 16, 64, 512}) {
    const std::vector<float> x(M * K, 0.5f);
    std::vector<float> y(M * N);
    float* out = y.data();
    const double seconds =
        best_time([&] { products[next++ % products.size()].run(x.data(), M, &out, false); });
    const double limit = std::max(bytes / read, peak > 0 ? M * N * K / peak : 0);
    printf("%-5s M %3ld  %8.3f ms  %6.1f GB/s  %6.1f GMAC/s  share %3.0f %%\n", label,
           static_cast<long>(M), seconds * 1e3, bytes / seconds / 1e9, M * N * K / seconds / 1e9,
           100 * limit / seconds);
  }
}

}  // namespace
}  // namespace fewbits

int main(int argc, char** argv) {
  using namespace fewbits;
  if (argc > 1) set_thread_count(std::max(1, atoi(argv[1])));
  const int64_t N = argc > 2 ? atoll(argv[2]) : 2048;
  const int64_t K = argc > 3 ? atoll(argv[3]) : 8192;
  const int threads = thread_count();
  const ReadProbe memory(size_t{256} << 20);
  const double read = best_rate([&] { return memory.rate(); });
  const double f32 = best_rate([] { return dot_rate(Dot::f32); });
  const double bf16 = best_rate([] { return dot_rate(Dot::bf16); });
  printf("%s, %d threads, %ld x %ld: reads %.1f GB/s, f32 %.1f GMAC/s, bf16 %.1f GMAC/s\n",
         name(tier()), threads, static_cast<long>(N), static_cast<long>(K), read / 1e9, f32 / 1e9,
         bf16 / 1e9);
  measure("int4", WeightKind::int4, N, K, read, bf16 > 0 ? bf16 : f32);
  measure("int8", WeightKind::int8, N, K, read, bf16 > 0 ? bf16 : f32);
  measure("bf16", WeightKind::bf16, N, K, read, bf16 > 0 ? bf16 : f32);
  measure("f16", WeightKind::f16, N, K, read, f32);
  measure("f32", WeightKind::f32, N, K, read, f32);
}
