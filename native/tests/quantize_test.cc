// How x is quantized: codes and scales worked out by hand from the engines' formulas, then every
// tier's against the plain ones, bit for bit.
#include <math.h>
#include <string.h>

#include <limits>
#include <vector>

#include "check.h"
#include "gemm/kernel.h"

namespace fewbits {
namespace {

const RowKernels& kernels() {
#if defined(__x86_64__)
  if (tier() >= Tier::avx512) return *row_kernels_avx512();
  if (tier() >= Tier::avx2) return *row_kernels_avx2();
#endif
  return *row_kernels_ref();
}

struct Quantized {
  std::vector<float> codes, scales;
  float zero = 0;
};

Quantized quantize(const RowKernels& with, const Activation& how, const std::vector<float>& x) {
  const int64_t K = static_cast<int64_t>(x.size());
  const int64_t size = how.group_size ? how.group_size : K;
  Quantized found{std::vector<float>(x.size()), std::vector<float>((K + size - 1) / size)};
  with.quantize(how, x.data(), K, found.codes.data(), found.scales.data(), &found.zero);
  return found;
}

struct Expected {
  Activation how;
  std::vector<float> x, codes, scales;
  float zero = 0;
};

Activation rounded(Quantizer quantizer, ScaleRounding rounding) {
  return {quantizer, 1, 1, 0, 1, rounding};
}

const Expected kExpected[] = {
    // By absmax / 127; by absmax / 127.5 the last code would be -96.
    {{Quantizer::int8_token}, {1, -1, 0.5f, 0.002f, -0.75f}, {127, -127, 64, 0, -95}, {1 / 127.0f}},
    {{Quantizer::int8_token}, {0, 0}, {0, 0}, {0}},
    {{Quantizer::int8_group, 2},
     {0.5f, -1.27f, 0, 0, 3},
     {50, -127, 0, 0, 127},
     {1.27f / 127, 0, 3 / 127.0f}},
    {{Quantizer::int16_group, 2},
     {1, -0.5f, 0, 0, -3e-39f},
     {32512, -16256, 0, 0, 0},
     {1 / 32512.0f, 0x1p-126f, 0x1p-126f}},
    // The range isn't extended to 0, and a row of one value stands as code - zero = 1.
    {{Quantizer::int8_token_asymmetric}, {-1, 0, 1.9f, 3}, {-128, -64, 57, 127}, {4 / 255.0f}, -64},
    {{Quantizer::int8_token_asymmetric}, {2, 3}, {-128, 127}, {1 / 255.0f}, -638},
    {{Quantizer::int8_token_asymmetric}, {-2.5f, -2.5f}, {1, 1}, {-2.5f}},
    {{Quantizer::int8_static, 0, 0.05f}, {0.124f, 0.126f, -7, 6.4f}, {2, 3, -128, 127}, {0.05f}},
    {{Quantizer::int8_static_asymmetric, 0, 0.05f, -10},
     {0.124f, 0.126f, -7, 6.4f},
     {-8, -7, -128, 118},
     {0.05f},
     -10},
    {{Quantizer::fp8_token}, {1, -2, 0.3f, 0.001f}, {224, -448, 64, 0.21875f}, {2 / 448.0f}},
    {{Quantizer::fp8_token}, {0, 0}, {0, 0}, {1.0f / (448 * 512)}},
    // x / s is a midpoint that goes down to 5; x * (1 / s) lies just above it.
    {{Quantizer::fp8_static, 0, 0x1.5cde64p-7f}, {0x1.c9e3e4p-5f}, {5.5f}, {0x1.5cde64p-7f}},
    {{Quantizer::fp8_static, 0, 1}, {1000, -465}, {448, -448}, {1}},
    {{Quantizer::fp8_group, 2},
     {1, -2, 0.5f, 4, 0},
     {224, -448, 56, 448, 0},
     {2 * (1 / 448.0f), 4 * (1 / 448.0f), 1e-10f * (1 / 448.0f)}},
    {{Quantizer::nvfp4, 4, 1, 0, 1 / 672.0}, {1, 0.5f, 0.3f, -0.07f}, {6, 3, 2, -0.5f}, {112}},
    {{Quantizer::nvfp4, 2, 1, 0, 1 / 672.0}, {0, 0}, {0, 0}, {0}},
    {{Quantizer::mxfp4, 4},
     {7, 1, 0.2f, -3, 6.9f, 5.2f, 1, -3.5f},
     {4, 0.5f, 0, -1.5f, 6, 6, 1, -4},
     {2, 1}},
    {{Quantizer::mxfp4, 1}, {1.74f, 1.75f, 0}, {6, 4, 0}, {0.25f, 0.5f, 0x1p-127f}},
    {{Quantizer::mxfp6, 1}, {6.99f, 7.9f, 450}, {7, 4, 7}, {1, 2, 64}},
    {{Quantizer::mxfp6e3m2, 1}, {27.9f, 30, 3.4f}, {28, 16, 28}, {1, 2, 0.125f}},
    {{Quantizer::mxfp6e3m2, 4}, {16, 0.1f, 0.16f, -2.3f}, {16, 0.125f, 0.1875f, -2.5f}, {1}},
    {rounded(Quantizer::mxfp4, ScaleRounding::floor), {7.9f, 4}, {6, 4}, {1, 1}},
    {rounded(Quantizer::mxfp4, ScaleRounding::ceil), {4.1f, 4}, {2, 4}, {2, 1}},
    {rounded(Quantizer::mxfp6, ScaleRounding::ceil), {5, 0}, {2.5f, 0}, {2, 0x1p-127f}},
    {{Quantizer::mxfp8, 1}, {448, 450, 1.75f}, {448, 224, 448}, {1, 2, 0x1p-8f}},
};

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !(isnan(a[i]) && isnan(b[i]))) return false;
  }
  return a.size() == b.size();
}

