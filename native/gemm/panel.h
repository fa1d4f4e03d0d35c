// The pass of a panel over prepared rows of x, the same for all tiers with vector registers.
#pragma once

#include "gemm/block.h"
#include "gemm/small_groups.h"

namespace fewbits {
namespace {

// From this many operations on a register of words, dots and what decoding takes, or with sums in
// memory, a pass is slower than memory, and all lines are asked for; below, one of four: to ask for
// all then costs a third on a Zen 4. On Intel's cores all of them gain a tenth.
constexpr int kSlowPass = 8;

// With groups of at most this many codes it pays to keep totals in registers, and so to take fewer
// rows at once: they are changed every few products.
constexpr int kSmallGroup = 32;

template <class Dot, int rows>
constexpr int kTiles = Dot::template tiles<rows>;
template <class Dot, int rows>
constexpr int kStripRows = kTiles<Dot, rows> * Dot::kLanes;

// Whether some sums are in memory, because all would leave no registers for x.
template <class Dot, int rows>
constexpr bool kSumsInMemory = rows * kTiles<Dot, rows> > Dot::kSumsBesideX;

template <class Dot, WeightKind kind>
constexpr int kMostCodes =
    Dot::kIntegers && Dot::template steps<kind> == 1 ? kLongSpanCodes : kSpanCodes;

// Passes over some of the rows each share the lines of the next block among them, so that memory is
// read all the time and not by the first pass alone.
template <class Dot, WeightKind kind, bool decoded, int rows>
FEWBITS_INLINE Ahead ahead_of(const Block& block, int64_t m, int n) {
  constexpr int kStrips = kPanelRows / kStripRows<Dot, rows>;
  if (kStrips == 1 && rows >= block.rows) {
    constexpr int kDots = rows * kWordsOfX<Dot, kind>;
    constexpr bool kSlow =
        kSumsInMemory<Dot, rows> || kDots + Dot::template decode_operations<kind> >= kSlowPass;
    return following_words(block.words, block.words + block.count * kPanelRows, block.next,
                           kSlow || block.intel);
  }
  // By rows of x and strips.
  const int64_t size = block.count * kPanelRows;
  constexpr int kParts = decoded ? Dot::template steps<kind> : 1;
  const int64_t all = block.rows * kStrips;
  const int64_t stride = (kPanelRows / kParts * rows + all - 1) / all;
  const int64_t before = m * kStrips + n / kStripRows<Dot, rows> * rows;
  const uint32_t* const words = block.next + size * before / all;
  return {words, stride, stride > kLineRows, words + size, words + size};
}

template <class Dot, WeightKind kind, int rows, int step = 0>
FEWBITS_INLINE void multiply_word(const typename Dot::Words (&words)[kTiles<Dot, rows>],
                                  const uint32_t* x, int64_t x_stride,
                                  typename Dot::Sum (&sum)[rows][kTiles<Dot, rows>]) {
  const uint32_t* const values = x + step * Dot::kOperandWords;
  if constexpr (kSumsInMemory<Dot, rows>) {
    // One operand at a time: of 36 sums six are in memory then, and not ten.
    for (int t = 0; t < kTiles<Dot, rows>; ++t) {
      typename Dot::Operand weights = Dot::template decode<kind, step>(words[t]);
      keep(weights);
      for (int m = 0; m < rows; ++m) {
        sum[m][t] = Dot::dot_memory(sum[m][t], weights, values + m * x_stride);
      }
    }
  } else {
    typename Dot::Operand weights[kTiles<Dot, rows>];
    for (int t = 0; t < kTiles<Dot, rows>; ++t)
      weights[t] = Dot::template decode<kind, step>(words[t]);
    for (int m = 0; m < rows; ++m) {
      const auto value = Dot::broadcast(values + m * x_stride);
      for (int t = 0; t < kTiles<Dot, rows>; ++t) {
        sum[m][t] = Dot::dot(sum[m][t], weights[t], value);
      }
    }
  }
  if constexpr (step + 1 < Dot::template steps<kind>) {
    multiply_word<Dot, kind, rows, step + 1>(words, x, x_stride, sum);
  }
}

// Where a pass over a block has come to; spans follow each other.
struct Place {
  const uint32_t* line;  // of words or operands, from the strip's first row on
  const uint32_t* x;     // of the first row
  const uint32_t* ahead;
};

// `count` words of a block, at least one, times `rows` rows of x.
template <class Dot, WeightKind kind, bool decoded, int rows>
FEWBITS_INLINE void multiply_span(Place& at, int64_t count, int64_t x_stride, const Ahead& ahead,
                                  typename Dot::Sum (&sum)[rows][kTiles<Dot, rows>]) {
  constexpr int kWords = kWordsOfX<Dot, kind>;
  const uint32_t* const end = at.line + count * (decoded ? kWords : 1) * kPanelRows;
  // The loop's first pass is unconditional: with a way around it GCC keeps the sums in memory.
  do {
    // Where codes were decoded once, rows are so many that a line each time is enough.
    at.ahead = ahead.ask(at.ahead, !decoded && ahead.all);
    if constexpr (decoded) {
      typename Dot::Operand weights[kTiles<Dot, rows>];
      for (int t = 0; t < kTiles<Dot, rows>; ++t) {
        weights[t] = Dot::load_operand(at.line + t * Dot::kLanes * Dot::kOperandWords);
        keep(weights[t]);  // else GCC loads the operands anew for each row
      }
      for (int m = 0; m < rows; ++m) {
        const auto value = Dot::broadcast(at.x + m * x_stride);
        for (int t = 0; t < kTiles<Dot, rows>; ++t)
          sum[m][t] = Dot::dot(sum[m][t], weights[t], value);
      }
      at.x += Dot::kOperandWords;
    } else {
      typename Dot::Words words[kTiles<Dot, rows>];
      for (int t = 0; t < kTiles<Dot, rows>; ++t) {
        words[t] = Dot::load_words(at.line + t * Dot::kLanes);
        // Else GCC loads the words anew for each step, where sums leave registers for them.
        if constexpr (rows <= Dot::kRowsBesideWords) keep(words[t]);
      }
      multiply_word<Dot, kind, rows>(words, at.x, x_stride, sum);
      at.x += kWords;
    }
    at.line += (decoded ? Dot::kOperandWords : 1) * kPanelRows;
  } while (at.line < end);
}

// What the spans of a block add to the totals of `rows` rows of x, kept in registers where they are
// few; for the strip of the panel that starts at row n.
template <class Dot, WeightKind kind, bool scaled, int rows>
struct Totals {
  using Float = typename Dot::Float;
  static constexpr bool kKept = rows <= Dot::kRowsWithTotals;

