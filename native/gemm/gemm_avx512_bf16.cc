// AVX-512 BF16: x rounded to bfloat16 once a call, products in pairs (VDPBF16PS) summed in float32.
// Kinds whose values bfloat16 doesn't hold exactly (f16, f32) stay with the avx512 tier.
//
// A prepared row keeps two values of x in the bits of each float:
//   int8, bf16   (x0, x1) (x2, x3) ...
//   int4         (x0, x4) (x1, x5) (x2, x6) (x3, x7) (x8, x12) ...
// A mask of 0x000f000f takes codes 0 and 4 of an int4 word, and after shifts by four bits the pairs
// that follow.
#include <immintrin.h>

#include "gemm/kernel.h"

#define FEWBITS_INLINE static inline __attribute__((always_inline))

namespace fewbits {

constexpr int kLanes = 16;
constexpr int kTiles = kPanelRows / kLanes;

// Weights are read far enough ahead to hide the latency of memory, across the end of a panel into
// the next.
constexpr int kPrefetchWords = 16;

// From this many rows on, codes are decoded into memory once instead of into registers for every
// six rows.
constexpr int64_t kDecodeOnceRows = 24;

// What the decoder of int4 leaves in a code: 128 from the bit trick, 8 from offset-binary.
constexpr float kInt4Offset = 136;

constexpr int kAndOr = 0xea;  // truth table of (a & b) | c

template <WeightKind kind, int pair>
FEWBITS_INLINE __m512i decode(__m512i word) {
  if constexpr (kind == WeightKind::int4) {
    // A code in the lowest mantissa bits of 128.0 is 128 + code.
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4 * pair),
                                     _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x43004300),
                                     kAndOr);
  } else if constexpr (kind == WeightKind::int8) {
    // Bytes in the mantissa of 2^23 become floats by an exact subtraction, whose lower halves are
    // zero.
    const __m512i bytes = _mm512_srli_epi32(word, 16 * pair);
    const __m512i magic = _mm512_set1_epi32(0x4b000000);
    const __m512 low = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi32(0x00ff), magic, kAndOr));
    const __m512 high = _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bytes, _mm512_set1_epi32(0xff00), magic, kAndOr));
    const __m512 even = _mm512_sub_ps(low, _mm512_set1_ps(0x1p23f + 128));
    const __m512 odd =
        _mm512_fmsub_ps(high, _mm512_set1_ps(0x1p-8f), _mm512_set1_ps(0x1p15f + 128));
    return _mm512_or_si512(_mm512_castps_si512(odd),
                           _mm512_srli_epi32(_mm512_castps_si512(even), 16));
  } else {
    return word;
  }
}

template <WeightKind kind, int rows, int pair = 0>
FEWBITS_INLINE void multiply_word(const __m512i (&words)[kTiles], const float* x, int64_t x_stride,
                                  __m512 (&partial)[rows][kTiles]) {
  __m512i weights[kTiles];
  for (int t = 0; t < kTiles; ++t) weights[t] = decode<kind, pair>(words[t]);
  for (int m = 0; m < rows; ++m) {
    const __m512i value = _mm512_castps_si512(_mm512_set1_ps(x[m * x_stride + pair]));
    for (int t = 0; t < kTiles; ++t) {
      partial[m][t] = _mm512_dpbf16_ps(partial[m][t], (__m512bh)weights[t], (__m512bh)value);
    }
  }
  if constexpr (pair + 1 < codes_per_word(kind) / 2) {
    multiply_word<kind, rows, pair + 1>(words, x, x_stride, partial);
  }
}

// A block of spans as a kernel passes it over the rows. Its words are those of the weight, or,
// where `kind` is stored as bf16, pairs of codes that were decoded before.
struct Block {
  int64_t span_begin;
  int64_t span_end;
  const uint32_t* words;  // from the first word of the first span
};

// The spans of a block times `rows` rows of x, from row m on.
template <WeightKind kind, WeightKind stored, int rows>
static void multiply(const GemmPanel& p, const Block& block, const GemmInput& in, int64_t m,
                     float* totals) {
  constexpr int kStoredPairs = codes_per_word(stored) / 2;
  constexpr int kStoredWords = codes_per_word(kind) / codes_per_word(stored);
  const int32_t block_begin = p.list.spans[block.span_begin].word_begin;
  const float* x =
      in.values + m * in.value_stride + block_begin * int64_t{kStoredWords * kStoredPairs};
  const float* sums = in.sums + m * in.sum_stride;
  totals += m * kPanelRows;
  for (int64_t s = block.span_begin; s < block.span_end; ++s) {
    const Span span = p.list.spans[s];
    __m512 partial[rows][kTiles];
    for (int i = 0; i < rows; ++i) {
      for (int t = 0; t < kTiles; ++t) partial[i][t] = _mm512_setzero_ps();
    }
    const int64_t end = int64_t{span.word_end - block_begin} * kStoredWords;
    for (int64_t i = int64_t{span.word_begin - block_begin} * kStoredWords; i < end; ++i) {
      const uint32_t* line = block.words + i * kPanelRows;
      __m512i words[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        words[t] = _mm512_load_si512(line + t * kLanes);
        if (stored == kind) {
          _mm_prefetch(line + t * kLanes + kPrefetchWords * kPanelRows, _MM_HINT_T0);
        }
      }
      multiply_word<stored, rows>(words, x + i * kStoredPairs, in.value_stride, partial);
    }
    const int64_t group = span.group * kPanelRows;
    for (int t = 0; t < kTiles; ++t) {
      const __m512 scale = _mm512_load_ps(p.scale + group + t * kLanes);
      if (kind == WeightKind::int4 || p.zero) {
        __m512 offset = p.zero ? _mm512_load_ps(p.zero + group + t * kLanes) : _mm512_setzero_ps();
        if (kind == WeightKind::int4) offset = _mm512_add_ps(offset, _mm512_set1_ps(kInt4Offset));
        for (int i = 0; i < rows; ++i) {
          const __m512 sum = _mm512_set1_ps(sums[i * in.sum_stride + s]);
          partial[i][t] = _mm512_fnmadd_ps(offset, sum, partial[i][t]);
        }
      }
      for (int i = 0; i < rows; ++i) {
        float* total = totals + i * kPanelRows + t * kLanes;
        _mm512_store_ps(total, _mm512_fmadd_ps(scale, partial[i][t], _mm512_load_ps(total)));
      }
    }
  }
}

