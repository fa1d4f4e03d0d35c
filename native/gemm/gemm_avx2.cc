// AVX2, FMA, F16C: eight rows of the weight in a register, x broadcast, products in float32.
#include <immintrin.h>

#include "gemm/kernel.h"

#define FEWBITS_INLINE static inline __attribute__((always_inline))

namespace fewbits {

constexpr int kLanes = 8;
constexpr int kLineRows = 16;  // rows of a panel in a cache line

// Weights are read far enough ahead to hide the latency of memory, across the end of a panel into
// the next.
constexpr int kPrefetchWords = 16;

template <WeightKind kind, int j>
FEWBITS_INLINE __m256 decode(__m256i word) {
  if constexpr (kind == WeightKind::int4 || kind == WeightKind::int8) {
    // With its highest bit flipped an offset-binary code is the two's complement of what it stands
    // for.
    constexpr int kBits = 32 / codes_per_word(kind);
    const __m256i flip = _mm256_set1_epi32(kBits == 4 ? 0x88888888 : 0x80808080);
    const __m256i signed_codes = _mm256_xor_si256(word, flip);
    const __m256i top = _mm256_slli_epi32(signed_codes, 32 - kBits * (j + 1));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - kBits));
  } else if constexpr (kind == WeightKind::bf16) {
    return _mm256_castsi256_ps(j == 0 ? _mm256_slli_epi32(word, 16)
                                      : _mm256_and_si256(word, _mm256_set1_epi32(0xffff0000)));
  } else if constexpr (kind == WeightKind::f16) {
    const __m256i half =
        j == 0 ? _mm256_and_si256(word, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(word, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xd8);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  } else {
    return _mm256_castsi256_ps(word);
  }
}

template <WeightKind kind, int rows, int tiles, int j = 0>
FEWBITS_INLINE void multiply_word(const __m256i (&words)[tiles], const float* x, int64_t x_stride,
                                  __m256 (&partial)[rows][tiles]) {
  __m256 weights[tiles];
  for (int t = 0; t < tiles; ++t) weights[t] = decode<kind, j>(words[t]);
  for (int m = 0; m < rows; ++m) {
    const __m256 value = _mm256_set1_ps(x[m * x_stride + j]);
    for (int t = 0; t < tiles; ++t) {
      partial[m][t] = _mm256_fmadd_ps(weights[t], value, partial[m][t]);
    }
  }
  if constexpr (j + 1 < codes_per_word(kind)) {
    multiply_word<kind, rows, tiles, j + 1>(words, x, x_stride, partial);
  }
}

// The spans [begin, end) times `rows` rows of x, from row m on, for `tiles` eighths of the panel's
// rows.
template <WeightKind kind, int rows, int tiles>
static void multiply(const GemmPanel& p, int64_t begin, int64_t end, int tile, const GemmInput& in,
                     int64_t m, float* totals) {
  const float* x = in.values + m * in.value_stride;
  const float* sums = in.sums + m * in.sum_stride;
  totals += m * kPanelRows + tile * kLanes;
  for (int64_t s = begin; s < end; ++s) {
    const Span span = p.list.spans[s];
    __m256 partial[rows][tiles];
    for (int i = 0; i < rows; ++i) {
      for (int t = 0; t < tiles; ++t) partial[i][t] = _mm256_setzero_ps();
    }
    for (int32_t kw = span.word_begin; kw < span.word_end; ++kw) {
      const uint32_t* line = p.words + kw * kPanelRows + tile * kLanes;
      // The first tiles fetch for all: a pass over some lines of every four is what the hardware
      // doesn't foresee.
      for (int n = 0; tile == 0 && n < kPanelRows; n += kLineRows) {
        _mm_prefetch(line + n + kPrefetchWords * kPanelRows, _MM_HINT_T0);
      }
      __m256i words[tiles];
      for (int t = 0; t < tiles; ++t) {
        words[t] = _mm256_load_si256(reinterpret_cast<const __m256i*>(line + t * kLanes));
      }
      multiply_word<kind, rows, tiles>(words, x + kw * codes_per_word(kind), in.value_stride,
                                       partial);
    }
    const int64_t offset = span.group * kPanelRows + tile * kLanes;
    for (int t = 0; t < tiles; ++t) {
      const __m256 scale = _mm256_load_ps(p.scale + offset + t * kLanes);
      if (p.zero) {
        const __m256 zero = _mm256_load_ps(p.zero + offset + t * kLanes);
        for (int i = 0; i < rows; ++i) {
          const __m256 sum = _mm256_set1_ps(sums[i * in.sum_stride + s]);
          partial[i][t] = _mm256_fnmadd_ps(zero, sum, partial[i][t]);
        }
      }
      for (int i = 0; i < rows; ++i) {
        float* total = totals + i * kPanelRows + t * kLanes;
        _mm256_store_ps(total, _mm256_fmadd_ps(scale, partial[i][t], _mm256_load_ps(total)));
      }
    }
  }
}

template <WeightKind kind, int rows, int tiles>
FEWBITS_INLINE void multiply_panel(const GemmPanel& p, int64_t begin, int64_t end,
                                   const GemmInput& in, int64_t m, float* totals) {
  for (int tile = 0; tile < kPanelRows / kLanes; tile += tiles) {
    multiply<kind, rows, tiles>(p, begin, end, tile, in, m, totals);
  }
}

template <WeightKind kind>
static void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  for (int64_t begin = 0; begin < p.list.count;) {
    const int64_t end = span_block_end(p.list, begin);
    for (int64_t m = 0; m < rows;) {
      const int64_t left = rows - m;
      if (left > 4) {
        multiply_panel<kind, 6, 2>(p, begin, end, in, m, totals);
        m += 6;
      } else if (left > 2) {
        multiply_panel<kind, 4, 2>(p, begin, end, in, m, totals);
        m += 4;
      } else if (left > 1) {
        multiply_panel<kind, 2, 4>(p, begin, end, in, m, totals);
        m += 2;
      } else {
        multiply_panel<kind, 1, 8>(p, begin, end, in, m, totals);
        m += 1;
      }
    }
    begin = end;
  }
}

const GemmKernel* gemm_kernel_avx2(WeightKind kind) {
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
