// AVX-512 F, BW, VL, DQ: sixteen rows of the weight in a register, x broadcast, products in
// float32.
#include <immintrin.h>

#include "gemm/kernel.h"

#define FEWBITS_INLINE static inline __attribute__((always_inline))

namespace fewbits {

constexpr int kLanes = 16;
constexpr int kTiles = kPanelRows / kLanes;

// Weights are read far enough ahead to hide the latency of memory, across the end of a panel into
// the next.
constexpr int kPrefetchWords = 16;

template <WeightKind kind, int j>
FEWBITS_INLINE __m512 decode(__m512i word) {
  if constexpr (kind == WeightKind::int4) {
    // The permutation looks only at the lowest four bits of each index.
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(word, 4 * j), values);
  } else if constexpr (kind == WeightKind::int8) {
    // A byte in the mantissa of 2^23 becomes a float by an exact subtraction.
    constexpr int kAndOr = 0xea;  // truth table of (a & b) | c
    const __m512 biased = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
        _mm512_srli_epi32(word, 16 * (j / 2)), _mm512_set1_epi32(j % 2 ? 0xff00 : 0x00ff),
        _mm512_set1_epi32(0x4b000000), kAndOr));
    if constexpr (j % 2 == 0) return _mm512_sub_ps(biased, _mm512_set1_ps(0x1p23f + 128));
    return _mm512_fmsub_ps(biased, _mm512_set1_ps(0x1p-8f), _mm512_set1_ps(0x1p15f + 128));
  } else if constexpr (kind == WeightKind::bf16) {
    return _mm512_castsi512_ps(j == 0 ? _mm512_slli_epi32(word, 16)
                                      : _mm512_and_si512(word, _mm512_set1_epi32(0xffff0000)));
  } else if constexpr (kind == WeightKind::f16) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16 * j)));
  } else {
    return _mm512_castsi512_ps(word);
  }
}

template <WeightKind kind, int rows, int j = 0>
FEWBITS_INLINE void multiply_word(const __m512i (&words)[kTiles], const float* x, int64_t x_stride,
                                  __m512 (&partial)[rows][kTiles]) {
  __m512 weights[kTiles];
  for (int t = 0; t < kTiles; ++t) weights[t] = decode<kind, j>(words[t]);
  for (int m = 0; m < rows; ++m) {
    const __m512 value = _mm512_set1_ps(x[m * x_stride + j]);
    for (int t = 0; t < kTiles; ++t) {
      partial[m][t] = _mm512_fmadd_ps(weights[t], value, partial[m][t]);
    }
  }
  if constexpr (j + 1 < codes_per_word(kind)) {
    multiply_word<kind, rows, j + 1>(words, x, x_stride, partial);
  }
}

// The spans [begin, end) times `rows` rows of x, from row m on.
template <WeightKind kind, int rows>
static void multiply(const GemmPanel& p, int64_t begin, int64_t end, const GemmInput& in, int64_t m,
                     float* totals) {
  const float* x = in.values + m * in.value_stride;
  const float* sums = in.sums + m * in.sum_stride;
  totals += m * kPanelRows;
  for (int64_t s = begin; s < end; ++s) {
    const Span span = p.list.spans[s];
    __m512 partial[rows][kTiles];
    for (int i = 0; i < rows; ++i) {
      for (int t = 0; t < kTiles; ++t) partial[i][t] = _mm512_setzero_ps();
    }
    for (int32_t kw = span.word_begin; kw < span.word_end; ++kw) {
      const uint32_t* line = p.words + kw * kPanelRows;
      __m512i words[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        words[t] = _mm512_load_si512(line + t * kLanes);
        _mm_prefetch(line + t * kLanes + kPrefetchWords * kPanelRows, _MM_HINT_T0);
      }
      multiply_word<kind, rows>(words, x + kw * codes_per_word(kind), in.value_stride, partial);
    }
    const int64_t offset = span.group * kPanelRows;
    for (int t = 0; t < kTiles; ++t) {
      const __m512 scale = _mm512_load_ps(p.scale + offset + t * kLanes);
      if (p.zero) {
        const __m512 zero = _mm512_load_ps(p.zero + offset + t * kLanes);
        for (int i = 0; i < rows; ++i) {
          const __m512 sum = _mm512_set1_ps(sums[i * in.sum_stride + s]);
          partial[i][t] = _mm512_fnmadd_ps(zero, sum, partial[i][t]);
        }
      }
      for (int i = 0; i < rows; ++i) {
        float* total = totals + i * kPanelRows + t * kLanes;
        _mm512_store_ps(total, _mm512_fmadd_ps(scale, partial[i][t], _mm512_load_ps(total)));
      }
    }
  }
}

template <WeightKind kind>
static void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  for (int64_t begin = 0; begin < p.list.count;) {
    const int64_t end = span_block_end(p.list, begin);
    // Six rows by four tiles are as many sums as the registers hold.
    for (int64_t m = 0; m < rows;) {
      const int64_t left = rows - m;
      if (left > 8 || left == 6 || left == 5) {
        multiply<kind, 6>(p, begin, end, in, m, totals);
        m += 6;
      } else if (left > 2) {
        multiply<kind, 4>(p, begin, end, in, m, totals);
        m += 4;
      } else if (left > 1) {
        multiply<kind, 2>(p, begin, end, in, m, totals);
        m += 2;
      } else {
        multiply<kind, 1>(p, begin, end, in, m, totals);
        m += 1;
      }
    }
    begin = end;
  }
}

const GemmKernel* gemm_kernel_avx512(WeightKind kind) {
  static const GemmKernel kernels[] = {
      {panel<WeightKind::int4>, gemm_prepare_float, 1, false},
      {panel<WeightKind::int8>, gemm_prepare_float, 1, false},
      {panel<WeightKind::bf16>, gemm_prepare_float, 1, false},
      {panel<WeightKind::f16>, gemm_prepare_float, 1, false},
      {panel<WeightKind::f32>, gemm_prepare_float, 1, false},
  };
  return &kernels[static_cast<int>(kind)];
}

}  // namespace fewbits
