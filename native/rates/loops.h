// Loops of nothing but one instruction, a file per tier.
//
// Twelve independent sums stay in registers: each instruction waits for none of the eleven before
// it, and four or five cycles are over when its own sum comes round. An array of sums in a loop may
// live in memory, and then shows half of the peak.
#pragma once

#include <stdint.h>

#define FEWBITS_TWELVE(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)

namespace fewbits {

constexpr int kRateSums = 12;

void rate_f32_avx2(int64_t steps);
void rate_int8_avx_vnni(int64_t steps);
void rate_f32_avx512(int64_t steps);
void rate_bf16_avx512(int64_t steps);
void rate_int8_avx512(int64_t steps);

}  // namespace fewbits
