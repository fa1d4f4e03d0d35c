// All but float32 needs more than this tier has; cpu.h says whether it is there.
#include <immintrin.h>

#include "rates/loops.h"

namespace fewbits {

void rate_f32_avx512(int64_t steps) {
  rate_loop(steps, _mm512_set1_ps(0.5f), [](auto& sum, auto a) {
    asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(a));
  });
}

void rate_pairs_avx512(int64_t steps) {
  rate_loop(steps, _mm512_set1_epi16(1), [](auto& sum, auto a) {
    asm volatile("vpmaddwd %1, %1, %%zmm31\n\tvpaddd %%zmm31, %0, %0"
                 : "+v"(sum)
                 : "v"(a)
                 : "xmm31");
  });
}

void rate_bf16_avx512(int64_t steps) {
  rate_loop(steps, _mm512_set1_epi16(0x3f00), [](auto& sum, auto a) {
    asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(a));
  });
}

void rate_int8_avx512(int64_t steps) {
  rate_loop(steps, _mm512_set1_epi8(1), [](auto& sum, auto a) {
    asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(a));
  });
}

void rate_int16_avx512(int64_t steps) {
  rate_loop(steps, _mm512_set1_epi16(1), [](auto& sum, auto a) {
    asm volatile("vpdpwssd %1, %1, %0" : "+v"(sum) : "v"(a));
  });
}

}  // namespace fewbits
