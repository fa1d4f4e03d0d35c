// Row-wise operations on float32: RMS norm, the gated activation, embedding rows, the likeliest
// token.
//
// Each row is computed in an order that depends on nothing but its length.
#pragma once

#include <stdint.h>

#include <vector>

namespace fewbits {

// y = x / sqrt(mean(x^2) + eps) * (weight + offset), rows of [T, H]. y may be x.
void rms_norm(const float* x, const float* weight, float* y, int64_t T, int64_t H, float eps,
              float offset);

// How gate and up become one. silu: gate / (1 + e^-gate) * up; with a limit > 0 the first factor is
// at most that, and up is brought to [-limit, limit]. swiglu_oai: gate / (1 + e^-1.702gate) * (up +
// 1), gate and up bounded before.
struct Gating {
  enum class Kind { silu, swiglu_oai } kind = Kind::silu;
  float limit = 0;
};

// [T, I]; y may be gate or up.
void gated(const float* gate, const float* up, float* y, int64_t T, int64_t I, Gating gating);

// x[t][h][:] *= 1 / (1 + e^-gate[t][h]), x [T, heads, width].
void scale_by_sigmoid(float* x, const float* gate, int64_t T, int64_t heads, int64_t width);

// Of each row of [R, V] the column of the first NaN, or else of the first of the largest. V > 0.
void argmax(const float* x, int64_t R, int64_t V, int64_t* columns);

// The tokens of these, and after = before times the probability that softmax gives them. Column j
// is token ids[j], or where there are none j. `among`: of the columns `ids` alone, which have their
// tokens' numbers.
void best_tokens(const float* x, int64_t R, int64_t V, const std::vector<int64_t>& ids, bool among,
                 int64_t* tokens, const float* before, float* after);

// Throws std::invalid_argument where rows of V numbers don't have these columns.
void check_columns(int64_t V, const std::vector<int64_t>& ids, bool among);

// One row, in the calling thread.
void rms_norm_row(const float* x, const float* weight, float* y, int64_t H, float eps,
                  float offset);
void gated_row(const float* gate, const float* up, float* y, int64_t I, Gating gating);

// y = e^x for x <= 0, at most 1.03 ulp off; 0 below -87.
void exp_negative(const float* x, float* y, int64_t count);

// int4, fp4 (e2m1): two codes in a byte, the lower one first. Integer codes are unsigned; without
// zero points the zero is 8 (int4) or 128 (int8). fp8 is e4m3fn.
enum class EmbeddingKind : int { int4, int8, fp4, fp8, bf16, f16, f32 };

struct EmbeddingTable {
  EmbeddingKind kind;
  const uint8_t* codes;  // [rows, bytes of K codes]; needs no alignment
  int64_t rows, K;
  const float* scale;  // [rows, groups] or null
  const float* zero;   // [rows, groups] or null; integers only
  int64_t group_size;
};

// Throws std::invalid_argument where the table has no such row.
void check_id(const EmbeddingTable& table, int64_t id);

// y[t] = row ids[t], dequantized: (code - zero) * scale. Every id must be a row.
void gather_rows(const EmbeddingTable& table, const int64_t* ids, int64_t T, float* y);

// The tiers.
struct ElementwiseKernels {
  void (*rms_norm)(const float* x, const float* weight, float* y, int64_t rows, int64_t H,
                   float eps, float offset);
  void (*gated)(const float* gate, const float* up, float* y, int64_t count, Gating gating);
  void (*exp_negative)(const float* x, float* y, int64_t count);
  int64_t (*argmax)(const float* x, int64_t count);
  float (*exp_sum)(const float* x, int64_t count, float largest);  // of e^(x - largest)
};

void rms_norm_ref(const float* x, const float* weight, float* y, int64_t rows, int64_t H, float eps,
                  float offset);
void gated_ref(const float* gate, const float* up, float* y, int64_t count, Gating gating);
void exp_negative_ref(const float* x, float* y, int64_t count);
int64_t argmax_ref(const float* x, int64_t count);
float exp_sum_ref(const float* x, int64_t count, float largest);
void rms_norm_avx2(const float* x, const float* weight, float* y, int64_t rows, int64_t H,
                   float eps, float offset);
void gated_avx2(const float* gate, const float* up, float* y, int64_t count, Gating gating);
void exp_negative_avx2(const float* x, float* y, int64_t count);
int64_t argmax_avx2(const float* x, int64_t count);
float exp_sum_avx2(const float* x, int64_t count, float largest);
void rms_norm_avx512(const float* x, const float* weight, float* y, int64_t rows, int64_t H,
                     float eps, float offset);
void gated_avx512(const float* gate, const float* up, float* y, int64_t count, Gating gating);
void exp_negative_avx512(const float* x, float* y, int64_t count);
int64_t argmax_avx512(const float* x, int64_t count);
float exp_sum_avx512(const float* x, int64_t count, float largest);

}  // namespace fewbits
