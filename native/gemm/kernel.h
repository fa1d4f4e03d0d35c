// The contract between the driver (gemm.cc) and the kernels of a tier (gemm_<tier>.cc).
//
// A weight [N, K] lies in panels of 64 rows. Along K, a row is a sequence of 32-bit words with the
// lowest k in the lowest bits; word `kw` of a panel's 64 rows is four cache lines, and the panel is
// read once from front to back:
//
//   panel 0   kw 0   | row 0 | row 1 | row 2 | ...                        | row 63 |   256 bytes
//             kw 1   | row 0 | row 1 | ...
//             ...
//   panel 1   kw 0   | row 64 | row 65 | ...
//
//   int4, fp4 word    bits  0-3: code of k, 4-7: k+1, ... 28-31: k+7
//   int8, fp8 word    bits  0-7: code of k, 8-15: k+1, 16-23: k+2, 24-31: k+3
//   bf16, f16 word    bits 0-15: k, 16-31: k+1
//   f32 word          k
//
// K is padded with zero bits up to a whole word, N with zero rows up to a whole panel. Scales are
// [panel][group][64] in the type they were stored in, or [panel][group][1] where all rows of each
// panel share theirs; zero points are int8 [panel][group][64].
//
// Integer codes are offset-binary and stand for code - 2^(bits-1); stored zero points are relative
// to that too. fp4 is e2m1, fp8 e4m3fn.
//
// A row of x is prepared as 32-bit words too. A kernel takes a word of codes apart in `steps`, each
// an operand of 32 bits a row that one dot instruction multiplies with a word of x, or of 64 bits
// and two words. Step p of C codes holds the codes p, p + steps, p + 2 steps ... of the word, and
// so does x:
//
//   x words      values   int4, fp4 (C = 8)                          int8, fp8 (C = 4)
//   f32          1        k | k+1 | ... | k+7                        k | k+1 | k+2 | k+3
//   bf16         2        k,k+4 | k+1,k+5 | k+2,k+6 | k+3,k+7        k,k+1 and k+2,k+3
//   s16          2        as bf16                                    k,k+2 | k+1,k+3
//   s8           4        k,k+2,k+4,k+6 | k+1,k+3,k+5,k+7            k,k+1,k+2,k+3
//
// Order of accumulation, the same for every row of x whatever its company: K is cut into spans, at
// the borders of groups (the weight's and those of x's own scales) and at most `span_codes` long.
// Within a span the products are added one by one (or pair by pair; of two words every other pair,
// and both sums at last) along K, in float32, or exactly in int32; then
//   total += scale * (x scale * (partial - offset * sum of the span's x)),
// where what is left in integer codes is taken out of the partial sum itself, exactly.
// Kernels may take several rows or tiles at once, but never change this order.
#pragma once

#include <stdint.h>

namespace fewbits {

enum class WeightKind { int4, int8, fp4, fp8, bf16, f16, f32 };
constexpr int kWeightKinds = 7;

// What x is multiplied as: floats (bfloat16 or float32, by tier), or integers of eight or sixteen
// bits with integer codes. fp4 with fp4 are integers of eight bits too, once both are doubled; in
// the ref tier, which multiplies them as floats, the products are as exact.
enum class DotKind { floats, int8, int16 };

enum class ScaleKind { none, f32, bf16, f16, e4m3, e8m0 };

static constexpr int codes_per_word(WeightKind kind) {
  switch (kind) {
    case WeightKind::int4:
    case WeightKind::fp4:
      return 8;
    case WeightKind::int8:
    case WeightKind::fp8:
      return 4;
    case WeightKind::bf16:
    case WeightKind::f16:
      return 2;
    case WeightKind::f32:
      break;
  }
  return 1;
}

constexpr int kPanelRows = 64;

// A span's partial sums stay in registers. 512 codes of a panel fit the second-level cache with 256
// rows of x and what decoding makes of them. Integers of eight bits that are multiplied as they lie
// are as many as fit there; a span of 2048 of them takes 3 to 5 % less time than four of 512.
constexpr int kSpanCodes = 512;
constexpr int kLongSpanCodes = 2048;

// Products of 16 bits with 8 that int32 holds the sum of.
constexpr int kMaxInt16Codes = 256;

// Spans that a kernel passes all rows over before it goes on: at most these many, and as long
// together as one may be.
constexpr int kBlockSpans = 32;

// Rows of x that a kernel is given at once.
constexpr int kMaxRows = 256;
constexpr int kNever = kMaxRows + 1;

struct Span {
  int32_t word_begin;
  int32_t word_end;
  int32_t group;  // of the weight's parameters
};

struct SpanList {
  const Span* spans;
  int64_t count;
  int64_t span_words;  // of each, or 0 where they differ
};

struct GemmPanel {
  const uint32_t* words;  // [words per row][64]
  const uint32_t* next;   // of the panel that the thread is likely to read after this one
  const void* scale;      // [groups][64], or [groups] where `shared`; null for ScaleKind::none
  ScaleKind scale_kind;
  bool shared;
  const int8_t* zero;  // [groups][64], or null
  SpanList list;
  bool intel;  // CpuFeatures'
};

// Rows of x as the kernel's `prepare` left them; padded with zeros to whole words of the weight.
struct GemmInput {
  const uint32_t* values;  // [rows][value_stride]
  int64_t value_stride;
  const uint32_t* sums;  // [rows][span_stride]: the kernel's `sums`, or null
  const float* scales;   // [rows][span_stride]: scale of x per span, or null
  int64_t span_stride;
};

// How x becomes the numbers that are multiplied: each kind's formula is that of the reference
// (kernels/reference/activations.py), in float32, so that its codes are the reference's.
enum class Quantizer {
  none,
  int8_token,
  int8_token_asymmetric,
  int8_static,
  int8_static_asymmetric,
  int8_group,
  int16_group,
  fp8_token,
  fp8_static,
  fp8_group,
  nvfp4,
  mxfp4,
  mxfp6,
  mxfp6e3m2,
  mxfp8,
};

// What becomes of the fraction of a group's largest magnitude where a power of two is its scale:
// "even" rounds it as an element would be.
enum class ScaleRounding { even, floor, ceil };

struct Activation {
  Quantizer quantizer = Quantizer::none;
  int64_t group_size = 0;   // columns that share a scale; 0 where the whole row does
  float scale = 1;          // static kinds
  float zero = 0;           // int8_static_asymmetric
  double global_scale = 1;  // nvfp4: a multiplier
  ScaleRounding scale_rounding = ScaleRounding::even;  // mxfp4, mxfp6, mxfp6e3m2
  bool operator==(const Activation&) const = default;
};

// Where the rows of a product go.
struct Target {
  float* y;  // row 0, column 0
  int64_t stride;
  bool add;                         // to what y holds
  const int32_t* places = nullptr;  // [rows]: row m is y's row places[m]; null: m
  const float* weights = nullptr;   // [rows]: what a row is multiplied with at last, or null

