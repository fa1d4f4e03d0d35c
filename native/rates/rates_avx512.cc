// bf16 and int8 need more than this tier has; cpu.h says whether it is there.
#include <immintrin.h>

#include "rates/loops.h"

namespace fewbits {

void rate_f32_avx512(int64_t steps) {
  const __m512 a = _mm512_set1_ps(0.5f);
#define FEWBITS_SUM(i) auto sum##i = a;
  FEWBITS_TWELVE(FEWBITS_SUM)
#undef FEWBITS_SUM
#define FEWBITS_STEP(i) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum##i) : "v"(a));
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_STEP)
  }
#undef FEWBITS_STEP
}

void rate_bf16_avx512(int64_t steps) {
  const __m512i a = _mm512_set1_epi16(0x3f00);
#define FEWBITS_SUM(i) auto sum##i = a;
  FEWBITS_TWELVE(FEWBITS_SUM)
#undef FEWBITS_SUM
#define FEWBITS_STEP(i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum##i) : "v"(a));
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_STEP)
  }
#undef FEWBITS_STEP
}

void rate_int8_avx512(int64_t steps) {
  const __m512i a = _mm512_set1_epi8(1);
#define FEWBITS_SUM(i) auto sum##i = a;
  FEWBITS_TWELVE(FEWBITS_SUM)
#undef FEWBITS_SUM
#define FEWBITS_STEP(i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum##i) : "v"(a));
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_STEP)
  }
#undef FEWBITS_STEP
}

}  // namespace fewbits
