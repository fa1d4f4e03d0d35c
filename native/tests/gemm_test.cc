// Products of every kind against double precision, and the bits of a row against those of the same
// row alone.
#include "gemm/gemm.h"

#include <math.h>
#include <string.h>

#include <limits>
#include <numeric>

#include "check.h"
#include "elementwise/elementwise.h"
#include "gemm_case.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr WeightKind kKinds[] = {WeightKind::int4, WeightKind::int8, WeightKind::fp4,
                                 WeightKind::fp8,  WeightKind::bf16, WeightKind::f16,
                                 WeightKind::f32};
constexpr ScaleKind kScales[] = {ScaleKind::none, ScaleKind::f32,  ScaleKind::bf16,
                                 ScaleKind::f16,  ScaleKind::e4m3, ScaleKind::e8m0};

struct Shape {
  int N, K, group;  // 0: the whole row
};

constexpr Shape kShapes[] = {
    {1, 1, 0},     {64, 256, 32}, {70, 203, 0},   {3, 2, 0},    {63, 136, 8},
    {65, 650, 40}, {33, 30, 2},   {129, 1031, 0}, {17, 530, 4}, {31, 515, 128},
    {66, 513, 0},  {128, 40, 24}, {1, 1100, 520}, {3, 4300, 0},
};
constexpr int kShapeCount = sizeof kShapes / sizeof kShapes[0];

// Groups of x whose borders aren't those of the weights' groups cut the spans once more.
const Activation kActivations[] = {
    {},
    {Quantizer::int8_token},
    {Quantizer::int8_token_asymmetric},
    {Quantizer::int8_static, 0, 0.03f},
    {Quantizer::int8_static_asymmetric, 0, 0.02f, -17},
    {Quantizer::int8_group, 24},
    {Quantizer::int8_group, 2048},
    {Quantizer::int16_group, 128},
    {Quantizer::int16_group, 40},
    {Quantizer::fp8_token},
    {Quantizer::fp8_static, 0, 0.01f},
    {Quantizer::fp8_group, 40},
    {Quantizer::nvfp4, 16, 1, 0, 1.0 / 300},
    {Quantizer::mxfp4, 32},
    {Quantizer::mxfp6, 8},
    {Quantizer::mxfp6e3m2, 32},
    {Quantizer::mxfp8, 64},
};

bool is_integer(WeightKind kind) { return kind == WeightKind::int4 || kind == WeightKind::int8; }

// Whether there are products of a kind with x taken so.
bool allowed(WeightKind kind, const Activation& activation) {
  return activation.quantizer != Quantizer::int16_group || is_integer(kind);
}

bool int8_products(const WeightCase& weight, const Activation& activation) {
  return is_integer(weight.kind) && activation.quantizer >= Quantizer::int8_token &&
         activation.quantizer <= Quantizer::int8_group;
}

bool int16_products(const WeightCase& weight, const Activation& activation) {
  return is_integer(weight.kind) && activation.quantizer == Quantizer::int16_group;
}

// Whether this tier multiplies bfloat16.
bool rounds(WeightKind kind) {
  return tier() == Tier::avx512_bf16 && kind != WeightKind::f16 && kind != WeightKind::f32;
}

// What decoding leaves in the codes.
double offset_of(const WeightCase& weight, const Activation& activation) {
  const bool wide = int16_products(weight, activation);
  if (weight.kind == WeightKind::int4) return wide ? 8 : rounds(weight.kind) ? 136 : 0;
  return weight.kind == WeightKind::int8 && (wide || rounds(weight.kind)) ? 128 : 0;
}

float to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  memcpy(&value, &rounded, sizeof value);
  return value;
}