void test_by_hand() {
  for (const Expected& expected : kExpected) {
    const int quantizer = static_cast<int>(expected.how.quantizer);
    const Quantized found = quantize(kernels(), expected.how, expected.x);
    for (size_t i = 0; i < found.codes.size(); ++i) {
      CHECK(found.codes[i] == expected.codes[i], "quantizer %d: %g becomes %g instead of %g",
            quantizer, expected.x[i], found.codes[i], expected.codes[i]);
    }
    for (size_t i = 0; i < found.scales.size(); ++i) {
      CHECK(found.scales[i] == expected.scales[i], "quantizer %d: scale %a instead of %a",
            quantizer, found.scales[i], expected.scales[i]);
    }
    CHECK(found.zero == expected.zero, "quantizer %d: zero point %g", quantizer, found.zero);
  }
}

// Rows of any size and of the extremes that float32 has, midpoints between codes among them.
std::vector<float> random_row(Random& random) {
  std::vector<float> x(static_cast<size_t>(1 + random.below(300)));
  const float size = ldexpf(1, random.below(80) - 40);
  for (float& value : x) {
    const float normal = random.normal();
    value = size * (random.below(4) ? normal : rintf(normal * 16) / 16);
  }
  const float extremes[] = {
      0, -0.0f, 1e-45f, -1e-39f, 3e38f, -3e38f, std::numeric_limits<float>::infinity(), NAN};
  if (random.below(4) == 0) x[random.below(static_cast<int>(x.size()))] = extremes[random.below(8)];
  return x;
}

void test_against_plain() {
  Random random(3);
  for (int quantizer = 1; quantizer <= static_cast<int>(Quantizer::mxfp8); ++quantizer) {
    const Quantizer kind = static_cast<Quantizer>(quantizer);
    const bool grouped = kind == Quantizer::int8_group || kind == Quantizer::int16_group ||
                         kind >= Quantizer::fp8_group;
    for (int i = 0; i < 2000; ++i) {
      if (skip_case()) continue;
      const std::vector<float> x = random_row(random);
      Activation how{kind};
      how.group_size = grouped ? 1 + random.below(64) : 0;
      how.scale = 0.001f + 0.01f * static_cast<float>(random.below(100));
      how.zero = static_cast<float>(random.below(256) - 128);
      how.global_scale = 1.0 / (1 + random.below(5000));
      how.scale_rounding = static_cast<ScaleRounding>(random.below(3));
      const Quantized found = quantize(kernels(), how, x),
                      plain = quantize(*row_kernels_ref(), how, x);
      CHECK(same(found.scales, plain.scales) && same({found.zero}, {plain.zero}),
            "quantizer %d has other scales than plain C++", quantizer);
      // What a NaN or an infinity makes of an integer code, its scale says.
      CHECK(same(found.codes, plain.codes), "quantizer %d has other codes than plain C++",
            quantizer);
    }
  }
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  skip_unsupported_tier();
  test_by_hand();
  test_against_plain();
}
