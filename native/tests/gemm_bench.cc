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
#include <string.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "gemm/gemm.h"
#include "rates/rates.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr int kRepeats = 15;

// Of a single thread the time on its CPU, so that what else the machine does matters less.
double now() {
  if (thread_count() > 1) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  return static_cast<double>(clock()) / CLOCKS_PER_SEC;
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

// What is measured: a weight's kind and scales, and how x is taken.
struct Scheme {
  const char* label;
  WeightKind kind;
  int64_t group_size;  // 0: the whole row
  ScaleKind scale;
  bool zero;
  Activation activation;
  Dot dot;
};

constexpr Activation kInt16 = {Quantizer::int16_group, 128};

const Scheme kSchemes[] = {
    {"int4 g128", WeightKind::int4, 128, ScaleKind::bf16, false, kInt16, Dot::int16},
    {"int4 g128 asym", WeightKind::int4, 128, ScaleKind::bf16, true, kInt16, Dot::int16},
    {"int8", WeightKind::int8, 0, ScaleKind::bf16, false, kInt16, Dot::int16},
    {"int4 bf16", WeightKind::int4, 128, ScaleKind::bf16, false, {}, Dot::bf16},
    {"int8 bf16", WeightKind::int8, 0, ScaleKind::bf16, false, {}, Dot::bf16},
    {"nvfp4", WeightKind::fp4, 16, ScaleKind::e4m3, false, {}, Dot::bf16},
    {"mxfp4", WeightKind::fp4, 32, ScaleKind::e8m0, false, {}, Dot::bf16},
    {"fp8", WeightKind::fp8, 0, ScaleKind::bf16, false, {}, Dot::bf16},
    {"bf16", WeightKind::bf16, 0, ScaleKind::none, false, {}, Dot::bf16},
    {"f32", WeightKind::f32, 0, ScaleKind::none, false, {}, Dot::f32},
    {"w8a8", WeightKind::int8, 0, ScaleKind::bf16, false, {Quantizer::int8_token}, Dot::int8},
    {"w4a8 g128",
     WeightKind::int4,
     128,
     ScaleKind::bf16,
     false,
     {Quantizer::int8_token},
     Dot::int8},
    {"w4a8 g128 x128",
     WeightKind::int4,
     128,
     ScaleKind::bf16,
     false,
     {Quantizer::int8_group, 128},
     Dot::int8},
    {"nvfp4 a4", WeightKind::fp4, 16, ScaleKind::e4m3, false, {Quantizer::nvfp4, 16}, Dot::int8},
};

std::shared_ptr<Product> random_product(const Scheme& scheme, int64_t N, int64_t K) {
  const int64_t group = scheme.group_size ? scheme.group_size : K;
  auto weight =
      std::make_shared<PackedWeight>(scheme.kind, N, K, group, scheme.scale, false, scheme.zero);
  std::vector<uint8_t> codes(N * weight->code_row_bytes());
  const bool wide = scheme.kind == WeightKind::bf16 || scheme.kind == WeightKind::f32;
  uint32_t state = 1;
  // 0x3c keeps every wide float finite and normal, 0xbf every byte of fp8.
  for (uint8_t& code : codes)
    code = (state = state * 1664525 + 1013904223) >> 24 & (wide                             ? 0x3c
                                                           : scheme.kind == WeightKind::fp8 ? 0xbf
                                                                                            : 0xff);
  const std::vector<uint8_t> scale(N * weight->groups() * 4, 0x3c);
  const std::vector<int8_t> zero(N * weight->groups(), 3);
  weight->fill(0, N, codes.data(), scheme.scale == ScaleKind::none ? nullptr : scale.data(),
               scheme.zero ? zero.data() : nullptr);
  auto product = std::make_shared<Product>();
  product->weight = weight;
  product->activation = scheme.activation;
  return product;
}

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
  const int threads = thread_count();
  const ReadProbe memory(size_t{256} << 20);
  const double read = best_rate([&] { return memory.rate(); });
  const auto peak = [](Dot dot) { return best_rate([dot] { return dot_rate(dot); }); };
  const double f32 = peak(Dot::f32), bf16 = peak(Dot::bf16), int8 = peak(Dot::int8);
  printf("%s, %d threads, %ld x %ld: reads %.1f GB/s, f32 %.1f, bf16 %.1f, int8 %.1f GMAC/s\n",
         name(tier()), threads, static_cast<long>(N), static_cast<long>(K), read / 1e9, f32 / 1e9,
         bf16 / 1e9, int8 / 1e9);
  for (const Scheme& scheme : kSchemes) {
    if (std::string(scheme.label).rfind(only, 0) != 0) continue;
    const double own = peak(scheme.dot);
    measure(scheme, N, K, rows, read, own > 0 ? own : f32);
  }
}
