// Loops of nothing but one instruction, a file per tier.
#pragma once

#include <stdint.h>

namespace fewbits {

constexpr int kRateSums = 12;

// Twelve independent sums stay in registers: each instruction waits for none of the eleven before
// it, and four or five cycles are over when its own sum comes round. An array of sums in a loop may
// live in memory, and then shows half of the peak.
template <class Vector, class Instruction>
static inline void rate_loop(int64_t steps, Vector a, Instruction add) {
#define FEWBITS_TWELVE(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)
#define FEWBITS_SUM(i) Vector sum##i = a;
#define FEWBITS_ADD(i) add(sum##i, a);
  FEWBITS_TWELVE(FEWBITS_SUM)
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_ADD)
  }
#undef FEWBITS_ADD
#undef FEWBITS_SUM
#undef FEWBITS_TWELVE
}

void rate_f32_avx2(int64_t steps);
void rate_pairs_avx2(int64_t steps);
void rate_int8_avx_vnni(int64_t steps);
void rate_int16_avx_vnni(int64_t steps);
void rate_f32_avx512(int64_t steps);
void rate_pairs_avx512(int64_t steps);
void rate_bf16_avx512(int64_t steps);
void rate_int8_avx512(int64_t steps);
void rate_int16_avx512(int64_t steps);

}  // namespace fewbits