// x [M][K] between NaNs, and y [M][N] between guards.
struct Rows {
  Rows(int M, int K, int N)
      : M(M), K(K), N(N), x_(M * K + 2 * kGuard, NAN), y_(M * N + 2 * kGuard, kUntouched) {}
  float* x() { return x_.data() + kGuard; }
  float* y() { return y_.data() + kGuard; }
  void fill_x(Random& random) {
    for (int i = 0; i < M * K; ++i) x()[i] = random.normal();
  }
  void run(const Gemm& gemm, bool add = false) {
    run(gemm, {RowSource::Kind::plain, x(), nullptr}, add);
  }
  void run(const Gemm& gemm, const RowSource& source, bool add = false) {
    float* const out = y();
    gemm.run(source, M, &out, add);
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

std::shared_ptr<Product> make_product(const WeightCase& weight, Activation activation, bool ordered,
                                      bool biased, Random& random) {
  auto product = std::make_shared<Product>();
  product->weight = weight.packed;
  const int codes = codes_per_word(weight.kind);
  activation.group_size = (activation.group_size + codes - 1) / codes * codes;
  product->activation = activation;
  product->multiplier = ordered ? 0.37 : 1;
  for (int k = 0; ordered && k < weight.K; ++k) product->order.push_back(k);
  for (int k = weight.K - 1; ordered && k > 0; --k) {
    std::swap(product->order[k], product->order[random.below(k + 1)]);
  }
  for (int n = 0; n < weight.N; ++n) {
    if (biased) product->bias.push_back(random.normal());
    const double* row = weight.values.data() + n * weight.K;
    product->row_sums.push_back(static_cast<float>(std::accumulate(row, row + weight.K, 0.0)));
  }
  return product;
}

// A row of x as the definition takes it: its value for each stored column, and the size of what
// zero points of x subtract again.
struct ExactRow {
  std::vector<double> values;
  double zero = 0;
};

ExactRow exact_row(const Product& product, WeightKind kind, const float* x, int K) {
  std::vector<float> line(x, x + K), codes(K), scales(K + 1, 1);
  for (int k = 0; k < K && !product.order.empty(); ++k) line[k] = x[product.order[k]];
  const Activation& activation = product.activation;
  float zero = 0;
  if (activation.quantizer == Quantizer::none) {
    for (int k = 0; k < K; ++k) codes[k] = rounds(kind) ? to_bf16(line[k]) : line[k];
  } else {
    row_kernels_ref()->quantize(activation, line.data(), K, codes.data(), scales.data(), &zero);
  }
  const int64_t size = activation.group_size ? activation.group_size : K;
  ExactRow row;
  for (int k = 0; k < K; ++k) {
    row.values.push_back((double{codes[k]} - zero) * scales[k / size] * activation.global_scale);
  }
  row.zero = fabs(double{zero} * scales[0]);
  return row;
}

void check_values(const WeightCase& w, const Product& product, Rows& rows) {
  const bool exact_partials = int8_products(w, product.activation);
  const int64_t x_group = product.activation.group_size ? product.activation.group_size : w.K;
  const double spans = w.K / w.group_size + w.K / x_group + w.K / kSpanCodes + 3;
  const double chain = exact_partials ? spans : w.K;
  const double offset = offset_of(w, product.activation);
  for (int m = 0; m < rows.M; ++m) {
    const ExactRow x = exact_row(product, w.kind, rows.x() + m * w.K, w.K);
    for (int n = 0; n < w.N; ++n) {
      double exact = 0, norm = 0;
      for (int k = 0; k < w.K; ++k) {
        const int place = n * w.K + k;
        exact += x.values[k] * w.values[place];
        norm += (fabs(x.values[k]) + x.zero) * fabs(w.values[place]);
        if (!exact_partials) {
          // Codes and zero points meet in the sums.
          norm += 2 * fabs(x.values[k]) * (fabs(w.zeros[place]) + offset) * w.scales[place];
        }
      }
      exact *= product.multiplier;
      norm *= product.multiplier;
      const double bias = product.bias.empty() ? 0 : product.bias[n];
      const double bound = (4 * sqrt(chain + 16) * norm + 2 * fabs(bias)) * 0x1p-24;
      const double error = fabs(rows.y()[m * w.N + n] - (exact + bias));
      CHECK(error <= bound,
            "kind %d, scale %d, zero %d, %d x %d, group %d, quantizer %d: y[%d, %d] of %d rows is "
            "off by %g, bound %g",
            static_cast<int>(w.kind), static_cast<int>(w.scale), w.zero, w.N, w.K, w.group_size,
            static_cast<int>(product.activation.quantizer), m, n, rows.M, error, bound);
    }
  }
}

void test_values() {
  Random random(5);
  int step = 0;
  for (const WeightKind kind : kKinds) {
    const bool integer = is_integer(kind);
    for (const ScaleKind scale : kScales) {
      for (int flags = 0; flags < (integer ? 4 : 2); ++flags) {
        for (int repeat = 0; repeat < 3; ++repeat, ++step) {
          const Shape& shape = kShapes[step % kShapeCount];
          const WeightCase weight(kind, scale, flags % 2, flags / 2, shape.N, shape.K, shape.group,
                                  random);
          for (const Activation& activation : kActivations) {
            if (!allowed(kind, activation) || skip_case()) continue;
            const bool ordered = random.below(2), biased = random.below(2);
            const auto product = make_product(weight, activation, ordered, biased, random);
            Rows rows(1 + random.below(9), shape.K, shape.N);
            rows.fill_x(random);
            rows.run(Gemm({product}));
            check_values(weight, *product, rows);
          }
        }
      }
    }
  }
}

// Every row alone, and as one of a few, has the bits that it has among many.
void test_bits(const WeightCase& weight, const Activation& activation, Random& random) {
  const int K = weight.K, N = weight.N;
  const auto product = make_product(weight, activation, false, false, random);
  const Gemm gemm({product});
  constexpr int kRows = kMaxRows + 13;
  Rows rows(kRows, K, N);
  rows.fill_x(random);
  set_thread_count(1);
  rows.run(gemm);
  if (!skip_case()) check_values(weight, *product, rows);
  for (int threads = 1; threads <= 4; ++threads) {
    set_thread_count(threads);
    for (const int M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 31, 100, kMaxRows, kRows}) {
      if (threads % 3 != 1 && M != 13 && M != kRows) continue;
      Rows part(M, K, N);
      for (int m = 0; m + M <= kRows; m += kRows / 3) {
        if (skip_case()) continue;
        memcpy(part.x(), rows.x() + m * K, sizeof(float) * M * K);
        part.run(gemm);
        CHECK(memcmp(part.y(), rows.y() + m * N, sizeof(float) * M * N) == 0,
              "kind %d, %d x %d, quantizer %d: rows %d to %d with %d threads have other bits",
              static_cast<int>(weight.kind), N, K, static_cast<int>(activation.quantizer), m, m + M,
              threads);
      }
    }
  }
  set_thread_count(2);
}

void test_bits() {
  Random random(6);
  for (const WeightKind kind : kKinds) {
    const bool integer = is_integer(kind);
    const WeightCase fine(kind, ScaleKind::f32, false, integer, 70, 333, 16, random);
    const WeightCase coarse(kind, ScaleKind::bf16, true, false, 65, 530, 0, random);
    test_bits(fine, {}, random);
    test_bits(coarse, {}, random);
    test_bits(coarse, {Quantizer::int8_token}, random);
    if (integer) test_bits(fine, {Quantizer::int16_group, 128}, random);
    test_bits(fine, {Quantizer::int8_token_asymmetric}, random);
    test_bits(fine, {Quantizer::int8_group, 40}, random);
    test_bits(coarse, {Quantizer::nvfp4, 16, 1, 0, 1.0 / 300}, random);
  }
  // Whole groups of two words, which have a pass of their own, and at the end a shorter one.
  const WeightCase small(WeightKind::fp4, ScaleKind::e4m3, false, false, 130, 1048, 16, random);
  test_bits(small, {}, random);
  test_bits(small, {Quantizer::nvfp4, 16, 1, 0, 1.0 / 300}, random);
}

void test_bias_and_residual() {
  Random random(9);
  const WeightCase weight(WeightKind::int4, ScaleKind::f16, false, true, 70, 96, 32, random);
  const auto product = make_product(weight, {}, false, true, random);
  auto plain = std::make_shared<Product>(*product);
  plain->bias.clear();
  Rows rows(5, 96, 70), sum(5, 96, 70);
  rows.fill_x(random);
  memcpy(sum.x(), rows.x(), sizeof(float) * 5 * 96);
  rows.run(Gemm({plain}));
  for (int i = 0; i < 5 * 70; ++i) sum.y()[i] = 3;
  sum.run(Gemm({product}), true);
  for (int i = 0; i < 5 * 70; ++i) {
    const float expected = 3.0f + (rows.y()[i] + product->bias[i % 70]);
    CHECK(sum.y()[i] == expected, "bias and residual: %g instead of %g", sum.y()[i], expected);
  }
}

const Activation kFewActivations[] = {{}, {Quantizer::int8_token}, {Quantizer::mxfp8, 32}};

// Products of all kinds in one call, some of which take x alike: each as it is alone.
void test_fused() {
  Random random(7);
  constexpr int K = 256, M = 5;
  std::vector<std::shared_ptr<const Product>> products;
  std::vector<std::vector<float>> together, alone;
  Rows rows(M, K, 1);
  rows.fill_x(random);
  int N = 9;
  for (const WeightKind kind : kKinds) {
    const bool integer = is_integer(kind);
    for (const Activation& activation : kFewActivations) {
      for (int flags = 0; flags < 8; ++flags) {
        const bool zero = integer && flags & 1, ordered = flags & 2;
        const int group = flags & 4 ? 32 : 0;
        const WeightCase weight(kind, ScaleKind::f32, false, zero, N, K, group, random);
        products.push_back(make_product(weight, activation, ordered, false, random));
        together.emplace_back(M * N);
        alone.emplace_back(M * N);
        float* const y = alone.back().data();
        Gemm({products.back()}).run({RowSource::Kind::plain, rows.x(), nullptr}, M, &y, false);
        N = N % 70 + 13;
      }
    }
  }
  std::vector<float*> y;
  for (auto& one : together) y.push_back(one.data());
  Gemm(products).run({RowSource::Kind::plain, rows.x(), nullptr}, M, y.data(), false);
  for (size_t i = 0; i < products.size(); ++i) {
    CHECK(memcmp(together[i].data(), alone[i].data(), sizeof(float) * alone[i].size()) == 0,
          "product %zu has other bits in a fused call", i);
  }
}

// Products that take their own parts of a row have the bits of each alone, added or not.
void test_apart() {
  Random random(7);
  const int M = 67;  // more than one block of rows
  std::vector<std::shared_ptr<const Product>> products;
  std::vector<std::vector<float>> inputs;
  int K = 48, N = 9, width = 0, height = 0;
  for (const WeightKind kind : kKinds) {
    for (const Activation& activation : kFewActivations) {
      const WeightCase weight(kind, ScaleKind::f32, false, false, N, K, 0, random);
      products.push_back(make_product(weight, activation, false, N % 2 == 1, random));
      inputs.emplace_back();
      for (int i = 0; i < M * K; ++i) inputs.back().push_back(random.normal());
      width += K;
      height += N;
      N = N % 140 + 13;
      K = K % 200 + 16;
    }
  }
  Rows rows(M, width, height);
  int begin = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const int K = static_cast<int>(products[i]->weight->K());
    for (int m = 0; m < M; ++m) {
      memcpy(rows.x() + m * width + begin, inputs[i].data() + m * K, K * sizeof(float));
    }
    begin += K;
  }
  const Gemm gemm(products, Gemm::Parts::apart);
  CHECK(gemm.K() == width && gemm.size() == 1, "K %d", static_cast<int>(gemm.K()));
  for (const bool add : {false, true}) {
    for (int i = 0; i < M * height; ++i) rows.y()[i] = 0.5f;
    rows.run(gemm, add);
    begin = 0;
    for (size_t i = 0; i < products.size(); ++i) {
      const int N = static_cast<int>(products[i]->weight->N());
      std::vector<float> alone(M * N, 0.5f);
      float* const y = alone.data();
      Gemm({products[i]}).run({RowSource::Kind::plain, inputs[i].data(), nullptr}, M, &y, add);
      for (int m = 0; m < M; ++m) {
        CHECK(memcmp(rows.y() + m * height + begin, y + m * N, N * sizeof(float)) == 0,
              "product %zu has other bits with parts of its own, row %d", i, m);
      }
      begin += N;
    }
  }
}

