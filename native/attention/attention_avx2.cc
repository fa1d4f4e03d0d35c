#include "attention/append.h"
#include "attention/kernel.h"

namespace fewbits {

const AttentionKernels& attention_kernels_avx2() {
  static constexpr AttentionKernels kernels = {nullptr, attend_chunk, merge_parts, append_tokens};
  return kernels;
}

}  // namespace fewbits
