// Products of every kind against float64, and the bits of a row against those of the same row
// alone.
#include "gemm/gemm.h"

#include <math.h>
#include <string.h>

#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "threads.h"

namespace fewbits {
namespace {

struct Shape {
  WeightKind kind;
  int N, K, group_size;
  bool zero;
};

const Shape kShapes[] = {
    {WeightKind::int4, 1, 1, 1, false},         {WeightKind::int4, 64, 256, 32, true},
    {WeightKind::int4, 70, 203, 203, true},     {WeightKind::int4, 130, 1100, 1100, false},
    {WeightKind::int4, 63, 1048, 8, true},      {WeightKind::int4, 65, 650, 40, false},
    {WeightKind::int8, 1, 3, 3, true},          {WeightKind::int8, 64, 256, 32, true},
    {WeightKind::int8, 129, 1031, 1031, false}, {WeightKind::int8, 17, 1030, 4, true},
    {WeightKind::bf16, 66, 1, 1, false},        {WeightKind::bf16, 31, 1029, 1029, false},
    {WeightKind::f16, 66, 515, 515, false},     {WeightKind::f16, 129, 64, 64, false},
    {WeightKind::f32, 66, 513, 513, false},     {WeightKind::f32, 5, 2, 2, false},
};

// A weight, and what it stands for.
struct Case {
  std::shared_ptr<PackedWeight> packed;
  std::vector<double> values;  // [N][K]
};

float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

double half_value(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const double magnitude =
      exponent ? ldexp(1024 + (half & 1023), exponent - 25) : ldexp(half & 1023, -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

Case make_case(const Shape& shape, Random& random) {
  const auto [kind, N, K, group_size, zero] = shape;
  Case result{std::make_shared<PackedWeight>(kind, N, K, group_size, zero), {}};
  const int64_t row_bytes = result.packed->code_row_bytes();
  const int groups = static_cast<int>(result.packed->groups());
  // Ones where nothing is stored: the nibble behind an odd K must not count.
  std::vector<uint8_t> codes(N * row_bytes, 0xff);
  std::vector<float> scales, zeros;
  for (int i = 0; i < N * groups && result.packed->quantized(); ++i) {
    scales.push_back(0.01f + 0.001f * static_cast<float>(random.below(100)));
    zeros.push_back(static_cast<float>(random.below(kind == WeightKind::int4 ? 16 : 256)));
  }
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < K; ++k) {
      uint8_t* row = codes.data() + n * row_bytes;
      const int parameter = n * groups + k / group_size;
      double value = 0;
      if (kind == WeightKind::int4) {
        const int code = random.below(16);
        row[k / 2] = static_cast<uint8_t>(k % 2 ? (row[k / 2] & 15) | code << 4 : 0xf0 | code);
        value = (code - (zero ? zeros[parameter] : 8.0)) * scales[parameter];
      } else if (kind == WeightKind::int8) {
        row[k] = static_cast<uint8_t>(random.below(256));
        value = (row[k] - (zero ? zeros[parameter] : 128.0)) * scales[parameter];
      } else if (kind == WeightKind::f32) {
        const float weight = random.normal();
        memcpy(row + 4 * k, &weight, 4);
        value = weight;
      } else if (kind == WeightKind::bf16) {
        const float weight = random.normal();
        uint32_t bits;
        memcpy(&bits, &weight, 4);
        const uint16_t high = static_cast<uint16_t>(bits >> 16);
        memcpy(row + 2 * k, &high, 2);
        value = bits_to_float(bits & 0xffff0000);
      } else {
        // Every tenth is subnormal.
        const int exponent = random.below(10) ? 12 + random.below(6) : 0;
        const uint16_t half =
            static_cast<uint16_t>(random.below(2) << 15 | exponent << 10 | random.below(1024));
        memcpy(row + 2 * k, &half, 2);
        value = half_value(half);
      }
      result.values.push_back(value);
    }
  }
  // In two blocks, the second one first.
  const int half = N / 2;
  const auto fill = [&](int begin, int end) {
    const bool quantized = result.packed->quantized();
    result.packed->fill(begin, end - begin, codes.data() + begin * row_bytes,
                        quantized ? scales.data() + begin * groups : nullptr,
                        zero ? zeros.data() + begin * groups : nullptr);
  };
  fill(half, N);
  CHECK(result.packed->first_missing_row() == (half > 0 ? 0 : N), "of %d rows", N);
  fill(0, half);
  CHECK(result.packed->first_missing_row() == N, "of %d rows", N);
  return result;
}

// x [M][K] between NaNs, and y [M][N] between guards.
struct Rows {
  Rows(int M, int K, int N)
      : M(M), K(K), N(N), x_(M * K + 2 * kGuard, NAN), y_(M * N + 2 * kGuard, kUntouched) {}
  float* x() { return x_.data() + kGuard; }
  float* y() { return y_.data() + kGuard; }
  void check_guards() const {
    for (int i = 0; i < kGuard; ++i) {
      CHECK(y_[i] == kUntouched && y_[y_.size() - 1 - i] == kUntouched, "written outside of y");
    }
  }
  static constexpr int kGuard = 64;
  static constexpr float kUntouched = -12345;
  int M, K, N;

