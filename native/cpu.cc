#include "cpu.h"

#include <stdlib.h>

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#endif

namespace fewbits {
namespace {

constexpr Tier kTiers[] = {Tier::ref,    Tier::avx2,        Tier::avx2_vnni,
                           Tier::avx512, Tier::avx512_vnni, Tier::avx512_bf16};

#if defined(__x86_64__)

uint64_t xgetbv0() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Leaves and bits: Intel SDM volume 2A, CPUID; XCR0: volume 1, 13.3.
CpuFeatures detect() {
  CpuFeatures f;
  uint32_t a, b, c, d;
  // "ntel" of the vendor's name, which leaf 0 gives in three words: Intel SDM volume 2A, CPUID.
  f.intel = __get_cpuid(0, &a, &b, &c, &d) && c == 0x6c65746e;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1;
  const bool avx = c >> 28 & 1;
  if (!osxsave || !avx) return f;
  const uint64_t xcr0 = xgetbv0();
  constexpr uint64_t kYmm = 0x6;   // SSE and AVX state
  constexpr uint64_t kZmm = 0xe6;  // those, opmask, and both halves of the AVX-512 state
  if ((xcr0 & kYmm) != kYmm) return f;
  const bool zmm = (xcr0 & kZmm) == kZmm;
  f.fma = c >> 12 & 1;
  f.f16c = c >> 29 & 1;
  uint32_t last_subleaf;
  if (!__get_cpuid_count(7, 0, &last_subleaf, &b, &c, &d)) return f;
  f.avx2 = b >> 5 & 1;
  f.avx512f = zmm && (b >> 16 & 1);
  f.avx512dq = zmm && (b >> 17 & 1);
  f.avx512bw = zmm && (b >> 30 & 1);
  f.avx512vl = zmm && (b >> 31 & 1);
  f.avx512_vbmi = zmm && (c >> 1 & 1);
  f.avx512_vnni = zmm && (c >> 11 & 1);
  if (last_subleaf < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return f;
  f.avx_vnni = a >> 4 & 1;
  f.avx512_bf16 = zmm && (a >> 5 & 1);
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

bool supported(Tier tier) {
  const CpuFeatures& f = cpu_features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  switch (tier) {
    case Tier::ref:
      return true;
    case Tier::avx2:
      return avx2;
    case Tier::avx2_vnni:
      return avx2 && f.avx_vnni;
    case Tier::avx512:
      return avx512;
    case Tier::avx512_vnni:
      return avx512 && f.avx512_vnni;
    case Tier::avx512_bf16:
      return avx512 && f.avx512_vnni && f.avx512_vbmi && f.avx512_bf16;
  }
  return false;
}

std::string join(const std::vector<Tier>& tiers) {
  std::string text;
  for (const Tier tier : tiers) text += (text.empty() ? "" : ", ") + std::string(name(tier));
  return text;
}

Tier choose() {
  const std::vector<Tier> available = supported_tiers();
  const char* wanted = getenv("FEWBITS_ISA");
  if (wanted == nullptr || *wanted == '\0') return available.back();
  for (const Tier tier : available) {
    if (std::string(name(tier)) == wanted) return tier;
  }
  throw std::invalid_argument("FEWBITS_ISA=" + std::string(wanted) +
                              " is not an instruction set tier that this machine can run; it has " +
                              join(available));
}

}  // namespace

const char* name(Tier tier) {
  switch (tier) {
    case Tier::ref:
      return "ref";
    case Tier::avx2:
      return "avx2";
    case Tier::avx2_vnni:
      return "avx2_vnni";
    case Tier::avx512:
      return "avx512";
    case Tier::avx512_vnni:
      return "avx512_vnni";
    case Tier::avx512_bf16:
      return "avx512_bf16";
  }
  return "";
}

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::vector<Tier> supported_tiers() {
  std::vector<Tier> tiers;
  for (const Tier tier : kTiers) {
    if (supported(tier)) tiers.push_back(tier);
  }
  return tiers;
}

Tier tier() {
  static const Tier chosen = choose();
  return chosen;
}

}  // namespace fewbits