  Target from_column(int64_t n) const { return {y + n, stride, add, places, weights}; }
  Target from_row(int64_t m) const {
    return {places ? y : y + m * stride, stride, add, places ? places + m : nullptr,
            weights ? weights + m : nullptr};
  }
};

// What a pass makes of its totals.
struct GemmOutput {
  Target target;
  int64_t columns;           // of the panel that exist
  const float* factor;       // [rows]: what totals are multiplied with
  const float* row_zero;     // [rows] zero points of x, or null
  const float* weight_sums;  // [64] sums of the dequantized weights' rows; read where row_zero is
  const float* bias;         // [64] or null
};

struct GemmKernel {
  // Adds the products of `rows` prepared rows with one panel to totals [rows][64].
  void (*panel)(const GemmPanel& panel, const GemmInput& input, int64_t rows, float* totals);
  // Words of a row of x [K]; what lies behind K in the last word of the weight is zero.
  void (*prepare)(const float* x, int64_t K, uint32_t* values);
  // The sums of x over each span: floats, or of integers int32, times minus what decoding leaves in
  // a code. Null where `panel` doesn't read them.
  void (*sums)(const uint32_t* values, const SpanList& list, uint32_t* sums);
  int x_words;     // for a word of the weight
  int span_codes;  // the longest span
  bool doubled;    // codes and x are multiplied doubled: totals are four times what they stand for
};

// What a tier does to rows of floats around the products.
struct RowKernels {
  // x [K] → codes [K] as floats, and one scale per group of x. Where codes become integers, which
  // can't be NaN, the scale is.
  void (*quantize)(const Activation& activation, const float* x, int64_t K, float* codes,
                   float* scales, float* zero);
  void (*finish)(const GemmOutput& output, int64_t rows, const float* totals);
};

// Each returns null where the tier has no kernel of its own.
const GemmKernel* gemm_kernel_ref(WeightKind kind, DotKind dot);
const GemmKernel* gemm_kernel_avx2(WeightKind kind, DotKind dot);
const GemmKernel* gemm_kernel_avx2_vnni(WeightKind kind, DotKind dot);
const GemmKernel* gemm_kernel_avx512(WeightKind kind, DotKind dot);
const GemmKernel* gemm_kernel_avx512_vnni(WeightKind kind, DotKind dot);
const GemmKernel* gemm_kernel_avx512_bf16(WeightKind kind, DotKind dot);

const RowKernels* row_kernels_ref();
const RowKernels* row_kernels_avx2();
const RowKernels* row_kernels_avx512();

// The end of the block of spans, starting at `begin`, over which a kernel passes all rows before it
// goes on.
static inline int64_t span_block_end(const SpanList& list, int64_t begin, int most_words) {
  const int32_t limit = list.spans[begin].word_begin + most_words;
  int64_t end = begin + 1;
  while (end < list.count && end < begin + kBlockSpans && list.spans[end].word_end <= limit) ++end;
  return end;
}

}  // namespace fewbits
