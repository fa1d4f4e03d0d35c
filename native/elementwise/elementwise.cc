#include "elementwise/elementwise.h"

#include <math.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu.h"
#include "elementwise/numbers.h"
#include "threads.h"

namespace fewbits {
namespace {

// Below this many elements a call takes a core at most 10 us (gated on Zen 4), and waking the
// pool costs more than it saves.
constexpr int64_t kParallel = 1 << 15;

// Work is handed out in pieces of this many elements.
constexpr int64_t kPiece = 4096;

const ElementwiseKernels& kernels() {
  static const ElementwiseKernels chosen = [] {
#if defined(__x86_64__)
    if (tier() >= Tier::avx512)
      return ElementwiseKernels{rms_norm_avx512, gated_avx512, exp_negative_avx512, argmax_avx512,
                                exp_sum_avx512};
    if (tier() >= Tier::avx2)
      return ElementwiseKernels{rms_norm_avx2, gated_avx2, exp_negative_avx2, argmax_avx2,
                                exp_sum_avx2};
#endif
    return ElementwiseKernels{rms_norm_ref, gated_ref, exp_negative_ref, argmax_ref, exp_sum_ref};
  }();
  return chosen;
}

uint16_t read_u16(const uint8_t* source) {
  uint16_t value;
  __builtin_memcpy(&value, source, 2);
  return value;
}

constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

// Column k of a row of codes.
float read_code(EmbeddingKind kind, const uint8_t* codes, int64_t k) {
  switch (kind) {
    case EmbeddingKind::int4:
      return static_cast<float>(codes[k / 2] >> (k % 2 * 4) & 15);
    case EmbeddingKind::int8:
      return static_cast<float>(codes[k]);
    case EmbeddingKind::fp4:
      return kE2m1[codes[k / 2] >> (k % 2 * 4) & 15];
    case EmbeddingKind::fp8:
      return from_fp8(codes[k]);
    case EmbeddingKind::bf16:
      return from_bf16(read_u16(codes + 2 * k));
    case EmbeddingKind::f16:
      return from_f16(read_u16(codes + 2 * k));
    case EmbeddingKind::f32:
      break;
  }
  float value;
  __builtin_memcpy(&value, codes + 4 * k, 4);
  return value;
}

int64_t row_bytes(EmbeddingKind kind, int64_t K) {
  switch (kind) {
    case EmbeddingKind::int4:
    case EmbeddingKind::fp4:
      return (K + 1) / 2;
    case EmbeddingKind::int8:
    case EmbeddingKind::fp8:
      return K;
    case EmbeddingKind::bf16:
    case EmbeddingKind::f16:
      return 2 * K;
    case EmbeddingKind::f32:
      break;
  }
  return 4 * K;
}

// The code that stands for 0 where no zero points are stored.
float middle(EmbeddingKind kind) {
  return kind == EmbeddingKind::int4 ? 8.0f : kind == EmbeddingKind::int8 ? 128.0f : 0.0f;
}

void read_row(const EmbeddingTable& table, int64_t row, float* y) {
  const int64_t K = table.K;
  const uint8_t* codes = table.codes + row * row_bytes(table.kind, K);
  for (int64_t k = 0; k < K; ++k) y[k] = read_code(table.kind, codes, k);
  if (!table.scale) return;
  const int64_t groups = (K + table.group_size - 1) / table.group_size;
  for (int64_t group = 0; group < groups; ++group) {
    const float scale = table.scale[row * groups + group];
    const float zero = table.zero ? table.zero[row * groups + group] : middle(table.kind);
    const int64_t end = group + 1 < groups ? (group + 1) * table.group_size : K;
    for (int64_t k = group * table.group_size; k < end; ++k) y[k] = (y[k] - zero) * scale;
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

void gated(const float* gate, const float* up, float* y, int64_t T, int64_t I, Gating gating) {
  const int64_t count = T * I;
  auto pieces = [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPiece, last = end * kPiece < count ? end * kPiece : count;
    kernels().gated(gate + first, up + first, y + first, last - first, gating);
  };
  for_range((count + kPiece - 1) / kPiece, count >= kParallel, pieces);
}

void scale_by_sigmoid(float* x, const float* gate, int64_t T, int64_t heads, int64_t width) {
  auto all_heads = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const float factor = static_cast<float>(1 / (1 + exp(-static_cast<double>(gate[head]))));
      float* const values = x + head * width;
      for (int64_t i = 0; i < width; ++i) values[i] *= factor;
    }
  };
  for_range(T * heads, T * heads * width >= kParallel, all_heads);
}

void argmax(const float* x, int64_t R, int64_t V, int64_t* columns) {
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) columns[row] = kernels().argmax(x + row * V, V);
  };
  for_range(R, R * V >= kParallel, rows);
}

void check_columns(int64_t V, const std::vector<int64_t>& ids, bool among) {
  const auto in_row = [&](int64_t id) { return id >= 0 && id < V; };
  const bool fits = among ? !ids.empty() && std::all_of(ids.begin(), ids.end(), in_row)
                          : ids.empty() || static_cast<int64_t>(ids.size()) == V;
  if (!fits) throw std::invalid_argument("the tokens of columns don't fit logits");
}

void best_tokens(const float* x, int64_t R, int64_t V, const std::vector<int64_t>& ids, bool among,
                 int64_t* tokens, const float* before, float* after) {
  const int64_t count = among ? static_cast<int64_t>(ids.size()) : V;
  auto rows = [&](int64_t begin, int64_t end) {
    std::vector<float> some(among ? count : 0);
    for (int64_t row = begin; row < end; ++row) {
      const float* values = x + row * V;
      for (int64_t j = 0; among && j < count; ++j) some[j] = values[ids[j]];
      if (among) values = some.data();
      const int64_t best = kernels().argmax(values, count);
      after[row] = before[row] / kernels().exp_sum(values, count, values[best]);
      tokens[row] = ids.empty() ? best : ids[best];
    }
  };
  for_range(R, R * count >= kParallel, rows);
}

void rms_norm_row(const float* x, const float* weight, float* y, int64_t H, float eps,
                  float offset) {
  kernels().rms_norm(x, weight, y, 1, H, eps, offset);
}

void gated_row(const float* gate, const float* up, float* y, int64_t I, Gating gating) {
  kernels().gated(gate, up, y, I, gating);
}

void exp_negative(const float* x, float* y, int64_t count) { kernels().exp_negative(x, y, count); }

void check_id(const EmbeddingTable& table, int64_t id) {
  if (id >= 0 && id < table.rows) return;
  throw std::invalid_argument("token id " + std::to_string(id) + " is not among the " +
                              std::to_string(table.rows) + " rows of the embedding");
}

void gather_rows(const EmbeddingTable& table, const int64_t* ids, int64_t T, float* y) {
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) read_row(table, ids[t], y + t * table.K);
  };
  for_range(T, T * table.K >= kParallel, rows);
}

}  // namespace fewbits
