// Random weights of any kind, and what they stand for in double precision.
#pragma once

#include <math.h>
#include <string.h>

#include <memory>
#include <vector>

#include "check.h"
#include "gemm/gemm.h"

namespace fewbits {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The value of a finite number of `exponent` and `mantissa` bits.
inline double small_float(uint32_t code, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1;
  const int field = static_cast<int>(code >> mantissa & ((1u << exponent) - 1));
  const int fraction = static_cast<int>(code & ((1u << mantissa) - 1));
  const double magnitude = field ? ldexp((1 << mantissa) + fraction, field - bias - mantissa)
                                 : ldexp(fraction, 1 - bias - mantissa);
  return code >> (exponent + mantissa) & 1 ? -magnitude : magnitude;
}

// A random code of a weight's kind, and its value.
inline double random_code(WeightKind kind, Random& random, uint32_t* code) {
  switch (kind) {
    case WeightKind::int4:
      *code = static_cast<uint32_t>(random.below(16));
      return static_cast<int>(*code) - 8;
    case WeightKind::int8:
      *code = static_cast<uint32_t>(random.below(256));
      return static_cast<int>(*code) - 128;
    case WeightKind::fp4:
      *code = static_cast<uint32_t>(random.below(16));
      return small_float(*code, 2, 1);
    case WeightKind::fp8:
      *code = static_cast<uint32_t>(random.below(2) << 7 | random.below(0x7f));
      return small_float(*code, 4, 3);
    case WeightKind::bf16:
      *code = float_bits(random.normal()) >> 16;
      return small_float(*code, 8, 7);
    case WeightKind::f16:
      // Every tenth is subnormal.
      *code = static_cast<uint32_t>(random.below(2) << 15 | random.below(1024)) |
              static_cast<uint32_t>(random.below(10) ? 12 + random.below(6) : 0) << 10;
      return small_float(*code, 5, 10);
    case WeightKind::f32:
      break;
  }
  const float value = random.normal();
  *code = float_bits(value);
  return value;
}

// A random scale: its bits, the width of these in bytes, its value.
inline double random_scale(ScaleKind kind, Random& random, uint32_t* bits, int* width) {
  const float value = 0.01f + 0.001f * static_cast<float>(random.below(100));
  *bits = float_bits(value);
  switch (kind) {
    case ScaleKind::none:
      *width = 0;
      return 1;
    case ScaleKind::f32:
      *width = 4;
      return value;
    case ScaleKind::bf16:
      *width = 2;
      *bits >>= 16;
      return small_float(*bits, 8, 7);
    case ScaleKind::f16:
      *width = 2;
      *bits = static_cast<uint32_t>(random.below(16) << 10 | random.below(1024));
      return small_float(*bits, 5, 10);
    case ScaleKind::e4m3:
      *width = 1;
      *bits = static_cast<uint32_t>(random.below(0x7f));
      return small_float(*bits, 4, 3);
    case ScaleKind::e8m0:
      break;
  }
  *width = 1;
  *bits = static_cast<uint32_t>(120 + random.below(12));
  return ldexp(1, static_cast<int>(*bits) - 127);
}

struct WeightCase {
  WeightKind kind;
  ScaleKind scale;
  bool shared, zero;
  int N, K, group_size;  // as it is packed
  std::shared_ptr<PackedWeight> packed;
  std::vector<double> values;  // [N][K]
  std::vector<double> scales;  // [N][K], of each value
  std::vector<double> zeros;   // [N][K], of each value

  // `group` is rounded up to whole words; 0 stands for the row.
  WeightCase(WeightKind kind, ScaleKind scale, bool shared, bool zero, int N, int K, int group,
             Random& random)
      : kind(kind), scale(scale), shared(shared), zero(zero), N(N), K(K) {
    const int codes = codes_per_word(kind);
    group_size = group == 0 || group >= K ? K : (group + codes - 1) / codes * codes;
    if (group_size > K) group_size = K;
    packed = std::make_shared<PackedWeight>(kind, N, K, group_size, scale, shared, zero);
    const int groups = static_cast<int>(packed->groups());
    const int row_bytes = static_cast<int>(packed->code_row_bytes());
    // Ones where nothing is stored: the nibble behind an odd K must not count.
    std::vector<uint8_t> bytes(static_cast<size_t>(N * row_bytes), 0xff);
    std::vector<uint8_t> stored_scales;
    std::vector<uint32_t> scale_bits;
    std::vector<int8_t> stored_zeros;
    std::vector<double> group_scales, group_zeros;
    int width = 0;
    for (int n = 0; n < N; ++n) {
      for (int g = 0; g < groups; ++g) {
        uint32_t bits = 0;
        const size_t first = static_cast<size_t>(n / kPanelRows * kPanelRows * groups + g);
        double value = random_scale(scale, random, &bits, &width);
        if (shared && n % kPanelRows != 0) {
          value = group_scales[first];
          bits = scale_bits[first];
        }
        group_scales.push_back(value);
        scale_bits.push_back(bits);
        stored_scales.insert(stored_scales.end(), reinterpret_cast<uint8_t*>(&bits),
                             reinterpret_cast<uint8_t*>(&bits) + width);
        const int limit = kind == WeightKind::int4 ? 8 : 128;
        stored_zeros.push_back(static_cast<int8_t>(zero ? random.below(2 * limit) - limit : 0));
        group_zeros.push_back(stored_zeros.back());
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < K; ++k) {
        uint8_t* row = bytes.data() + n * row_bytes;
        uint32_t code;
        const double value = random_code(kind, random, &code);
        if (codes == 8) {
          row[k / 2] = static_cast<uint8_t>(k % 2 ? (row[k / 2] & 15) | code << 4 : 0xf0 | code);
        } else {
          memcpy(row + k * (4 / codes), &code, 4 / codes);
        }
        const int parameter = n * groups + k / group_size;
        scales.push_back(group_scales[parameter]);
        zeros.push_back(group_zeros[parameter]);
        values.push_back((value - zeros.back()) * scales.back());
      }
    }
    // In two blocks, the second one first.
    const auto fill = [&](int begin, int end) {
      packed->fill(
          begin, end - begin, bytes.data() + begin * row_bytes,
          scale == ScaleKind::none ? nullptr : stored_scales.data() + begin * groups * width,
          zero ? stored_zeros.data() + begin * groups : nullptr);
    };
    const int half = N / 2;
    fill(half, N);
    CHECK(packed->first_missing_row() == (half > 0 ? 0 : N), "of %d rows", N);
    fill(0, half);
    CHECK(packed->first_missing_row() == N, "of %d rows", N);
  }
};

}  // namespace fewbits
