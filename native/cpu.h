// What this CPU and operating system can run, and the tier that all kernel families use.
//
// Tiers are ordered: a family without a file for the chosen tier takes the highest one below it
// that its machines run, which is all but avx2_vnni. The environment variable FEWBITS_ISA forces a
// tier.
#pragma once

#include <string>
#include <vector>

namespace fewbits {

// avx2_vnni asks for AVX-VNNI, which machines with AVX-512 may lack; these don't need it.
enum class Tier { ref, avx2, avx2_vnni, avx512, avx512_vnni, avx512_bf16 };

const char* name(Tier tier);

// Features that the operating system doesn't save registers for count as absent.
struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx_vnni = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512vl = false;
  bool avx512dq = false;
  bool avx512_vbmi = false;
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool intel = false;  // for what only measuring tells of a core
};

const CpuFeatures& cpu_features();

// In ascending order; the first is always ref.
std::vector<Tier> supported_tiers();

// The tier in use: FEWBITS_ISA where set, else the highest supported. Throws std::invalid_argument,
// in a sentence, where the variable names no tier or one that this machine can't run.
Tier tier();

}  // namespace fewbits