 private:
  std::vector<float> x_, y_;
};

// The largest relative error of rounding to the eight significant bits of bfloat16.
constexpr double kBf16 = 0x1p-8;

void check_values(const Shape& shape, const Case& c, Rows& rows) {
  const bool rounds =
      tier() == Tier::avx512_bf16 && shape.kind != WeightKind::f16 && shape.kind != WeightKind::f32;
  for (int m = 0; m < rows.M; ++m) {
    for (int n = 0; n < rows.N; ++n) {
      double exact = 0, norm = 0;
      for (int k = 0; k < rows.K; ++k) {
        const double product = c.values[n * rows.K + k] * rows.x()[m * rows.K + k];
        exact += product;
        norm += fabs(product);
      }
      // The codes themselves, not their distance from the zero point, are what float32 sums: up to
      // 2^bits / 2 times x.
      double code_norm = 0;
      if (c.packed->quantized()) {
        for (int k = 0; k < rows.K; ++k) code_norm += fabs(rows.x()[m * rows.K + k]);
        code_norm *= 0.11 * (shape.kind == WeightKind::int4 ? 160 : 256);
      }
      const double bound =
          (rounds ? kBf16 : 0) * norm + 4 * sqrt(rows.K + 16) * 0x1p-24 * (norm + code_norm);
      const double error = fabs(rows.y()[m * rows.N + n] - exact);
      CHECK(error <= bound, "kind %d, %d x %d, group %d: y[%d, %d] is off by %g, bound %g",
            static_cast<int>(shape.kind), shape.N, shape.K, shape.group_size, m, n, error, bound);
    }
  }
}

void run(const Gemm& gemm, const float* x, int M, float* y, bool add = false) {
  gemm.run(x, M, &y, add);
}

void test_shape(const Shape& shape) {
  Random random(shape.N * 1000 + shape.K);
  const Case c = make_case(shape, random);
  std::vector<float> bias(shape.N);
  for (float& b : bias) b = random.normal();
  const Gemm gemm({c.packed}, {{}});
  const Gemm biased({c.packed}, {bias});
  constexpr int kRows = kMaxRows + 13;
  Rows rows(kRows, shape.K, shape.N);
  for (int i = 0; i < kRows * shape.K; ++i) rows.x()[i] = random.normal();
  set_thread_count(1);
  run(gemm, rows.x(), kRows, rows.y());
  rows.check_guards();
  check_values(shape, c, rows);

  // Every row alone, and as one of a few, has the bits that it has among many.
  for (int threads = 1; threads <= 4; threads += 3) {
    set_thread_count(threads);
    for (const int M :
         {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 31, 100, kMaxRows, kMaxRows + 1}) {
      Rows part(M, shape.K, shape.N);
      for (int m = 0; m + M <= kRows; m += kRows / 3) {
        memcpy(part.x(), rows.x() + m * shape.K, sizeof(float) * M * shape.K);
        run(gemm, part.x(), M, part.y());
        part.check_guards();
        CHECK(memcmp(part.y(), rows.y() + m * shape.N, sizeof(float) * M * shape.N) == 0,
              "kind %d, %d x %d: rows %d to %d with %d threads have other bits",
              static_cast<int>(shape.kind), shape.N, shape.K, m, m + M, threads);
      }
    }
  }

  Rows sum(2, shape.K, shape.N);
  memcpy(sum.x(), rows.x(), sizeof(float) * 2 * shape.K);
  for (int i = 0; i < 2 * shape.N; ++i) sum.y()[i] = 3;
  run(biased, sum.x(), 2, sum.y(), true);
  for (int i = 0; i < 2 * shape.N; ++i) {
    const float expected = 3.0f + (rows.y()[i] + bias[i % shape.N]);
    CHECK(sum.y()[i] == expected, "bias and residual: %g instead of %g", sum.y()[i], expected);
  }
}

// Weights of several kinds and groups in one call: each as it is alone.
void test_fused() {
  Random random(7);
  constexpr int K = 640, M = 5;
  std::vector<std::shared_ptr<const PackedWeight>> weights;
  std::vector<float> x(M * K);
  for (float& value : x) value = random.normal();
  std::vector<std::vector<float>> together, alone;
  for (const Shape& shape :
       {Shape{WeightKind::int4, 100, K, 32, true}, Shape{WeightKind::int4, 64, K, 128, false},
        Shape{WeightKind::int4, 30, K, 32, false}, Shape{WeightKind::int8, 70, K, 32, true},
        Shape{WeightKind::bf16, 9, K, K, false}, Shape{WeightKind::f16, 200, K, K, false}}) {
    const Case c = make_case(shape, random);
    weights.push_back(c.packed);
    together.emplace_back(M * shape.N);
    alone.emplace_back(M * shape.N);
    run(Gemm({c.packed}, {{}}), x.data(), M, alone.back().data());
  }
  std::vector<float*> y;
  for (auto& one : together) y.push_back(one.data());
  Gemm(weights, std::vector<std::vector<float>>(weights.size())).run(x.data(), M, y.data(), false);
  for (size_t i = 0; i < weights.size(); ++i) {
    CHECK(memcmp(together[i].data(), alone[i].data(), sizeof(float) * alone[i].size()) == 0,
          "weight %zu has other bits in a fused call", i);
  }
}

// A row that isn't finite stays a matter of its own.
void test_company() {
  Random random(8);
  const Case c = make_case({WeightKind::int4, 70, 96, 32, true}, random);
  const Gemm gemm({c.packed}, {{}});
  Rows clean(7, 96, 70), dirty(7, 96, 70);
  for (int i = 0; i < 7 * 96; ++i) clean.x()[i] = dirty.x()[i] = random.normal();
  dirty.x()[3 * 96 + 5] = NAN;
  dirty.x()[6 * 96 + 95] = std::numeric_limits<float>::infinity();
  run(gemm, clean.x(), 7, clean.y());
  run(gemm, dirty.x(), 7, dirty.y());
  for (const int m : {0, 1, 2, 4, 5}) {
    CHECK(memcmp(clean.y() + m * 70, dirty.y() + m * 70, sizeof(float) * 70) == 0, "row %d", m);
  }
  CHECK(isnan(dirty.y()[3 * 70]), "a NaN in x is lost");
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  skip_unsupported_tier();
  for (const Shape& shape : kShapes) test_shape(shape);
  test_fused();
  test_company();
}
