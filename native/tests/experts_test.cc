// Routing against a choice one by one, in any company; experts against their products one row at a
// time; and gates that scale.
#include "experts/experts.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "check.h"
#include "elementwise/elementwise.h"
#include "experts/route.h"
#include "gemm_case.h"

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

// V3's choice: the best of the groups whose two best add up to most.
void test_groups(int64_t E, int64_t groups, int64_t kept, int64_t group_best, int64_t k,
                 bool ties) {
  Random random(static_cast<uint32_t>(E + groups));
  constexpr int64_t kRows = 100;
  const int64_t size = E / groups;
  std::vector<float> logits(kRows * E), bias(E), weights(kRows * k);
  for (float& value : logits) {
    value = ties ? static_cast<float>(random.below(3)) : 2 * random.normal();
  }
  for (float& value : bias) value = ties ? 0 : random.normal();
  const Routing routing = {E,   k,           Score::sigmoid, false, 0,
                           1.0, bias.data(), groups,         kept,  group_best};
  std::vector<int32_t> chosen(kRows * k);
  route(routing, logits.data(), kRows, chosen.data(), weights.data());
  for (int64_t t = 0; t < kRows; ++t) {
    std::vector<double> ranks(E), of_groups(groups), kept_ranks(E, -INFINITY);
    for (int64_t e = 0; e < E; ++e) {
      ranks[e] = 1 / (1 + exp(-static_cast<double>(logits[t * E + e]))) + bias[e];
    }
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<double> members(ranks.begin() + g * size, ranks.begin() + (g + 1) * size);
      std::sort(members.rbegin(), members.rend());
      of_groups[g] = std::accumulate(members.begin(), members.begin() + group_best, 0.0);
    }
    for (const int32_t g : best(of_groups, kept)) {
      std::copy_n(ranks.begin() + g * size, size, kept_ranks.begin() + g * size);
    }
    const std::vector<int32_t> expected = best(kept_ranks, k);
    for (int64_t j = 0; j < k; ++j) {
      CHECK(chosen[t * k + j] == expected[j], "row %ld of %ld groups", static_cast<long>(t),
            static_cast<long>(groups));
    }
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

std::shared_ptr<const Product> random_product(int number, int N, int K, Random& random) {
  const WeightCase weights[] = {
      {WeightKind::int4, ScaleKind::bf16, false, true, N, K, 32, random},
      {WeightKind::int8, ScaleKind::f32, false, false, N, K, 0, random},
      {WeightKind::fp4, ScaleKind::e4m3, false, false, N, K, 16, random},
      {WeightKind::bf16, ScaleKind::none, false, false, N, K, 0, random},
  };
  const Activation activations[] = {{Quantizer::int16_group, 128},
                                    {Quantizer::int8_static, 0, 0.01f},
                                    {Quantizer::nvfp4, 16},
                                    {}};
  auto product = std::make_shared<Product>();
  product->weight = weights[number % 4].packed;
  product->activation = activations[number % 4];
  for (int n = 0; n < N && number % 3 == 0; ++n) product->bias.push_back(random.normal());
  return product;
}

// Every expert its own kind of weights, gate and up in one or apart.
void test_experts(int E, int k, int T, int H, int W, Gating gating) {
  Random random(static_cast<uint32_t>(E * 1000 + T));
  std::vector<Expert> experts;
  for (int e = 0; e < E; ++e) {
    Expert expert;
    if (e % 2) {
      expert.inputs = {random_product(e, 2 * W, H, random)};
    } else {
      expert.inputs = {random_product(e, W, H, random), random_product(e + 1, W, H, random)};
    }
    expert.down = random_product(e + 2, H, W, random);
    experts.push_back(expert);
  }
  std::vector<float> x(T * H), y(T * H), weights(T * k);
  for (float& value : x) value = random.normal();
  for (float& value : y) value = random.normal();
  for (float& value : weights) value = random.normal();
  std::vector<int32_t> chosen;
  for (int t = 0; t < T; ++t) {
    std::vector<int32_t> order(E);
    std::iota(order.begin(), order.end(), 0);
    for (int i = E - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
    // Some are rarely chosen, one by nearly all: more rows than a kernel takes at once.
    if (T > 1 && t % 8) std::swap(order[0], *std::find(order.begin(), order.end(), 0));
    chosen.insert(chosen.end(), order.begin(), order.begin() + k);
  }
  std::vector<float> found = y;
  Experts(experts, gating).run(x.data(), chosen.data(), weights.data(), T, k, found.data());

  const RowSource::Kind plain = RowSource::Kind::plain;
  for (int t = 0; t < T; t += T > 100 ? 37 : 1) {
    std::vector<int> order(k);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int a, int b) { return chosen[t * k + a] < chosen[t * k + b]; });
    std::vector<float> total(y.begin() + t * H, y.begin() + (t + 1) * H);
    for (const int place : order) {
      const Expert& expert = experts[chosen[t * k + place]];
      std::vector<float> gate_up(2 * W), gated(W), result(H);
      float* out[] = {gate_up.data(), gate_up.data() + W};
      Gemm(expert.inputs).run({plain, x.data() + t * H, nullptr}, 1, out, false);
      gated_row(out[0], gate_up.data() + W, gated.data(), W, gating);
      float* const into = result.data();
      Gemm({expert.down}).run({plain, gated.data(), nullptr}, 1, &into, false);
      for (int n = 0; n < H; ++n) total[n] += weights[t * k + place] * result[n];
    }
    CHECK(memcmp(total.data(), found.data() + t * H, H * sizeof(float)) == 0,
          "row %d of %d, %d of %d experts", t, T, k, E);
  }
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
  skip_unsupported_tier();
  for (const bool ties : {false, true}) {
    for (const int64_t E : {1, 2, 5, 64, 288}) {
      test_routing(E, E < 8 ? E : 8, 3, ties);
      test_routing(E, 1, 300, ties);
    }
  }
  for (const bool ties : {false, true}) {
    test_groups(8, 4, 2, 1, 3, ties);
    test_groups(12, 3, 2, 2, 8, ties);
    test_groups(256, 8, 4, 2, 8, ties);
    test_groups(16, 4, 4, 4, 16, ties);
  }
  test_rows_that_are_no_numbers();
  for (const Gating gating :
       {Gating{}, Gating{Gating::Kind::silu, 0.5f}, Gating{Gating::Kind::swiglu_oai, 0.5f}}) {
    test_experts(1, 1, 1, 64, 32, gating);
    test_experts(8, 3, 5, 96, 80, gating);
    test_experts(5, 2, 33, 160, 64, gating);
  }
  test_experts(12, 4, 1, 256, 64, {});
  test_experts(4, 2, 3, 320, 64, {});  // panels that threads can't share evenly
  test_experts(3, 1, 600 / test_every(), 64, 32, {});
  test_experts(2, 2, 2100 / test_every(), 64, 32, {});
  test_experts(12, 4, 700 / test_every(), 64, 32, {});  // several groups of experts
  test_scaling(3, 5, 7);
  test_scaling(200, 6, 64);
}
