// Which experts each token goes to, and with which weight.
//
// Each row is computed by itself, in float64 and in one order.
#pragma once

#include <stdint.h>

namespace fewbits {

enum class Score { softmax, sigmoid };

struct Routing {
  int64_t experts, top_k;  // top_k <= experts
  Score score;
  bool normalize;  // weights are divided by epsilon + their sum
  double epsilon, scale;
  const float* bias;  // [experts] or null: added for the choice alone
  // Experts are groups of neighbours; only those of the kept_groups best are chosen. A group is as
  // good as the sum of its group_best best experts.
  int64_t groups = 1, kept_groups = 1, group_best = 1;
};

// logits [T, experts] -> chosen [T, top_k], best first (of equals the lower number, NaN last), and
// their weights [T, top_k].
void route(const Routing& routing, const float* logits, int64_t T, int32_t* chosen, float* weights);

}  // namespace fewbits
