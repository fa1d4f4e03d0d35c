// Routing against a choice one by one, in any company; and gates that scale.
#include <math.h>
#include <string.h>

#include <vector>

#include "check.h"
#include "elementwise/elementwise.h"
#include "experts/route.h"

namespace fewbits {
namespace {

// The best that isn't taken yet, k times; of equals the first.
std::vector<int32_t> best(const std::vector<double>& ranks, int64_t k) {
  std::vector<int32_t> chosen;
  std::vector<bool> taken(ranks.size());
  for (int64_t j = 0; j < k; ++j) {
    int32_t top = -1;
    for (size_t e = 0; e < ranks.size(); ++e) {
      if (!taken[e] && (top < 0 || ranks[e] > ranks[top])) top = static_cast<int32_t>(e);
    }
    taken[top] = true;
    chosen.push_back(top);
  }
  return chosen;
}

void test_routing(int64_t E, int64_t k, int64_t T, bool ties) {
  Random random(static_cast<uint32_t>(E + k));
  std::vector<float> logits(T * E), bias(E), weights(T * k), alone(k);
  for (float& value : logits) {
    value = ties ? static_cast<float>(random.below(3)) : 2 * random.normal();
  }
  for (float& value : bias) value = ties ? 0 : random.normal();
  const Routing routing = {E, k, Score::sigmoid, true, 1e-20, 2.5, bias.data()};
  std::vector<int32_t> chosen(T * k), alone_chosen(k);
  route(routing, logits.data(), T, chosen.data(), weights.data());
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> scores(E), ranks(E);
    for (int64_t e = 0; e < E; ++e) {
      scores[e] = 1 / (1 + exp(-static_cast<double>(logits[t * E + e])));
      ranks[e] = scores[e] + bias[e];
    }
    const std::vector<int32_t> expected = best(ranks, k);
    double total = 0;
    for (const int32_t e : expected) total += scores[e];
    for (int64_t j = 0; j < k; ++j) {
      CHECK(chosen[t * k + j] == expected[j], "row %ld", static_cast<long>(t));
      const double weight = 2.5 * scores[expected[j]] / total;
      CHECK(fabs(weights[t * k + j] - weight) <= 1e-6 * weight, "weight of %d", expected[j]);
    }
    route(routing, logits.data() + t * E, 1, alone_chosen.data(), alone.data());
    CHECK(memcmp(alone.data(), weights.data() + t * k, k * sizeof(float)) == 0, "alone");
  }
}

void test_rows_that_are_no_numbers() {
  const float logits[] = {NAN, 1, NAN, 3};
  int32_t chosen[4];
  float weights[4];
  route({4, 4, Score::sigmoid, false, 0, 1, nullptr}, logits, 1, chosen, weights);
  CHECK(chosen[0] == 3 && chosen[1] == 1 && chosen[2] == 0 && chosen[3] == 2, "NaN is last");
  route({4, 4, Score::softmax, true, 0, 1, nullptr}, logits, 1, chosen, weights);
  for (int32_t e = 0; e < 4; ++e) CHECK(chosen[e] == e && isnan(weights[e]), "all are NaN");
}

void test_scaling(int64_t T, int64_t heads, int64_t width) {
  Random random(3);
  std::vector<float> x(T * heads * width), gates(T * heads);
  for (float& value : x) value = random.normal();
  for (float& value : gates) value = 3 * random.normal();
  std::vector<float> scaled = x;
  scale_by_sigmoid(scaled.data(), gates.data(), T, heads, width);
  for (size_t i = 0; i < x.size(); ++i) {
    const double expected = x[i] / (1 + exp(-static_cast<double>(gates[i / width])));
    CHECK(fabs(scaled[i] - expected) <= 2e-7 * fabs(expected), "%g", scaled[i]);
  }
}

}  // namespace
}  // namespace fewbits

int main() {
  using namespace fewbits;
  for (const bool ties : {false, true}) {
    for (const int64_t E : {1, 2, 5, 64, 288}) {
      test_routing(E, E < 8 ? E : 8, 3, ties);
      test_routing(E, 1, 300, ties);
    }
  }
  test_rows_that_are_no_numbers();
  test_scaling(3, 5, 7);
  test_scaling(200, 6, 64);
}
