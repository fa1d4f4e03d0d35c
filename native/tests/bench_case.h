// What the programs share that measure products: schemes, weights with random codes, clocks.
#pragma once

#include <time.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

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
    {"f16", WeightKind::f16, 0, ScaleKind::none, false, {}, Dot::bf16},
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
  const bool wide = scheme.kind == WeightKind::bf16 || scheme.kind == WeightKind::f16 ||
                    scheme.kind == WeightKind::f32;
  uint32_t state = 1;
  for (uint8_t& code : codes) {
    code = (state = state * 1664525 + 1013904223) >> 24;
    // No NaN, and of wide floats none that is subnormal: with those some cores take 150 cycles.
    if (wide) code = (code & 0x1c) | 0x20;
    if (scheme.kind == WeightKind::fp8) code &= 0xbf;
  }
  const std::vector<uint8_t> scale(N * weight->groups() * 4, 0x3c);
  const std::vector<int8_t> zero(N * weight->groups(), 3);
  weight->fill(0, N, codes.data(), scheme.scale == ScaleKind::none ? nullptr : scale.data(),
               scheme.zero ? zero.data() : nullptr);
  auto product = std::make_shared<Product>();
  product->weight = weight;
  product->activation = scheme.activation;
  return product;
}

// Of this machine; `peak` is float32's where the tier has no such dot.
struct Limits {
  double read, f32;

  Limits() {
    const ReadProbe memory(size_t{256} << 20);
    read = best_rate([&] { return memory.rate(); });
    f32 = best_rate([] { return dot_rate(Dot::f32); });
  }

  double peak(Dot dot) const {
    const double own = best_rate([dot] { return dot_rate(dot); });
    return own > 0 ? own : f32;
  }
};

}  // namespace
}  // namespace fewbits