// Rows that are computed on the way into a product have the bits of rows computed before it.
void test_computed_rows() {
  Random random(12);
  constexpr int N = 70, K = 1100;
  const WeightCase weight(WeightKind::int8, ScaleKind::f32, false, false, N, K, 0, random);
  std::vector<float> other(K * kMaxRows * 2);
  for (float& value : other) value = random.normal();
  for (const Activation& activation : kFewActivations) {
    if (!allowed(WeightKind::int8, activation)) continue;
    const Gemm gemm({make_product(weight, activation, true, false, random)});
    for (const int M : {1, 2, 7, 40, kMaxRows + 3}) {
      Rows source(M, K, N), norm(M, K, N), gated(M, K, N);
      source.fill_x(random);
      rms_norm(source.x(), other.data(), norm.x(), M, K, 1e-5f, 1);
      const Gating gating = {M % 2 ? Gating::Kind::silu : Gating::Kind::swiglu_oai,
                             M % 3 ? 0.5f : 0};
      fewbits::gated(source.x(), other.data(), gated.x(), M, K, gating);
      norm.run(gemm);
      gated.run(gemm);
      source.run(gemm, {RowSource::Kind::rms_norm, source.x(), other.data(), 1e-5f, 1});
      CHECK(memcmp(source.y(), norm.y(), sizeof(float) * M * N) == 0, "%d rows of a norm", M);
      source.run(gemm, {RowSource::Kind::gated, source.x(), other.data(), 0, 0, gating});
      CHECK(memcmp(source.y(), gated.y(), sizeof(float) * M * N) == 0, "%d gated rows", M);
    }
  }
}

