#include <immintrin.h>

#include "rates/loops.h"

namespace fewbits {

void rate_f32_avx2(int64_t steps) {
  const __m256 a = _mm256_set1_ps(0.5f);
#define FEWBITS_SUM(i) auto sum##i = a;
  FEWBITS_TWELVE(FEWBITS_SUM)
#undef FEWBITS_SUM
#define FEWBITS_STEP(i) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum##i) : "x"(a));
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_STEP)
  }
#undef FEWBITS_STEP
}

// {vex}: without it the assembler takes the AVX-512 form.
void rate_int8_avx_vnni(int64_t steps) {
  const __m256i a = _mm256_set1_epi8(1);
#define FEWBITS_SUM(i) auto sum##i = a;
  FEWBITS_TWELVE(FEWBITS_SUM)
#undef FEWBITS_SUM
#define FEWBITS_STEP(i) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum##i) : "x"(a));
  for (int64_t step = 0; step < steps; ++step) {
    FEWBITS_TWELVE(FEWBITS_STEP)
  }
#undef FEWBITS_STEP
}

}  // namespace fewbits