// Six rows by four tiles are as many sums as the registers hold.
template <WeightKind kind, WeightKind stored>
static void multiply_rows(const GemmPanel& p, const Block& block, const GemmInput& in, int64_t rows,
                          float* totals) {
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    if (left > 8 || left == 6 || left == 5) {
      multiply<kind, stored, 6>(p, block, in, m, totals);
      m += 6;
    } else if (left > 2) {
      multiply<kind, stored, 4>(p, block, in, m, totals);
      m += 4;
    } else if (left > 1) {
      multiply<kind, stored, 2>(p, block, in, m, totals);
      m += 2;
    } else {
      multiply<kind, stored, 1>(p, block, in, m, totals);
      m += 1;
    }
  }
}

template <WeightKind kind, int pair = 0>
FEWBITS_INLINE void decode_word(__m512i word, uint32_t* pairs) {
  _mm512_store_si512(pairs + pair * kPanelRows, decode<kind, pair>(word));
  if constexpr (pair + 1 < codes_per_word(kind) / 2) decode_word<kind, pair + 1>(word, pairs);
}

template <WeightKind kind>
static void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  constexpr int kPairs = codes_per_word(kind) / 2;
  for (int64_t begin = 0; begin < p.list.count;) {
    const int64_t end = span_block_end(p.list, begin);
    const int64_t word_begin = p.list.spans[begin].word_begin;
    const uint32_t* words = p.words + word_begin * kPanelRows;
    if constexpr (kind != WeightKind::int8) {
      multiply_rows<kind, kind>(p, {begin, end, words}, in, rows, totals);
    } else if (rows < kDecodeOnceRows) {
      multiply_rows<kind, kind>(p, {begin, end, words}, in, rows, totals);
    } else {
      alignas(64) uint32_t pairs[kSpanCodes / 2 * kPanelRows];
      const int64_t count = p.list.spans[end - 1].word_end - word_begin;
      for (int64_t i = 0; i < count * kPanelRows; i += kLanes) {
        const int64_t kw = i / kPanelRows, lane = i % kPanelRows;
        decode_word<kind>(_mm512_load_si512(words + i), pairs + kw * kPairs * kPanelRows + lane);
      }
      multiply_rows<kind, WeightKind::bf16>(p, {begin, end, pairs}, in, rows, totals);
    }
    begin = end;
  }
}

FEWBITS_INLINE __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

template <WeightKind kind>
static void prepare(const float* x, int64_t K, const SpanList& list, float* values, float* sums) {
  const __m256i order =
      kind == WeightKind::int4
          ? _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
          : _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t s = 0; s < list.count; ++s) {
    const int64_t begin = int64_t{list.spans[s].word_begin} * list.codes_per_word;
    const int64_t end = int64_t{list.spans[s].word_end} * list.codes_per_word;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = begin; k < end; k += 16) {
      const __m512 row = _mm512_maskz_loadu_ps(first((end < K ? end : K) - k), x + k);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(row);
      // Every pair of x is one float of `values`.
      _mm256_mask_storeu_epi16(values + k / 2, first(end - k),
                               _mm256_permutexvar_epi16(order, rounded));
      const __m512i widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(widened));
    }
    if (sums) sums[s] = _mm512_reduce_add_ps(sum);
  }
}

const GemmKernel* gemm_kernel_avx512_bf16(WeightKind kind) {
  static const GemmKernel int4 = {panel<WeightKind::int4>, prepare<WeightKind::int4>, 2, true};
  static const GemmKernel int8 = {panel<WeightKind::int8>, prepare<WeightKind::int8>, 2, false};
  static const GemmKernel bf16 = {panel<WeightKind::bf16>, prepare<WeightKind::bf16>, 2, false};
  switch (kind) {
    case WeightKind::int4:
      return &int4;
    case WeightKind::int8:
      return &int8;
    case WeightKind::bf16:
      return &bf16;
    default:
      return nullptr;
  }
}

}  // namespace fewbits
