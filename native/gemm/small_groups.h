// Products with groups of sixteen codes, NVFP4's.
//
// A row of x takes sixteen dots for a span of so few, and twelve operations more to scale what they
// make and to add it up. The span's operands stay in registers while all rows pass, so that a row's
// sums live only as long as its turn, and the weight's scales are widened beside the dots. That
// takes 13 to 20 % less time than passes as other groups have, which keep the sums of several rows.
#pragma once

#include "gemm/block.h"

namespace fewbits {
namespace {

constexpr int kSmallWords = 2;        // of a row in a span
constexpr int kHeldOperands = 16;     // half of AVX-512's registers
constexpr int64_t kRowsInTurn = 16;   // as many as find x and totals in the first-level cache
constexpr int64_t kScalesAhead = 32;  // groups

template <class Dot, WeightKind kind>
constexpr int kSmallOperands = kSmallWords * Dot::template steps<kind>;
template <class Dot, WeightKind kind>
constexpr int kSmallTiles = kHeldOperands / kSmallOperands<Dot, kind>;

template <class Dot, WeightKind kind>
constexpr bool takes_small_groups() {
  return kind == WeightKind::fp4 && Dot::kLanes == 16 && kSmallTiles<Dot, kind> > 1;
}

// Where half of a panel is taken at a time, a row or two are multiplied faster with all of it.
template <class Dot, WeightKind kind>
bool has_small_groups(const GemmPanel& p, int64_t rows) {
  if (p.scale_kind != ScaleKind::e4m3 || p.shared) return false;
  if (kSmallTiles<Dot, kind> * Dot::kLanes < kPanelRows && rows < 3) return false;
  return p.list.span_words == kSmallWords;
}

template <class Dot, WeightKind kind, int tiles, int step = 0>
FEWBITS_INLINE void decode_steps(const typename Dot::Words (&words)[tiles],
                                 typename Dot::Operand (*operands)[tiles]) {
  for (int t = 0; t < tiles; ++t) operands[step][t] = Dot::template decode<kind, step>(words[t]);
  if constexpr (step + 1 < Dot::template steps<kind>) {
    decode_steps<Dot, kind, tiles, step + 1>(words, operands);
  }
}

// Spans [begin, end) times `rows` rows of x, from row m on, for the strip of the panel that starts
// at row n.
// `one`: of one row, whose totals stay in registers; from the cache that takes 11 % less time.
// AMD's cores then read ahead by themselves: asking for every line and for scales would hold that
// up.
template <class Dot, WeightKind kind, bool scaled, bool one>
__attribute__((noinline)) static void multiply_small_groups(const GemmPanel& p, const GemmInput& in,
                                                            int64_t begin, int64_t end, int64_t m,
                                                            int64_t rows, int n, float* totals) {
  constexpr int kOperands = kSmallOperands<Dot, kind>, kTiles = kSmallTiles<Dot, kind>;
  constexpr int kSteps = Dot::template steps<kind>;
  const int64_t x_stride = in.value_stride, span_stride = in.span_stride;
  const uint32_t* const panel_end = p.words + p.list.count * kSmallWords * kPanelRows;
  const uint32_t* words = p.words + begin * kSmallWords * kPanelRows;
  const Ahead ahead = following_words(words, panel_end, p.next, !one);
  words += n;
  const uint32_t* x = in.values + m * x_stride + begin * kOperands;
  int64_t first_place = m * span_stride + begin;
  const uint32_t* asked = ahead.first();
  typename Dot::Float kept[kTiles];
  for (int t = 0; one && t < kTiles; ++t) kept[t] = Dot::load(totals + n + t * Dot::kLanes);
  for (int64_t s = begin; s < end; ++s, ++first_place, x += kOperands) {
    typename Dot::Operand weights[kOperands][kTiles];
    for (int w = 0; w < kSmallWords; ++w, words += kPanelRows) {
      asked = ahead.ask(asked, !one);
      typename Dot::Words row[kTiles];
      for (int t = 0; t < kTiles; ++t) {
        row[t] = Dot::load_words(words + t * Dot::kLanes);
        // Else GCC loads each word twice, which keeps the core from reading ahead.
        if constexpr (one) asm("" : "+v"(row[t]));
      }
      decode_steps<Dot, kind, kTiles>(row, weights + w * kSteps);
    }
    const auto* const codes =
        static_cast<const uint8_t*>(p.scale) + int64_t{p.list.spans[s].group} * kPanelRows;
    if constexpr (!one) _mm_prefetch(codes + kScalesAhead * kPanelRows, _MM_HINT_T0);
    alignas(64) float scales[kPanelRows];
    Dot::widen_e4m3(codes, kPanelRows, scales);
    typename Dot::Float scale[kTiles];
    for (int t = 0; t < kTiles; ++t) scale[t] = Dot::load(scales + n + t * Dot::kLanes);
    const uint32_t* value = x;
    int64_t place = first_place;
    float* total = totals + m * kPanelRows + n;
    for (int64_t i = 0; i < (one ? 1 : rows); ++i) {
      typename Dot::Operand values[kOperands];
      for (int j = 0; j < kOperands; ++j) values[j] = Dot::broadcast(value + j);
      for (int t = 0; t < kTiles; ++t) {
        typename Dot::Sum sum;
        if constexpr (Dot::kIntegers) {
          sum = Dot::broadcast(in.sums + place);
        } else {
          sum = Dot::zero();
        }
        for (int j = 0; j < kOperands; ++j) sum = Dot::dot(sum, weights[j][t], values[j]);
        typename Dot::Float partial = Dot::to_float(sum);
        if constexpr (scaled) partial = Dot::mul(partial, Dot::set1(in.scales[place]));
        if constexpr (one) {
          kept[t] = Dot::fmadd(scale[t], partial, kept[t]);
        } else {
          float* const to = total + t * Dot::kLanes;
          Dot::store(to, Dot::fmadd(scale[t], partial, Dot::load(to)));
        }
      }
      value += x_stride;
      place += span_stride;
      total += kPanelRows;
    }
  }
  for (int t = 0; one && t < kTiles; ++t) Dot::store(totals + n + t * Dot::kLanes, kept[t]);
}

// Rows that come in one turn are multiplied with the whole panel, which takes 1 to 4 % less time
// than block by block.
template <class Dot, WeightKind kind, bool scaled>
void multiply_small_groups(const GemmPanel& p, const GemmInput& in, int64_t all_rows,
                           float* totals) {
  const int64_t spans = all_rows > kRowsInTurn ? kBlockSpans : p.list.count;
  for (int64_t begin = 0; begin < p.list.count; begin += spans) {
    const int64_t end = p.list.count - begin < spans ? p.list.count : begin + spans;
    for (int64_t m = 0; m < all_rows; m += kRowsInTurn) {
      const int64_t rows = all_rows - m < kRowsInTurn ? all_rows - m : kRowsInTurn;
      for (int n = 0; n < kPanelRows; n += kSmallTiles<Dot, kind> * Dot::kLanes) {
        // Not by a pointer: here GCC sees that there is one strip.
        if (all_rows == 1 && !p.intel) {
          multiply_small_groups<Dot, kind, scaled, true>(p, in, begin, end, m, rows, n, totals);
        } else {
          multiply_small_groups<Dot, kind, scaled, false>(p, in, begin, end, m, rows, n, totals);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fewbits
