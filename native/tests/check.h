// What the test programs share: a failed check ends the program with the place and the sentence.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "cpu.h"

#define CHECK(condition, ...)                                         \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                   \
      fputc('\n', stderr);                                            \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

namespace fewbits {

// ctest counts this exit status as skipped.
constexpr int kSkipped = 77;

// Ends the program as skipped where FEWBITS_ISA names a tier that this machine doesn't run.
inline void skip_unsupported_tier() {
  const char* wanted = getenv("FEWBITS_ISA");
  for (const Tier tier : supported_tiers()) {
    if (!wanted || std::string(name(tier)) == wanted) return;
  }
  printf("this machine doesn't run %s\n", wanted);
  exit(kSkipped);
}

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed) {}
  uint32_t bits() {
    state_ = state_ * 1664525 + 1013904223;
    return state_ >> 8;
  }
  int below(int limit) { return static_cast<int>(bits() % limit); }
  // About standard normal: the sum of twelve uniform numbers.
  float normal() {
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += static_cast<float>(bits()) / (1 << 24);
    return sum;
  }

 private:
  uint32_t state_;
};

// FEWBITS_TEST_EVERY: a test with many cases runs one of so many.
inline int test_every() {
  static const int every = [] {
    const char* text = getenv("FEWBITS_TEST_EVERY");
    const int number = text ? atoi(text) : 1;
    CHECK(number >= 1, "FEWBITS_TEST_EVERY=%s", text);
    return number;
  }();
  return every;
}

// Whether to leave out the next case. Drawn, because counting could hit the same turn of a loop
// each time.
inline bool skip_case() {
  static Random random(1);
  return random.below(test_every()) != 0;
}

}  // namespace fewbits
