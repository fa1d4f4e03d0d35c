#include "attention/visible.h"

#include <algorithm>

namespace fewbits {

bool is_listed(const Attend& task, int sequence) {
  if (task.mask) return true;
  if (task.window == 0) return false;
  const int begin = task.query_start[sequence], end = task.query_start[sequence + 1];
  for (int t = begin; t < end; ++t) {
    if (task.positions[t] != past_of(task, sequence) + (t - begin)) return true;
  }
  return false;
}

Visible visible_to(const Attend& task, int sequence, int token, bool listed) {
  const int begin = task.query_start[sequence], end = task.query_start[sequence + 1];
  const int64_t past = past_of(task, sequence);
  const int64_t lowest = task.window ? task.positions[token] - task.window + 1 : INT64_MIN;
  if (!listed) {
    const int64_t last = past + (token - begin) + 1;
    return {std::clamp<int64_t>(lowest, 0, last), last, {}};
  }
  Visible sees{std::clamp<int64_t>(lowest, 0, past), past, {}};
  for (int other = begin; other < end; ++other) {
    const bool ancestor = task.mask ? task.mask[token * task.T + other] != 0 : other <= token;
    if (!ancestor) continue;
    const bool in_window = task.window == 0 || task.positions[other] >= lowest;
    // Ancestors that the window has left keep their position, as older entries do.
    const bool none_seen = sees.first == past + static_cast<int64_t>(sees.listed.size());
    if (!in_window && !none_seen) continue;
    sees.listed.push_back(other - begin);
    if (!in_window) ++sees.first;
  }
  sees.last = past + static_cast<int64_t>(sees.listed.size());
  return sees;
}

}  // namespace fewbits
