#include "experts/route.h"

#include <math.h>

#include <algorithm>
#include <vector>

#include "threads.h"

namespace fewbits {
namespace {

// An exponential a score: this many take a core longer than it takes to wake the pool.
constexpr int64_t kParallel = 1 << 12;

void softmax(const float* logits, int64_t count, double* scores) {
  double top = logits[0], total = 0;
  for (int64_t e = 1; e < count; ++e) top = std::max<double>(top, logits[e]);
  for (int64_t e = 0; e < count; ++e) total += scores[e] = exp(logits[e] - top);
  for (int64_t e = 0; e < count; ++e) scores[e] /= total;
}

void sigmoid(const float* logits, int64_t count, double* scores) {
  for (int64_t e = 0; e < count; ++e) scores[e] = 1 / (1 + exp(-static_cast<double>(logits[e])));
}

// The `count` best of `order` first: of equals the lower number, NaN last.
void sort_best(const std::vector<double>& ranks, int32_t* order, int64_t size, int64_t count) {
  std::partial_sort(order, order + count, order + size, [&ranks](int32_t a, int32_t b) {
    const double first = ranks[a], second = ranks[b];
    if (isnan(first) || isnan(second))
      return isnan(first) == isnan(second) ? a < b : isnan(second) != 0;
    return first != second ? first > second : a < b;
  });
}

// The row's memory, which the next one uses again.
struct Row {
  std::vector<double> scores, ranks, group_ranks;
  std::vector<int32_t> order, group_order;

  explicit Row(const Routing& routing)
      : scores(routing.experts),
        ranks(routing.experts),
        group_ranks(routing.groups),
        order(routing.experts),
        group_order(routing.groups) {}

  void keep_groups(const Routing& routing) {
    const int64_t size = routing.experts / routing.groups;
    for (int64_t g = 0; g < routing.groups; ++g) {
      int32_t* const members = order.data() + g * size;
      sort_best(ranks, members, size, routing.group_best);
      group_ranks[g] = 0;
      for (int64_t i = 0; i < routing.group_best; ++i) group_ranks[g] += ranks[members[i]];
      group_order[g] = static_cast<int32_t>(g);
    }
    sort_best(group_ranks, group_order.data(), routing.groups, routing.groups);
    for (int64_t i = routing.kept_groups; i < routing.groups; ++i) {
      std::fill_n(ranks.begin() + group_order[i] * size, size, -INFINITY);
    }
  }

  void route(const Routing& routing, const float* logits, int32_t* chosen, float* weights) {
    const int64_t k = routing.top_k;
    (routing.score == Score::softmax ? softmax : sigmoid)(logits, routing.experts, scores.data());
    for (int64_t e = 0; e < routing.experts; ++e) {
      ranks[e] = scores[e] + (routing.bias ? routing.bias[e] : 0);
      order[e] = static_cast<int32_t>(e);
    }
    if (routing.groups > 1) keep_groups(routing);
    sort_best(ranks, order.data(), routing.experts, k);
    double total = routing.epsilon;
    for (int64_t j = 0; j < k; ++j) total += scores[order[j]];
    for (int64_t j = 0; j < k; ++j) {
      const double share = routing.normalize ? scores[order[j]] / total : scores[order[j]];
      chosen[j] = order[j];
      weights[j] = static_cast<float>(share * routing.scale);
    }
  }
};

}  // namespace

void route(const Routing& routing, const float* logits, int64_t T, int32_t* chosen,
           float* weights) {
  auto rows = [&](int64_t begin, int64_t end) {
    Row row(routing);
    for (int64_t t = begin; t < end; ++t) {
      row.route(routing, logits + t * routing.experts, chosen + t * routing.top_k,
                weights + t * routing.top_k);
    }
  };
  for_range(T, T > 1 && T * routing.experts >= kParallel, rows);
}

}  // namespace fewbits
