// Which entries of its sequence each row of a batch sees.
#pragma once

#include <stdint.h>

#include <vector>

#include "attention/attention.h"

namespace fewbits {

// Positions [first, last). In a listed sequence, those from `past_of` on are the sequence's rows
// listed[position - past].
struct Visible {
  int64_t first, last;
  std::vector<int32_t> listed;
};

// Entries of a sequence that are older than the batch.
inline int past_of(const Attend& task, int sequence) {
  return task.kv_len[sequence] - (task.query_start[sequence + 1] - task.query_start[sequence]);
}

// Whether the rows of a sequence must be looked up one by one: they see a choice of each other.
bool is_listed(const Attend& task, int sequence);

// `token` is a row of the batch, and `listed` what is_listed says of its sequence.
Visible visible_to(const Attend& task, int sequence, int token, bool listed);

}  // namespace fewbits
