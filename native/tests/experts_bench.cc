// Speed of a layer's experts beside the machine's limits, both measured here. Not a test: run it by
// hand, on an idle machine.
//
//   experts_bench [threads] [experts] [k] [H] [W] [scheme] [T]
//
// Tokens choose at random. The limit counts each expert that one of them goes to once; see
// gemm_bench.cc.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "bench_case.h"
#include "cpu.h"
#include "experts/experts.h"
#include "threads.h"

namespace fewbits {
namespace {

struct Shape {
  int64_t experts, k, H, W;
};

void measure(const Scheme& scheme, const Shape& shape, const std::vector<int64_t>& tokens,
             const Limits& limits) {
  // Layers, as many as no cache holds.
  std::vector<std::unique_ptr<Experts>> layers;
  int64_t bytes = 0;  // of an expert
  for (int64_t total = 0; total < int64_t{192} << 20; total += shape.experts * bytes) {
    std::vector<Expert> experts;
    for (int64_t e = 0; e < shape.experts; ++e) {
      auto gate = random_product(scheme, shape.W, shape.H);
      auto up = random_product(scheme, shape.W, shape.H);
      auto down = random_product(scheme, shape.H, shape.W);
      bytes = 2 * gate->weight->nbytes() + down->weight->nbytes();
      experts.push_back({{gate, up}, down});
    }
    layers.push_back(std::make_unique<Experts>(std::move(experts), Gating{}));
  }
  const double peak = limits.peak(scheme.dot);
  std::mt19937 random(1);
  for (const int64_t T : tokens) {
    std::vector<float> x(T * shape.H), y(T * shape.H);
    for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 255) - 127) / 64;
    const std::vector<float> weights(T * shape.k, 1 / static_cast<float>(shape.k));
    std::vector<int32_t> chosen(T * shape.k), order(shape.experts);
    for (int32_t e = 0; e < shape.experts; ++e) order[e] = e;
    std::vector<double> seconds, shares;
    for (int repeat = 0; repeat < kRepeats * (T < 64 ? 9 : 1); ++repeat) {
      std::set<int32_t> touched;
      for (int64_t t = 0; t < T; ++t) {
        std::shuffle(order.begin(), order.end(), random);
        std::copy_n(order.begin(), shape.k, chosen.begin() + t * shape.k);
        touched.insert(order.begin(), order.begin() + shape.k);
      }
      const double start = now();
      layers[repeat % layers.size()]->run(x.data(), chosen.data(), weights.data(), T, shape.k,
                                          y.data());
      const double took = now() - start;
      const double macs = 3.0 * T * shape.k * shape.H * shape.W;
      const double read = static_cast<double>(touched.size()) * bytes;
      seconds.push_back(took);
      shares.push_back(std::max(read / limits.read, macs / peak) / took);
    }
    std::sort(seconds.begin(), seconds.end());
    std::sort(shares.begin(), shares.end());
    printf("%-15s T %3ld  %8.3f ms  share %3.0f %%\n", scheme.label, static_cast<long>(T),
           seconds[seconds.size() / 2] * 1e3, 100 * shares[shares.size() / 2]);
  }
}

}  // namespace
}  // namespace fewbits

int main(int argc, char** argv) {
  using namespace fewbits;
  const auto number = [&](int i, int64_t otherwise) {
    return argc > i ? atoll(argv[i]) : otherwise;
  };
  if (argc > 1) set_thread_count(std::max(1, atoi(argv[1])));
  const Shape shape = {number(2, 48), number(3, 8), number(4, 1536), number(5, 512)};
  const std::string only = argc > 6 ? argv[6] : "";
  std::vector<int64_t> tokens = {1, 2, 4, 8, 16, 128, 512};
  if (argc > 7) tokens = {number(7, 1)};
  const Limits limits;
  printf("%s, %d threads, %ld of %ld experts, %ld x %ld: reads %.1f GB/s\n", name(tier()),
         thread_count(), static_cast<long>(shape.k), static_cast<long>(shape.experts),
         static_cast<long>(shape.H), static_cast<long>(shape.W), limits.read / 1e9);
  for (const Scheme& scheme : kSchemes) {
    if (std::string(scheme.label).rfind(only, 0) == 0) measure(scheme, shape, tokens, limits);
  }
}
