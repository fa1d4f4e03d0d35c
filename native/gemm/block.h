// What passes over a panel are written with: a tier's operations, and the part of a panel that is
// multiplied with all rows of x before the next.
//
// A tier's `Dot` says what one step is:
//
//   kLanes             rows of the panel in a register
//   kPassRows          rows of x that are taken at once at most
//   kManyRows          rows that are taken at once where there are more
//   tiles<rows>        registers of words that are taken at once with so many rows of x
//   kSumsBesideX       sums that leave registers for words of x; of more some are in memory, and
//                      dots read x from there (dot_memory)
//   kRowsBesideWords   rows whose sums fit the registers beside the words of the weight
//   kRowsWithTotals    and beside their totals
//   decoding_rows<kind>     rows of x that are taken at once while codes are decoded into registers
//   decode_once_rows<kind>  from this many rows on, codes are decoded into memory once instead
//   decode_once_rows_intel  and on Intel's cores at the latest from this many: there all that 512
//                           bits do takes turns on two pipes, AMD's have four of which two multiply
//   Words, Operand, Sum, Float
//   kOperandWords      words of x that an operand is multiplied with, and that a row has in it
//   load_words(p), load_operand(p), store_operand(p, operand), broadcast(x)
//   steps<kind>        operands of a word
//   decode_operations<kind>  that all steps of a word take
//   kIntegers          sums are integers, begin at what takes the offset out of them, and are
//                      Operands
//   offset<kind>       what decoding leaves in a code
//   doubled<kind>      decoded codes are twice what they stand for
//   decode<kind, step>(words), dot(sum, operand, x), dot_memory(sum, operand, address of x);
//   to_float(sum); zero() of floats
//   load, store, set1, mul, fmadd, fnmadd   on Float
//   widen_e4m3(codes, count, floats)   whole rows of a panel's scales
#pragma once

#include <immintrin.h>

#include "gemm/kernel.h"
#include "gemm/numbers.h"

#define FEWBITS_INLINE static inline __attribute__((always_inline))
#define FEWBITS_MEMBER inline __attribute__((always_inline))

namespace fewbits {
namespace {

// Weights are asked for ahead, across the end of a panel into the next one, and only for the
// second-level cache: the hardware's own prefetcher follows what misses the first. A pass that is
// all that a block gets asks for what it reads this many words later (bench/log.md has what other
// distances cost).
constexpr int kPrefetchWords = 24;
constexpr int kLineRows = 16;  // rows of a panel in a cache line
constexpr int kPanelLines = kPanelRows / kLineRows;

constexpr int kAllSums = kNever * kPanelRows;  // of a tier that reads x into registers always

// Some spans of a panel. `words` and `operands` begin at the first word of the first span, `scale`
// and `offset` at its group.
struct Block {
  const Span* begin;
  const Span* end;
  int64_t first_span;
  const uint32_t* words;     // of the weight, or
  const uint32_t* operands;  // decoded: [word][step][64 * kOperandWords]
  const float* scale;        // [groups][64]
  const float* offset;       // [groups][64] of zero points and of float sums, or null
  int64_t count;             // words of a row
  int64_t rows;              // of x that it is multiplied with
  const uint32_t* next;      // block's words
  bool intel;
};

// What a pass asks for with each line of words or operands that it reads: the cache line at
// `words`, or `all` of a word's rows, and `stride` further each time; what would be at `border` is
// at `next`.
struct Ahead {
  const uint32_t* words;
  int64_t stride;
  bool all;
  const uint32_t *border, *next;

  FEWBITS_MEMBER const uint32_t* first() const {
    return words < border ? words : next + (words - border);
  }

  // Asks for what is at `at`, `whole` or its first line, and returns what to ask for next.
  FEWBITS_MEMBER const uint32_t* ask(const uint32_t* at, bool whole) const {
    _mm_prefetch(at, _MM_HINT_T1);
    if (whole) {
      for (int i = 1; i < kPanelLines; ++i) _mm_prefetch(at + i * kLineRows, _MM_HINT_T1);
    }
    return at + stride == border ? next : at + stride;
  }
};

// Of a pass that is all that a block gets.
FEWBITS_INLINE Ahead following_words(const uint32_t* words, const uint32_t* border,
                                     const uint32_t* next, bool all) {
  return {words + kPrefetchWords * kPanelRows, kPanelRows, all, border, next};
}

// Words of x for a word of the weight.
template <class Dot, WeightKind kind>
constexpr int kWordsOfX = Dot::template steps<kind> * Dot::kOperandWords;

// What the compiler doesn't know the origin of any more, and so can't load anew.
template <class Register>
FEWBITS_INLINE void keep(Register& value) {
  asm("" : "+v"(value));
}

// Zero points and what decoding leaves in a code are taken out by the sums of x: of integer sums
// the latter at their beginning, where it costs nothing.
template <class Dot, WeightKind kind>
constexpr bool has_sums() {
  return Dot::template offset<kind> != 0 || kind == WeightKind::int4 || kind == WeightKind::int8;
}

// Whether something may be left to be taken out of a partial sum.
template <class Dot, WeightKind kind>
constexpr bool has_offsets() {
  return has_sums<Dot, kind>() && !(Dot::kIntegers && kind == WeightKind::fp4);
}

// From what a kernel's `sum` says.
template <class Dot, WeightKind kind>
FEWBITS_INLINE float sum_of_x(uint32_t sum) {
  if constexpr (Dot::kIntegers) {
    // Exact: the offset is a power of two where zero points are.
    constexpr float kFactor = -1.0f / Dot::template offset<kind>;
    return static_cast<float>(static_cast<int32_t>(sum)) * kFactor;
  } else {
    return from_bits(sum);
  }
}

}  // namespace
}  // namespace fewbits
