#include "rates/rates.h"

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#include "cpu.h"
#include "rates/loops.h"
#include "threads.h"

namespace fewbits {
namespace {

constexpr size_t kBlock = size_t{1} << 20;

// In 64-bit words; the hardware's own prefetcher stops at each 4 KiB page.
constexpr int64_t kPrefetchAhead = 512;

constexpr int64_t kParts = 32;     // of a thread's work, so that one that is slowed down gets less
constexpr int64_t kSteps = 25000;  // of a part: 100 us or less

struct Loop {
  void (*run)(int64_t steps) = nullptr;
  int macs = 0;  // of an instruction
};

Loop loop_of([[maybe_unused]] Dot dot) {
#if defined(__x86_64__)
  const CpuFeatures& cpu = cpu_features();
  if (tier() >= Tier::avx512) {
    if (dot == Dot::f32) return {rate_f32_avx512, 16};
    if (dot == Dot::bf16 && tier() >= Tier::avx512_bf16) return {rate_bf16_avx512, 32};
    if (dot == Dot::int8 && cpu.avx512_vnni) return {rate_int8_avx512, 64};
    if (dot == Dot::int16 && cpu.avx512_vnni) return {rate_int16_avx512, 32};
    if (dot == Dot::int8 || dot == Dot::int16) return {rate_pairs_avx512, 32};
  } else if (tier() >= Tier::avx2) {
    if (dot == Dot::f32) return {rate_f32_avx2, 8};
    if (dot == Dot::int8 && cpu.avx_vnni) return {rate_int8_avx_vnni, 32};
    if (dot == Dot::int16 && cpu.avx_vnni) return {rate_int16_avx_vnni, 16};
    if (dot == Dot::int8 || dot == Dot::int16) return {rate_pairs_avx2, 16};
  }
#endif
  return {};
}

template <typename Work>
double seconds(Work work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

uint64_t sum_of(const uint64_t* words) {
  constexpr int64_t kLine = 8;
  uint64_t sums[kLine] = {};
  for (int64_t i = 0; i < static_cast<int64_t>(kBlock / sizeof(uint64_t)); i += kLine) {
    __builtin_prefetch(words + i + kPrefetchAhead);
    for (int64_t lane = 0; lane < kLine; ++lane) sums[lane] += words[i + lane];
  }
  for (int64_t lane = 1; lane < kLine; ++lane) sums[0] += sums[lane];
  return sums[0];
}

}  // namespace

ReadProbe::ReadProbe(size_t bytes) : memory_(std::max(bytes / kBlock, size_t{1}) * kBlock) {
  // Pages that were never written to are all one page of zeros, which stays in the cache.
  memset(memory_.as<void>(), 0, memory_.bytes());
}

double ReadProbe::rate() const {
  std::atomic<uint64_t> total{0};  // of zeros; without a use the loop would be removed
  auto read = [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) total += sum_of(memory_.as<uint64_t>() + begin * (kBlock / 8));
  };
  const double time =
      seconds([&] { for_range(static_cast<int64_t>(bytes() / kBlock), true, read); });
  return static_cast<double>(bytes() + total) / time;
}

Dot dot(const std::string& name) {
  if (name == "f32") return Dot::f32;
  if (name == "bf16") return Dot::bf16;
  if (name == "int8") return Dot::int8;
  if (name == "int16") return Dot::int16;
  throw std::invalid_argument(name + " is not a dot; there are f32, bf16, int8 and int16");
}

double dot_rate(Dot dot) {
  const Loop loop = loop_of(dot);
  if (loop.run == nullptr) return 0;
  const int64_t parts = kParts * thread_count();
  auto run = [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) loop.run(kSteps);
  };
  const double time = seconds([&] { for_range(parts, true, run); });
  return static_cast<double>(parts * kSteps * kRateSums * loop.macs) / time;
}

}  // namespace fewbits