// Scales of all codes, NaN and the numbers below zero too: x is one, and so are the weight's codes.
void test_scales_of_eight_bits() {
  constexpr int N = 256, K = 32;
  for (const ScaleKind kind : {ScaleKind::e4m3, ScaleKind::e8m0}) {
    const auto weight =
        std::make_shared<PackedWeight>(WeightKind::fp4, N, K, K, kind, false, false);
    const std::vector<uint8_t> codes(static_cast<size_t>(N * weight->code_row_bytes()), 0x22);
    std::vector<uint8_t> scales(N);
    for (int n = 0; n < N; ++n) scales[n] = static_cast<uint8_t>(n);
    weight->fill(0, N, codes.data(), scales.data(), nullptr);
    auto product = std::make_shared<Product>();
    product->weight = weight;
    Rows rows(1, K, N);
    rows.x()[0] = 1;
    for (int k = 1; k < K; ++k) rows.x()[k] = 0;
    rows.run(Gemm({product}));
    for (int n = 0; n < N; ++n) {
      const bool e4m3 = kind == ScaleKind::e4m3;
      const bool nan = e4m3 ? n % 128 == 127 : n == 255;
      const double expected =
          e4m3 ? small_float(static_cast<uint32_t>(n), 4, 3) : ldexp(1, n - 127);
      CHECK(nan ? isnan(rows.y()[n]) : rows.y()[n] == expected, "scale %d of kind %d makes %g", n,
            static_cast<int>(kind), rows.y()[n]);
    }
  }
}

