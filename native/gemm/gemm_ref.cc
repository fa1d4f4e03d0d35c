// Plain C++: what the other tiers are tested against, and the tier of every other CPU.
#include "gemm/kernel.h"
#include "gemm/numbers.h"
#include "gemm/rows.h"

namespace fewbits {
namespace {

constexpr float kE2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};

template <WeightKind kind>
float decode(uint32_t word, int j) {
  switch (kind) {
    case WeightKind::int4:
      return static_cast<float>(static_cast<int>(word >> 4 * j & 15) - 8);
    case WeightKind::int8:
      return static_cast<float>(static_cast<int>(word >> 8 * j & 255) - 128);
    case WeightKind::fp4: {
      const float magnitude = kE2m1[word >> 4 * j & 7];
      return word >> 4 * j & 8 ? -magnitude : magnitude;
    }
    case WeightKind::fp8:
      return from_e4m3(word >> 8 * j & 255);
    case WeightKind::bf16:
      return from_bits(word >> 16 * j << 16);
    case WeightKind::f16:
      return from_half(word >> 16 * j & 0xffff);
    case WeightKind::f32:
      return from_bits(word);
  }
}

// x is float32, one value a word. Integers below 2^24 are summed exactly too.
template <WeightKind kind>
void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  constexpr int kCodes = codes_per_word(kind);
  for (int64_t s = 0; s < p.list.count; ++s) {
    const Span span = p.list.spans[s];
    float scale[kPanelRows];
    widen_scales(p.scale_kind, p.scale, p.shared, span.group, 1, scale);
    for (int64_t m = 0; m < rows; ++m) {
      const uint32_t* x = in.values + m * in.value_stride;
      const int64_t place = m * in.span_stride + s;
      const float sum = in.sums ? from_bits(in.sums[place]) : 0;
      float partial[kPanelRows] = {};
      for (int32_t kw = span.word_begin; kw < span.word_end; ++kw) {
        for (int j = 0; j < kCodes; ++j) {
          const float value = from_bits(x[kw * kCodes + j]);
          for (int n = 0; n < kPanelRows; ++n) {
            partial[n] += decode<kind>(p.words[kw * kPanelRows + n], j) * value;
          }
        }
      }
      for (int n = 0; n < kPanelRows; ++n) {
        if (p.zero) {
          partial[n] -= static_cast<float>(p.zero[span.group * kPanelRows + n]) * sum;
        }
        if (in.scales) partial[n] *= in.scales[place];
        totals[m * kPanelRows + n] += scale[n] * partial[n];
      }
    }
  }
}

template <WeightKind kind>
void prepare(const float* x, int64_t K, uint32_t* values) {
  constexpr int64_t kCodes = codes_per_word(kind);
  memcpy(values, x, K * sizeof(float));
  for (int64_t k = K; k % kCodes != 0; ++k) values[k] = 0;
}

template <int codes>
void span_sums(const uint32_t* values, const SpanList& list, uint32_t* sums) {
  for (int64_t s = 0; s < list.count; ++s) {
    const int64_t begin = list.spans[s].word_begin, end = list.spans[s].word_end;
    // Eight sums side by side: one chain of additions would take as long as a small product.
    float lane[8] = {};
    for (int64_t k = begin * codes; k < end * codes; ++k) lane[k & 7] += from_bits(values[k]);
    sums[s] = to_bits(((lane[0] + lane[4]) + (lane[1] + lane[5])) +
                      ((lane[2] + lane[6]) + (lane[3] + lane[7])));
  }
}

template <WeightKind kind>
constexpr bool kSums = kind == WeightKind::int4 || kind == WeightKind::int8;

template <WeightKind kind>
constexpr GemmKernel kKernel = {
    panel<kind>,          prepare<kind>, kSums<kind> ? span_sums<codes_per_word(kind)> : nullptr,
    codes_per_word(kind), kSpanCodes,    false};

}  // namespace

// Products of integers are those of floats here, those of 16-bit ones not exact.
const GemmKernel* gemm_kernel_ref(WeightKind kind, DotKind) {
  switch (kind) {
    case WeightKind::int4:
      return &kKernel<WeightKind::int4>;
    case WeightKind::int8:
      return &kKernel<WeightKind::int8>;
    case WeightKind::fp4:
      return &kKernel<WeightKind::fp4>;
    case WeightKind::fp8:
      return &kKernel<WeightKind::fp8>;
    case WeightKind::bf16:
      return &kKernel<WeightKind::bf16>;
    case WeightKind::f16:
      return &kKernel<WeightKind::f16>;
    case WeightKind::f32:
      return &kKernel<WeightKind::f32>;
  }
  return nullptr;
}

const RowKernels* row_kernels_ref() {
  static constexpr RowKernels kernels = {quantize, finish};
  return &kernels;
}

}  // namespace fewbits
