#include <immintrin.h>

#include "rates/loops.h"

namespace fewbits {

void rate_f32_avx2(int64_t steps) {
  rate_loop(steps, _mm256_set1_ps(0.5f), [](auto& sum, auto a) {
    asm volatile("vfmadd231ps %1, %1, %0" : "+x"(sum) : "x"(a));
  });
}

// Without VNNI integers are multiplied in pairs of sixteen bits and added up by another
// instruction.
void rate_pairs_avx2(int64_t steps) {
  rate_loop(steps, _mm256_set1_epi16(1), [](auto& sum, auto a) {
    asm volatile("vpmaddwd %1, %1, %%ymm15\n\tvpaddd %%ymm15, %0, %0"
                 : "+x"(sum)
                 : "x"(a)
                 : "xmm15");
  });
}

// {vex}: without it the assembler takes the AVX-512 form.
void rate_int8_avx_vnni(int64_t steps) {
  rate_loop(steps, _mm256_set1_epi8(1), [](auto& sum, auto a) {
    asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(sum) : "x"(a));
  });
}

void rate_int16_avx_vnni(int64_t steps) {
  rate_loop(steps, _mm256_set1_epi16(1), [](auto& sum, auto a) {
    asm volatile("%{vex%} vpdpwssd %1, %1, %0" : "+x"(sum) : "x"(a));
  });
}

}  // namespace fewbits
