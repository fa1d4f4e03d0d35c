// The largest error of each tier's exponential, over every 13th float of [-87, 0] (every one when
// the program is given an argument, which takes a minute).
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "check.h"
#include "cpu.h"
#include "elementwise/elementwise.h"

namespace fewbits {
namespace {

constexpr uint32_t kFirst = 0x80000000;  // -0
constexpr uint32_t kLast = 0xc2ae0000;   // -87
constexpr uint32_t kPiece = 1 << 16;
constexpr double kBound =
    1.05;  // ulp; over every float, 1.022 was found in ref and 0.998 in the others

using Exponential = void (*)(const float*, float*, int64_t);

double largest_error(Exponential exponential, uint32_t step) {
  std::vector<float> x(kPiece), y(kPiece);
  double largest = 0.0;
  for (uint64_t begin = kFirst; begin <= kLast; begin += uint64_t{kPiece} * step) {
    for (uint32_t i = 0; i < kPiece; ++i) {
      const uint32_t bits = static_cast<uint32_t>(begin) + i * step;
      memcpy(&x[i], &bits, 4);
    }
    exponential(x.data(), y.data(), kPiece);
    for (uint32_t i = 0; i < kPiece && begin + uint64_t{i} * step <= kLast; ++i) {
      const double exact = exp(static_cast<double>(x[i]));
      const double ulp = ldexp(1.0, ilogb(exact) - 23);
      const double error = fabs(y[i] - exact) / ulp;
      if (!(error <= largest)) largest = error;
    }
  }
  return largest;
}

bool special_values(Exponential exponential) {
  const float x[] = {0.0f, -87.00001f, -1e30f, -INFINITY, NAN};
  float y[5];
  exponential(x, y, 5);
  return y[0] == 1.0f && y[1] == 0.0f && y[2] == 0.0f && y[3] == 0.0f && isnan(y[4]);
}

bool check(const char* name, Exponential exponential, uint32_t step) {
  const double error = largest_error(exponential, step);
  const bool special = special_values(exponential);
  printf("%s: largest error %.3f ulp (bound %.2f), special values %s\n", name, error, kBound,
         special ? "right" : "wrong");
  return error <= kBound && special;
}

bool run(uint32_t step) {
  bool good = check("ref", exp_negative_ref, step);
#if defined(__x86_64__)
  for (const Tier tier : supported_tiers()) {
    if (tier == Tier::avx2) good &= check("avx2", exp_negative_avx2, step);
    if (tier == Tier::avx512) good &= check("avx512", exp_negative_avx512, step);
  }
#endif
  return good;
}

}  // namespace
}  // namespace fewbits

int main(int argc, char**) {
  return fewbits::run(argc > 1 ? 1 : 13 * fewbits::test_every()) ? 0 : 1;
}
