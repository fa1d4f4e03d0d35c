// Plain C++: what the other tiers are tested against, and the tier of every other CPU.
#include <string.h>

#include "gemm/kernel.h"

namespace fewbits {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | magnitude << 13);
  // The exponent is rebiased by an exact product, which gives subnormal halves their value too.
  constexpr float kTwoTo112 = 5192296858534827628530496329220096.0f;
  return bits_to_float(sign | 0x3f800000) * (bits_to_float(magnitude << 13) * kTwoTo112);
}

template <WeightKind kind>
float decode(uint32_t word, int j) {
  switch (kind) {
    case WeightKind::int4:
      return static_cast<float>(static_cast<int>(word >> 4 * j & 15) - 8);
    case WeightKind::int8:
      return static_cast<float>(static_cast<int>(word >> 8 * j & 255) - 128);
    case WeightKind::bf16:
      return bits_to_float(word >> 16 * j << 16);
    case WeightKind::f16:
      return half_to_float(word >> 16 * j & 0xffff);
    case WeightKind::f32:
      return bits_to_float(word);
  }
}

template <WeightKind kind>
void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  constexpr int kCodes = codes_per_word(kind);
  for (int64_t s = 0; s < p.list.count; ++s) {
    const Span span = p.list.spans[s];
    const float* scale = p.scale + span.group * kPanelRows;
    const float* zero = p.zero ? p.zero + span.group * kPanelRows : nullptr;
    for (int64_t m = 0; m < rows; ++m) {
      const float* x = in.values + m * in.value_stride;
      float partial[kPanelRows] = {};
      for (int32_t kw = span.word_begin; kw < span.word_end; ++kw) {
        for (int j = 0; j < kCodes; ++j) {
          const float value = x[kw * kCodes + j];
          for (int n = 0; n < kPanelRows; ++n) {
            partial[n] += decode<kind>(p.words[kw * kPanelRows + n], j) * value;
          }
        }
      }
      for (int n = 0; n < kPanelRows; ++n) {
        if (zero) partial[n] -= zero[n] * in.sums[m * in.sum_stride + s];
        totals[m * kPanelRows + n] += scale[n] * partial[n];
      }
    }
  }
}

template <WeightKind kind>
const GemmKernel kKernel = {panel<kind>, gemm_prepare_float, 1, false};

}  // namespace

void gemm_prepare_float(const float* x, int64_t K, const SpanList& list, float* values,
                        float* sums) {
  const int64_t padded = int64_t{list.spans[list.count - 1].word_end} * list.codes_per_word;
  memcpy(values, x, K * sizeof(float));
  memset(values + K, 0, (padded - K) * sizeof(float));
  if (!sums) return;
  for (int64_t s = 0; s < list.count; ++s) {
    const int64_t begin = int64_t{list.spans[s].word_begin} * list.codes_per_word;
    const int64_t end = int64_t{list.spans[s].word_end} * list.codes_per_word;
    // Eight sums side by side: one chain of additions would take as long as a small product.
    float lane[8] = {};
    int64_t k = begin;
    for (; k + 8 <= end; k += 8) {
      for (int i = 0; i < 8; ++i) lane[i] += values[k + i];
    }
    for (; k < end; ++k) lane[k & 7] += values[k];
    sums[s] =
        ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
  }
}

const GemmKernel* gemm_kernel_ref(WeightKind kind) {
  switch (kind) {
    case WeightKind::int4:
      return &kKernel<WeightKind::int4>;
    case WeightKind::int8:
      return &kKernel<WeightKind::int8>;
    case WeightKind::bf16:
      return &kKernel<WeightKind::bf16>;
    case WeightKind::f16:
      return &kKernel<WeightKind::f16>;
    case WeightKind::f32:
      return &kKernel<WeightKind::f32>;
  }
  return nullptr;
}

}  // namespace fewbits
