#include "elementwise/elementwise.h"

#include "cpu.h"
#include "elementwise/numbers.h"
#include "threads.h"

namespace fewbits {
namespace {

// Below this many elements a call takes a core at most 10 us (silu_mul on Zen 4), and waking the
// pool costs more than it saves.
constexpr int64_t kParallel = 1 << 15;

// Work is handed out in pieces of this many elements.
constexpr int64_t kPiece = 4096;

const ElementwiseKernels& kernels() {
  static const ElementwiseKernels chosen = [] {
#if defined(__x86_64__)
    if (tier() >= Tier::avx512)
      return ElementwiseKernels{rms_norm_avx512, silu_mul_avx512, exp_negative_avx512};
    if (tier() >= Tier::avx2)
      return ElementwiseKernels{rms_norm_avx2, silu_mul_avx2, exp_negative_avx2};
#endif
    return ElementwiseKernels{rms_norm_ref, silu_mul_ref, exp_negative_ref};
  }();
  return chosen;
}

uint16_t read_u16(const uint8_t* source) {
  uint16_t value;
  __builtin_memcpy(&value, source, 2);
  return value;
}

void read_row(const EmbeddingTable& table, int64_t row, float* y) {
  const int64_t K = table.K;
  if (table.kind == EmbeddingKind::bf16 || table.kind == EmbeddingKind::f16) {
    const uint8_t* codes = table.codes + row * K * 2;
    const bool bf16 = table.kind == EmbeddingKind::bf16;
    for (int64_t k = 0; k < K; ++k) {
      const uint16_t code = read_u16(codes + 2 * k);
      y[k] = bf16 ? from_bf16(code) : from_f16(code);
    }
    return;
  }
  if (table.kind == EmbeddingKind::f32) {
    __builtin_memcpy(y, table.codes + row * K * 4, static_cast<size_t>(K) * 4);
    return;
  }
  const bool int4 = table.kind == EmbeddingKind::int4;
  const uint8_t* codes = table.codes + row * (int4 ? (K + 1) / 2 : K);
  const int64_t groups = (K + table.group_size - 1) / table.group_size;
  for (int64_t group = 0; group < groups; ++group) {
    const float scale = table.scale[row * groups + group];
    const float zero = table.zero ? table.zero[row * groups + group] : int4 ? 8.0f : 128.0f;
    const int64_t end = group + 1 < groups ? (group + 1) * table.group_size : K;
    for (int64_t k = group * table.group_size; k < end; ++k) {
      const uint8_t code = int4 ? codes[k / 2] >> (k % 2 * 4) & 15 : codes[k];
      y[k] = (static_cast<float>(code) - zero) * scale;
    }
  }
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* y, int64_t T, int64_t H, float eps,
              float offset) {
  auto rows = [&](int64_t begin, int64_t end) {
    kernels().rms_norm(x + begin * H, weight, y + begin * H, end - begin, H, eps, offset);
  };
  for_range(T, T * H >= kParallel, rows);
}

void silu_mul(const float* gate, const float* up, float* y, int64_t T, int64_t I) {
  const int64_t count = T * I;
  auto pieces = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < count ? end * kPiece : count;
    kernels().silu_mul(gate + first, up + first, y + first, last - first);
  };
  for_range((count + kPiece - 1) / kPiece, count >= kParallel, pieces);
}

void exp_negative(const float* x, float* y, int64_t count) { kernels().exp_negative(x, y, count); }

void gather_rows(const EmbeddingTable& table, const int64_t* ids, int64_t T, float* y) {
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) read_row(table, ids[t], y + t * table.K);
  };
  for_range(T, T * table.K >= kParallel, rows);
}

}  // namespace fewbits
