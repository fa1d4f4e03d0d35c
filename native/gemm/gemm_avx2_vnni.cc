// AVX-VNNI: products of unsigned codes with signed integers, four at once (VPDPBUSD), and of
// integers of sixteen bits in pairs (VPDPWSSD).
#include "gemm/vectors_avx2.h"
#include "gemm/words.h"

namespace fewbits {
namespace {

struct Bytes : Bytes256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(x));
    return sum;
  }
};

struct Pairs : Pairs256 {
  static Sum dot(Sum sum, Operand weight, Operand x) {
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(x));
    return sum;
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx2_vnni(WeightKind kind, DotKind dot) {
  return integer_kernel<Bytes, Int8Words, Pairs, Int16Words>(kind, dot);
}

}  // namespace fewbits
