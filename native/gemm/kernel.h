// The contract between the driver (gemm.cc) and the kernels of a tier (gemm_<tier>.cc).
//
// A weight [N, K] lies in panels of 64 rows. Along K, a row is a sequence of 32-bit words with the
// lowest k in the lowest bits; word `kw` of a panel's 64 rows is four cache lines, and the panel is
// read once from front to back:
//
//   panel 0   kw 0   | row 0 | row 1 | row 2 | ...                        | row 63 |   64 x uint32
//   = 256 bytes
//             kw 1   | row 0 | row 1 | ...
//             ...
//   panel 1   kw 0   | row 64 | row 65 | ...
//
//   int4 word   bits  0-3: code of k, 4-7: k+1, ... 28-31: k+7        int8 word   bits 0-7: k, ...
//   24-31: k+3 bf16, f16   bits 0-15: k, 16-31: k+1                              f32         k
//
// K is padded with zero bits up to a whole word, N with zero rows up to a whole panel. Scales and
// zero points are float32 [panel][group][64].
//
// Codes are offset-binary, and kernels decode them to code - 2^(bits-1); stored zero points are
// relative to that too, so a symmetric weight has none and nothing cancels.
//
// Order of accumulation, the same for every row of x whatever its company: a group of more than
// kSpanCodes codes is cut into spans. Within a span the products are added one by one (or pair by
// pair) along K, in float32; then
//   total += scale * (partial - zero * sum of the span's x).
// Kernels may take several rows or panels' tiles at once, but never change this order.
#pragma once

#include <stdint.h>

namespace fewbits {

enum class WeightKind { int4, int8, bf16, f16, f32 };

static constexpr int codes_per_word(WeightKind kind) {
  return kind == WeightKind::int4   ? 8
         : kind == WeightKind::int8 ? 4
         : kind == WeightKind::f32  ? 1
                                    : 2;
}

constexpr int kPanelRows = 64;

// A span's partial sums stay in registers; 512 codes of a panel and of 256 rows of x fit the
// second-level cache.
constexpr int kSpanCodes = 512;

// Rows of x that a kernel is given at once.
constexpr int kMaxRows = 256;

// A kernel may read, and ignore the result of, this many prepared rows behind the last.
constexpr int kRowPadding = 3;

struct Span {
  int32_t word_begin;
  int32_t word_end;
  int32_t group;
};

struct SpanList {
  const Span* spans;
  int64_t count;
  int codes_per_word;
};

struct GemmPanel {
  const uint32_t* words;  // [words per row][64]
  const float* scale;     // [groups][64]
  const float* zero;      // [groups][64], or null
  SpanList list;
};

// Rows of x as the kernel's `prepare` left them; padded with zeros to whole words.
struct GemmInput {
  const float* values;  // [rows + kRowPadding][value_stride]; kernels on bf16 keep two values in
                        // each float's bits
  int64_t value_stride;
  const float*
      sums;  // [rows + kRowPadding][sum_stride]: sum of x per span, or null where not asked for
  int64_t sum_stride;
};

struct GemmKernel {
  // Adds the products of `rows` prepared rows with one panel to totals [rows + kRowPadding][64].
  void (*panel)(const GemmPanel& panel, const GemmInput& input, int64_t rows, float* totals);
  // Prepares one row of x [K]; `sums` may be null.
  void (*prepare)(const float* x, int64_t K, const SpanList& list, float* values, float* sums);
  int values_per_float;      // of a prepared row
  bool sums_when_symmetric;  // the decoder leaves an offset in the codes that the sums take out
                             // again
};

// Each returns null where the tier has no kernel of its own for the kind.
const GemmKernel* gemm_kernel_ref(WeightKind kind);
const GemmKernel* gemm_kernel_avx2(WeightKind kind);
const GemmKernel* gemm_kernel_avx512(WeightKind kind);
const GemmKernel* gemm_kernel_avx512_bf16(WeightKind kind);

// The `prepare` of all kernels that take x as it is.
void gemm_prepare_float(const float* x, int64_t K, const SpanList& list, float* values,
                        float* sums);

// The end of the block of spans, starting at `begin`, over which a kernel passes all rows before it
// goes on.
static inline int64_t span_block_end(const SpanList& list, int64_t begin) {
  const int32_t limit = list.spans[begin].word_begin + kSpanCodes / list.codes_per_word;
  int64_t end = begin + 1;
  while (end < list.count && list.spans[end].word_end <= limit) ++end;
  return end;
}

}  // namespace fewbits
