// Speed of the products beside the machine's limits, both measured here. Not a test: run it by
// hand, on an idle machine.
//
//   gemm_bench [threads] [N] [K] [scheme] [M]
//
// The limit of a product is the larger of two times: its packed bytes over the reading rate, and
// its multiply-accumulates over the peak of the dot that its tier uses. "share" is limit /
// measured.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bench_case.h"
#include "cpu.h"
#include "gemm/gemm.h"
#include "threads.h"

namespace fewbits {
namespace {

void measure(const Scheme& scheme, int64_t N, int64_t K, const std::vector<int64_t>& rows,
             double read, double peak) {
  // Enough copies that no cache holds what the next call reads.
  std::vector<Gemm> products;
  int64_t bytes = 0;
  for (int64_t total = 0; total < int64_t{96} << 20; total += bytes) {
    auto product = random_product(scheme, N, K);
    bytes = product->weight->nbytes();
    products.push_back(Gemm({product}));
  }
  size_t next = 0;
  for (const int64_t M : rows) {
    std::vector<float> x(M * K);
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(static_cast<int>(i * 7919 % 255) - 127) / 64;
    std::vector<float> y(M * N);
    float* out = y.data();
    const double seconds = best_time([&] {
      products[next++ % products.size()].run({RowSource::Kind::plain, x.data(), nullptr}, M, &out,
                                             false);
    });
    const double limit = std::max(bytes / read, peak > 0 ? M * N * K / peak : 0);
    printf("%-15s M %3ld  %8.3f ms  %6.1f GB/s  %6.1f GMAC/s  share %3.0f %%\n", scheme.label,
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
  const std::string only = argc > 4 ? argv[4] : "";
  std::vector<int64_t> rows = {1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 512};
  if (argc > 5) rows = {atoll(argv[5])};
  const Limits limits;
  printf("%s, %d threads, %ld x %ld: reads %.1f GB/s, f32 %.1f GMAC/s\n", name(tier()),
         thread_count(), static_cast<long>(N), static_cast<long>(K), limits.read / 1e9,
         limits.f32 / 1e9);
  for (const Scheme& scheme : kSchemes) {
    if (std::string(scheme.label).rfind(only, 0) != 0) continue;
    measure(scheme, N, K, rows, limits.read, limits.peak(scheme.dot));
  }
}
