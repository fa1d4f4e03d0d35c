// The pass of a panel over prepared rows of x, the same for all tiers with vector registers.
//
// A tier's `Dot` says what one step is:
//
//   kLanes, kTiles     rows of the panel in a register, registers of words that are taken at once
//   kMaxRows           rows of x whose sums fit the registers beside those
//   kDecodeOnceRows    from this many rows on, codes are decoded into memory once and not into
//                      registers for every few rows
//   Words, Operand, Sum, Float
//   load_words(p), load_operand(p), store_operand(p, operand), broadcast(x)
//   steps<kind>        operands of a word
//   offset<kind>       what decoding leaves in a code, and in the totals if it isn't taken out
//   decode<kind, step>(words), dot(sum, operand, x), zero(), to_float(sum)
//   load, store, set1, mul, fmadd, fnmadd   on Float
#pragma once

#include <immintrin.h>

#include "gemm/kernel.h"
#include "gemm/numbers.h"

#define FEWBITS_INLINE static inline __attribute__((always_inline))

namespace fewbits {
namespace {

// Weights are read far enough ahead to hide the latency of memory, across the end of a panel into
// the next.
constexpr int kPrefetchWords = 16;
constexpr int kLineRows = 16;  // rows of a panel in a cache line

// With groups of at most this many codes it pays to keep totals in registers, and so to take fewer
// rows at once: they are changed every few products.
constexpr int kSmallGroup = 32;
constexpr int kRowsWithTotals = 3;

// Some spans of a panel. `words` and `operands` begin at the first word of the first span, `scale`
// and `offset` at its group.
struct Block {
  const Span* begin;
  const Span* end;
  int64_t first_span;
  const uint32_t* words;     // of the weight, or
  const uint32_t* operands;  // decoded: [word][step][64]
  const float* scale;        // [groups][64]
  const float* offset;       // [groups][64], or null
};

template <class Dot, WeightKind kind, int rows, int step = 0>
FEWBITS_INLINE void multiply_word(const typename Dot::Words (&words)[Dot::kTiles],
                                  const uint32_t* x, int64_t x_stride,
                                  typename Dot::Sum (&sum)[rows][Dot::kTiles]) {
  typename Dot::Operand weights[Dot::kTiles];
  for (int t = 0; t < Dot::kTiles; ++t) weights[t] = Dot::template decode<kind, step>(words[t]);
  for (int m = 0; m < rows; ++m) {
    const typename Dot::Operand value = Dot::broadcast(x + m * x_stride + step);
    for (int t = 0; t < Dot::kTiles; ++t) sum[m][t] = Dot::dot(sum[m][t], weights[t], value);
  }
  if constexpr (step + 1 < Dot::template steps<kind>) {
    multiply_word<Dot, kind, rows, step + 1>(words, x, x_stride, sum);
  }
}

template <class Dot, int rows>
FEWBITS_INLINE void multiply_operands(const uint32_t* operands, int64_t count, const uint32_t* x,
                                      int64_t x_stride,
                                      typename Dot::Sum (&sum)[rows][Dot::kTiles]) {
  for (int64_t i = 0; i < count; ++i) {
    typename Dot::Operand weights[Dot::kTiles];
    for (int t = 0; t < Dot::kTiles; ++t) {
      weights[t] = Dot::load_operand(operands + i * kPanelRows + t * Dot::kLanes);
    }
    for (int m = 0; m < rows; ++m) {
      const typename Dot::Operand value = Dot::broadcast(x + m * x_stride + i);
      for (int t = 0; t < Dot::kTiles; ++t) sum[m][t] = Dot::dot(sum[m][t], weights[t], value);
    }
  }
}

// A block times `rows` rows of x, from row m on, for the strip of the panel that starts at row n.
template <class Dot, WeightKind kind, bool decoded, int rows>
static void multiply(const Block& block, const GemmInput& in, int64_t m, int n, float* totals) {
  using Float = typename Dot::Float;
  constexpr int kSteps = Dot::template steps<kind>;
  constexpr bool kKeepTotals = rows <= kRowsWithTotals;
  const int64_t first_word = block.begin->word_begin;
  const int32_t first_group = block.begin->group;
  const uint32_t* x = in.values + m * in.value_stride + first_word * kSteps;
  totals += m * kPanelRows + n;
  Float kept[rows][Dot::kTiles];
  for (int i = 0; kKeepTotals && i < rows; ++i) {
    for (int t = 0; t < Dot::kTiles; ++t) {
      kept[i][t] = Dot::load(totals + i * kPanelRows + t * Dot::kLanes);
    }
  }
  for (const Span* span = block.begin; span < block.end; ++span) {
    typename Dot::Sum sum[rows][Dot::kTiles];
    for (int i = 0; i < rows; ++i) {
      for (int t = 0; t < Dot::kTiles; ++t) sum[i][t] = Dot::zero();
    }
    const int64_t begin = span->word_begin - first_word, end = span->word_end - first_word;
    if constexpr (decoded) {
      multiply_operands<Dot, rows>(block.operands + begin * kSteps * kPanelRows + n,
                                   (end - begin) * kSteps, x + begin * kSteps, in.value_stride,
                                   sum);
    } else {
      for (int64_t kw = begin; kw < end; ++kw) {
        const uint32_t* line = block.words + kw * kPanelRows + n;
        // The first strip fetches for all: a pass over some lines of every four is what the
        // hardware doesn't foresee.
        for (int row = 0; n == 0 && row < kPanelRows; row += kLineRows) {
          _mm_prefetch(line + row + kPrefetchWords * kPanelRows, _MM_HINT_T0);
        }
        typename Dot::Words words[Dot::kTiles];
        for (int t = 0; t < Dot::kTiles; ++t) words[t] = Dot::load_words(line + t * Dot::kLanes);
        multiply_word<Dot, kind, rows>(words, x + kw * kSteps, in.value_stride, sum);
      }
    }
    const int64_t group = int64_t{span->group - first_group} * kPanelRows + n;
    const int64_t place = m * in.span_stride + block.first_span + (span - block.begin);
    for (int t = 0; t < Dot::kTiles; ++t) {
      const Float scale = Dot::load(block.scale + group + t * Dot::kLanes);
      Float offset = Dot::set1(Dot::template offset<kind>);
      if (block.offset) offset = Dot::load(block.offset + group + t * Dot::kLanes);
      for (int i = 0; i < rows; ++i) {
        Float partial = Dot::to_float(sum[i][t]);
        if (in.sums) {
          partial = Dot::fnmadd(offset, Dot::set1(in.sums[place + i * in.span_stride]), partial);
        }
        if (in.scales) {
          partial = Dot::mul(partial, Dot::set1(in.scales[place + i * in.span_stride]));
        }
        float* total = totals + i * kPanelRows + t * Dot::kLanes;
        if constexpr (kKeepTotals) {
          kept[i][t] = Dot::fmadd(scale, partial, kept[i][t]);
        } else {
          Dot::store(total, Dot::fmadd(scale, partial, Dot::load(total)));
        }
      }
    }
  }
  for (int i = 0; kKeepTotals && i < rows; ++i) {
    for (int t = 0; t < Dot::kTiles; ++t) {
      Dot::store(totals + i * kPanelRows + t * Dot::kLanes, kept[i][t]);
    }
  }
}

template <class Dot, WeightKind kind, bool decoded, int rows>
FEWBITS_INLINE void multiply_strips(const Block& block, const GemmInput& in, int64_t m,
                                    float* totals) {
  for (int n = 0; n < kPanelRows; n += Dot::kTiles * Dot::kLanes) {
    multiply<Dot, kind, decoded, rows>(block, in, m, n, totals);
  }
}

// All rows, the most at once that `at_once` and the registers allow; padding rows may take part.
template <class Dot, WeightKind kind, bool decoded>
static void multiply_rows(const Block& block, const GemmInput& in, int64_t rows, int at_once,
                          float* totals) {
  for (int64_t m = 0; m < rows;) {
    const int64_t left = rows - m;
    if (at_once <= kRowsWithTotals ? left >= 3 : left == 3 && Dot::kMaxRows < 4) {
      multiply_strips<Dot, kind, decoded, 3>(block, in, m, totals);
      m += 3;
    } else if (Dot::kMaxRows >= 6 && at_once >= 6 && (left > 8 || left == 6 || left == 5)) {
      multiply_strips<Dot, kind, decoded, Dot::kMaxRows >= 6 ? 6 : 1>(block, in, m, totals);
      m += 6;
    } else if (at_once >= 4 && left > 2) {
      multiply_strips<Dot, kind, decoded, 4>(block, in, m, totals);
      m += 4;
    } else if (left > 1) {
      multiply_strips<Dot, kind, decoded, 2>(block, in, m, totals);
      m += 2;
    } else {
      multiply_strips<Dot, kind, decoded, 1>(block, in, m, totals);
      m += 1;
    }
  }
}

template <class Dot, WeightKind kind, int step = 0>
FEWBITS_INLINE void decode_word(typename Dot::Words word, uint32_t* operands) {
  Dot::store_operand(operands + step * kPanelRows, Dot::template decode<kind, step>(word));
  if constexpr (step + 1 < Dot::template steps<kind>)
    decode_word<Dot, kind, step + 1>(word, operands);
}

template <class Dot, WeightKind kind>
static void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  constexpr int kSteps = Dot::template steps<kind>;
  constexpr int kCodes = codes_per_word(kind);
  alignas(64) float scales[kBlockSpans * kPanelRows];
  alignas(64) float offsets[kBlockSpans * kPanelRows];
  for (int64_t begin = 0; begin < p.list.count;) {
    const int64_t end = span_block_end(p.list, begin, kCodes);
    const Span* const spans = p.list.spans;
    const int64_t word = spans[begin].word_begin, words = spans[end - 1].word_end - word;
    const int64_t group = spans[begin].group, groups = spans[end - 1].group + 1 - group;
    Block block{spans + begin, spans + end, begin,  p.words + word * kPanelRows,
                nullptr,       scales,      nullptr};
    if (p.scale_kind == ScaleKind::f32 && !p.shared) {
      block.scale = static_cast<const float*>(p.scale) + group * kPanelRows;
    } else {
      widen_scales(p.scale_kind, p.scale, p.shared, group, groups, scales);
    }
    if (p.zero) {
      for (int64_t i = 0; i < groups * kPanelRows; ++i) {
        offsets[i] =
            static_cast<float>(p.zero[group * kPanelRows + i]) + Dot::template offset<kind>;
      }
      block.offset = offsets;
    }
    const bool small = (words / (end - begin)) * kCodes <= kSmallGroup;
    const int at_once = small ? kRowsWithTotals : Dot::kMaxRows;
    begin = end;
    if constexpr (kSteps > 1) {
      if (rows >= Dot::kDecodeOnceRows) {
        alignas(64) uint32_t operands[kSpanCodes / kCodes * kSteps * kPanelRows];
        for (int64_t i = 0; i < words * kPanelRows; i += Dot::kLanes) {
          const int64_t kw = i / kPanelRows, n = i % kPanelRows;
          decode_word<Dot, kind>(Dot::load_words(block.words + i),
                                 operands + kw * kSteps * kPanelRows + n);
        }
        block.operands = operands;
        multiply_rows<Dot, kind, true>(block, in, rows, at_once, totals);
        continue;
      }
    }
    multiply_rows<Dot, kind, false>(block, in, rows, at_once, totals);
  }
}

}  // namespace
}  // namespace fewbits