  const Block& block;
  const uint32_t* sums;
  const float* scales;
  int64_t stride;
  float* memory;
  int n;
  Float kept[kKept ? rows : 1][kTiles<Dot, rows>];

  FEWBITS_MEMBER Totals(const Block& b, const GemmInput& in, int64_t m, int strip, float* totals)
      : block(b), stride(in.span_stride), memory(totals + m * kPanelRows + strip), n(strip) {
    if constexpr (has_sums<Dot, kind>()) sums = in.sums + m * stride + block.first_span;
    if constexpr (scaled) scales = in.scales + m * stride + block.first_span;
    for (int i = 0; kKept && i < rows; ++i) {
      for (int t = 0; t < kTiles<Dot, rows>; ++t) kept[i][t] = Dot::load(place(i, t));
    }
  }

  FEWBITS_MEMBER float* place(int i, int t) const {
    return memory + i * kPanelRows + t * Dot::kLanes;
  }

  FEWBITS_MEMBER void begin(typename Dot::Sum (&sum)[rows][kTiles<Dot, rows>]) const {
    for (int i = 0; i < rows; ++i) {
      typename Dot::Sum first;
      if constexpr (Dot::kIntegers) {
        first = Dot::broadcast(sums + i * stride);
      } else {
        first = Dot::zero();
      }
      for (int t = 0; t < kTiles<Dot, rows>; ++t) sum[i][t] = first;
    }
  }

  FEWBITS_MEMBER void add(const Span* span,
                          const typename Dot::Sum (&sum)[rows][kTiles<Dot, rows>]) {
    // Once for all: within the loops the question costs registers.
    if (has_offsets<Dot, kind>() && block.offset) {
      add<true>(span, sum);
    } else {
      add<false>(span, sum);
    }
    if constexpr (has_sums<Dot, kind>()) ++sums;
    if constexpr (scaled) ++scales;
  }

