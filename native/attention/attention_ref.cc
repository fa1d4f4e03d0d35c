#include "attention/kernel.h"

namespace fewbits {

void attend_block_ref(const AttendBlock& block) { attend_block(block); }

void append_tokens_ref(const AppendTokens& task, int64_t begin, int64_t end) {
  append_tokens(task, begin, end);
}

}  // namespace fewbits
