#include "elementwise/elementwise.h"
#include "elementwise/kernel.h"

namespace fewbits {

void rms_norm_avx2(const float* x, const float* weight, float* y, int64_t rows, int64_t H,
                   float eps, float offset) {
  rms_norm_rows(x, weight, y, rows, H, eps, offset);
}

void gated_avx2(const float* gate, const float* up, float* y, int64_t count, Gating gating) {
  gated_range(gate, up, y, count, gating);
}

void exp_negative_avx2(const float* x, float* y, int64_t count) { exp_range(x, y, count); }

int64_t argmax_avx2(const float* x, int64_t count) { return first_largest(x, count); }

float exp_sum_avx2(const float* x, int64_t count, float largest) {
  return exp_sum_range(x, count, largest);
}

}  // namespace fewbits