  template <bool shifted>
  FEWBITS_MEMBER void add(const Span* span,
                          const typename Dot::Sum (&sum)[rows][kTiles<Dot, rows>]) {
    const int64_t group = int64_t{span->group - block.begin->group} * kPanelRows + n;
#pragma GCC unroll 4
    for (int t = 0; t < kTiles<Dot, rows>; ++t) {
      const Float scale = Dot::load(block.scale + group + t * Dot::kLanes);
      Float offset;
      if constexpr (shifted) offset = Dot::load(block.offset + group + t * Dot::kLanes);
      for (int i = 0; i < rows; ++i) {
        Float partial = Dot::to_float(sum[i][t]);
        if constexpr (shifted) {
          partial = Dot::fnmadd(offset, Dot::set1(sum_of_x<Dot, kind>(sums[i * stride])), partial);
        }
        if constexpr (scaled) partial = Dot::mul(partial, Dot::set1(scales[i * stride]));
        if constexpr (kKept) {
          kept[i][t] = Dot::fmadd(scale, partial, kept[i][t]);
        } else {
          Dot::store(place(i, t), Dot::fmadd(scale, partial, Dot::load(place(i, t))));
        }
      }
    }
  }

  FEWBITS_MEMBER void store() const {
    for (int i = 0; kKept && i < rows; ++i) {
      for (int t = 0; t < kTiles<Dot, rows>; ++t) Dot::store(place(i, t), kept[i][t]);
    }
  }
};

// A block times `rows` rows of x, from row m on, for the strip of the panel that starts at row n.
// `scaled`: x has a scale for every span.
template <class Dot, WeightKind kind, bool decoded, bool scaled, int rows>
__attribute__((noinline)) static void multiply(const Block& block, const GemmInput& in, int64_t m,
                                               int n, float* memory) {
  const int64_t first_word = block.begin->word_begin;
  const Ahead ahead = ahead_of<Dot, kind, decoded, rows>(block, m, n);
  Place at = {decoded ? block.operands + n * Dot::kOperandWords : block.words + n,
              in.values + m * in.value_stride + first_word * kWordsOfX<Dot, kind>, ahead.first()};
  Totals<Dot, kind, scaled, rows> totals(block, in, m, n, memory);
  for (const Span* span = block.begin; span < block.end; ++span) {
    typename Dot::Sum sum[rows][kTiles<Dot, rows>];
    totals.begin(sum);
    multiply_span<Dot, kind, decoded, rows>(at, span->word_end - span->word_begin, in.value_stride,
                                            ahead, sum);
    totals.add(span, sum);
  }
  totals.store();
}

template <class Dot, WeightKind kind, bool decoded, bool scaled, int most>
static void multiply_pass(const Block& block, const GemmInput& in, int64_t m, int64_t rows,
                          float* totals) {
  if constexpr (most > 1) {
    if (rows < most) {
      multiply_pass<Dot, kind, decoded, scaled, most - 1>(block, in, m, rows, totals);
      return;
    }
  }
  for (int n = 0; n < kPanelRows; n += kStripRows<Dot, most>) {
    multiply<Dot, kind, decoded, scaled, most>(block, in, m, n, totals);
  }
}

// All rows in passes of about as many, at most `most` of them and `at_once`.
template <class Dot, WeightKind kind, bool decoded, bool scaled, int most>
static void multiply_rows(const Block& block, const GemmInput& in, int at_once, float* totals) {
  const int64_t limit = most < at_once ? most : at_once;
  int64_t passes = (block.rows + limit - 1) / limit;
  for (int64_t m = 0; m < block.rows; --passes) {
    const int64_t rows = (block.rows - m + passes - 1) / passes;
    multiply_pass<Dot, kind, decoded, scaled, most>(block, in, m, rows, totals);
    m += rows;
  }
}

template <class Dot, WeightKind kind, int step = 0>
FEWBITS_INLINE void decode_word(typename Dot::Words word, uint32_t* operands) {
  Dot::store_operand(operands + step * Dot::kOperandWords * kPanelRows,
                     Dot::template decode<kind, step>(word));
  if constexpr (step + 1 < Dot::template steps<kind>)
    decode_word<Dot, kind, step + 1>(word, operands);
}

template <class Dot, WeightKind kind, bool scaled>
static void panel(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  constexpr bool kDecodes = Dot::template decode_operations<kind> > 0;
  constexpr int kCodes = codes_per_word(kind);
  if constexpr (takes_small_groups<Dot, kind>()) {
    if (has_small_groups<Dot, kind>(p, rows)) {
      return multiply_small_groups<Dot, kind, scaled>(p, in, rows, totals);
    }
  }
  alignas(64) float scales[kBlockSpans * kPanelRows];
  alignas(64) float offsets[kBlockSpans * kPanelRows];
  for (int64_t begin = 0; begin < p.list.count;) {
    const int64_t end = span_block_end(p.list, begin, kMostCodes<Dot, kind> / kCodes);
    const Span* const spans = p.list.spans;
    const int64_t word = spans[begin].word_begin, words = spans[end - 1].word_end - word;
    const int64_t group = spans[begin].group, groups = spans[end - 1].group + 1 - group;
    const uint32_t* const words_of_block = p.words + word * kPanelRows;
    const bool last = end == p.list.count;
    Block block{spans + begin, spans + end,
                begin,         words_of_block,
                nullptr,       scales,
                nullptr,       words,
                rows,          last ? p.next : words_of_block + words * kPanelRows,
                p.intel};
    const bool small = (words / (end - begin)) * kCodes <= kSmallGroup;
    begin = end;
    if (p.scale_kind == ScaleKind::f32 && !p.shared) {
      block.scale = static_cast<const float*>(p.scale) + group * kPanelRows;
    } else if (p.scale_kind == ScaleKind::e4m3 && !p.shared) {
      const auto* const codes = static_cast<const uint8_t*>(p.scale);
      Dot::widen_e4m3(codes + group * kPanelRows, groups * kPanelRows, scales);
    } else {
      widen_scales(p.scale_kind, p.scale, p.shared, group, groups, scales);
    }
    constexpr float kLeft = Dot::kIntegers ? 0 : Dot::template offset<kind>;
    if (has_offsets<Dot, kind>() && (p.zero || kLeft != 0)) {
      const int8_t* zero = p.zero ? p.zero + group * kPanelRows : nullptr;
      for (int64_t i = 0; i < groups * kPanelRows; ++i) {
        offsets[i] = kLeft + (zero ? static_cast<float>(zero[i]) : 0.0f);
      }
      block.offset = offsets;
    }
    constexpr int kOnce = Dot::template decode_once_rows<kind>;
    constexpr int kOnceOfIntel =
        kOnce < Dot::decode_once_rows_intel ? kOnce : Dot::decode_once_rows_intel;
    if constexpr (kDecodes && kOnceOfIntel <= kMaxRows) {
      if (rows >= (p.intel ? kOnceOfIntel : kOnce)) {
        constexpr int kWords = kWordsOfX<Dot, kind>;
        alignas(64) uint32_t operands[kMostCodes<Dot, kind> / kCodes * kWords * kPanelRows];
        for (int64_t i = 0; i < words * kPanelRows; i += Dot::kLanes) {
          const int64_t kw = i / kPanelRows, n = i % kPanelRows;
          decode_word<Dot, kind>(Dot::load_words(block.words + i),
                                 operands + kw * kWords * kPanelRows + n * Dot::kOperandWords);
        }
        block.operands = operands;
        multiply_rows<Dot, kind, true, scaled, Dot::kManyRows>(
            block, in, small ? Dot::kRowsWithTotals : Dot::kManyRows, totals);
        continue;
      }
    }
    constexpr int kMost = kDecodes ? Dot::template decoding_rows<kind> : Dot::kPassRows;
    multiply_rows<Dot, kind, false, scaled, kMost>(block, in,
                                                   rows <= kMost ? kMost : Dot::kManyRows, totals);
  }
}

template <class Dot, WeightKind kind>
static void panel_of(const GemmPanel& p, const GemmInput& in, int64_t rows, float* totals) {
  (in.scales ? panel<Dot, kind, true> : panel<Dot, kind, false>)(p, in, rows, totals);
}

}  // namespace
}  // namespace fewbits