// A row that isn't finite stays a matter of its own, and shows.
void test_company() {
  Random random(8);
  constexpr int N = 70, K = 96;
  for (const WeightKind kind : kKinds) {
    const WeightCase weight(kind, ScaleKind::f32, false, kind == WeightKind::int4, N, K, 32,
                            random);
    for (const Activation& activation : kActivations) {
      if (!allowed(kind, activation)) continue;
      const Gemm gemm({make_product(weight, activation, false, false, random)});
      Rows clean(7, K, N), dirty(7, K, N);
      clean.fill_x(random);
      memcpy(dirty.x(), clean.x(), sizeof(float) * 7 * K);
      dirty.x()[3 * K + 5] = NAN;
      dirty.x()[6 * K + 95] = std::numeric_limits<float>::infinity();
      clean.run(gemm);
      dirty.run(gemm);
      for (const int m : {0, 1, 2, 4, 5}) {
        CHECK(memcmp(clean.y() + m * N, dirty.y() + m * N, sizeof(float) * N) == 0, "row %d", m);
      }
      CHECK(isnan(dirty.y()[3 * N]), "kind %d, quantizer %d: a NaN in x is lost",
            static_cast<int>(kind), static_cast<int>(activation.quantizer));
    }
  }
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  skip_unsupported_tier();
  test_values();
  test_bias_and_residual();
  test_fused();
  test_apart();
  test_computed_rows();
  test_scales_of_eight_bits();
  test_company();
  test_bits();
}
