// AVX-512 BF16 and VBMI: x rounded to bfloat16 once a call, products in pairs (VDPBF16PS) summed
// in float32. Kinds whose values bfloat16 doesn't hold exactly (f16, f32) stay with the avx512
// tier.
#include <string.h>

#include "gemm/bytes_avx512_vnni.h"

namespace fewbits {
namespace {

// The lower or upper bytes of 64 consecutive magnitudes of e4m3 as bfloat16.
struct E4m3Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr E4m3Bytes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      const int exponent = code >> 3, mantissa = code & 7;
      int bits = (exponent + 120) << 7 | mantissa << 4;
      if (code == 127) bits = 0x7fc0;
      if (exponent == 0) {
        // mantissa * 2^-9, normalised.
        const int top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
        bits = mantissa == 0 ? 0 : (127 - 9 + top) << 7 | (mantissa << (7 - top) & 0x7f);
      }
      low[code] = static_cast<uint8_t>(bits & 0xff);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

// Magnitudes below 128 of negative two's-complement bytes: index b & 127 stands for b - 128.
struct Int8Bytes {
  alignas(64) uint8_t low[128], high[128];
  constexpr Int8Bytes() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      int exponent = 0;
      while (code >> (exponent + 1)) ++exponent;
      const int bits = code == 0 ? 0 : (127 + exponent) << 7 | (code << (7 - exponent) & 0x7f);
      low[code] = static_cast<uint8_t>(bits & 0xff);
      high[code] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

// Of two registers, 64 lower bytes and 64 upper ones, those that are the upper halves of 16 floats.
struct UpperHalves {
  alignas(64) uint8_t places[4][64];
  constexpr UpperHalves() : places() {
    for (int i = 0; i < 64; ++i) {
      places[i / 16][i % 16 * 4 + 2] = static_cast<uint8_t>(i);
      places[i / 16][i % 16 * 4 + 3] = static_cast<uint8_t>(64 + i);
    }
  }
};

constexpr E4m3Bytes kE4m3;
constexpr UpperHalves kUpperHalves;
constexpr Int8Bytes kInt8;

// e4m3 looked up by 64 codes at a time, as the two bytes of a bfloat16.
struct E4m3 {
  __m512i low, high;

  explicit E4m3(__m512i codes) {
    // The permutations look at seven bits, all but the sign.
    low = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3.low), codes,
                                   _mm512_load_si512(kE4m3.low + 64));
    const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kE4m3.high), codes,
                                                       _mm512_load_si512(kE4m3.high + 64));
    high = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(static_cast<int>(0x80808080)),
                                     magnitude, kAndOr);
  }
};

// What a dot of this tier has instead of its base's.
template <class Base>
struct WithE4m3 : Base {
  static void widen_e4m3(const uint8_t* codes, int64_t count, float* to) {
    constexpr __mmask64 kUpper = 0xcccccccccccccccc;
    for (int64_t i = 0; i < count; i += kPanelRows) {
      const E4m3 scales(_mm512_loadu_si512(codes + i));
      for (int t = 0; t < 4; ++t) {
        const __m512i places = _mm512_load_si512(kUpperHalves.places[t]);
        _mm512_store_si512(to + i + t * 16,
                           _mm512_maskz_permutex2var_epi8(kUpper, scales.low, places, scales.high));
      }
    }
  }
};

struct Bf16 : WithE4m3<Vectors512> {
  static constexpr int kSumsBesideX = 24;
  template <int>
  static constexpr int tiles = kPanelRows / kLanes;  // as with Bytes
  static constexpr int kRowsWithTotals = 2;  // with three GCC 12 keeps sums of fp4 in memory
  using Operand = __m512i;
  using Sum = __m512;
  template <WeightKind kind>
  static constexpr int steps = codes_per_word(kind) / 2;
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::bf16 ? 0 : 7;
  // A code in the mantissa of 128 is 128 + code; bytes are taken unsigned.
  template <WeightKind kind>
  static constexpr float offset = kind == WeightKind::int4   ? 136
                                  : kind == WeightKind::int8 ? 128
                                                             : 0;

  static Operand load_operand(const uint32_t* p) { return _mm512_load_si512(p); }
  static void store_operand(uint32_t* p, Operand operand) { _mm512_store_si512(p, operand); }
  static Operand broadcast(const uint32_t* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum dot(Sum sum, Operand weight, Operand x) {
    // As the intrinsic GCC 12 copies sums between registers around the loop.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(x));
    return sum;
  }
  static Sum dot_memory(Sum sum, Operand weight, const uint32_t* x) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weight), "m"(*x));
    return sum;
  }
  static Float to_float(Sum sum) { return sum; }

  template <WeightKind kind, int p>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::int4) {
      return _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4 * p),
                                       _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(0x43004300),
                                       kAndOr);
    } else if constexpr (kind == WeightKind::fp4) {
      // The permutation looks at five bits, of which the fifth belongs to the next code.
      constexpr short kZero = 0, kHalf = 0x3f00, kOne = 0x3f80, kThreeHalves = 0x3fc0,
                      kTwo = 0x4000, kThree = 0x4040, kFour = 0x4080, kSix = 0x40c0,
                      kMinus = INT16_MIN;
      const __m256i values =
          _mm256_setr_epi16(kZero, kHalf, kOne, kThreeHalves, kTwo, kThree, kFour, kSix,
                            kMinus | kZero, kMinus | kHalf, kMinus | kOne, kMinus | kThreeHalves,
                            kMinus | kTwo, kMinus | kThree, kMinus | kFour, kMinus | kSix);
      return _mm512_permutexvar_epi16(_mm512_srli_epi32(word, 4 * p),
                                      _mm512_broadcast_i64x4(values));
    } else {
      return word;
    }
  }
};

// Codes of a byte, whose bfloat16s fill two registers: of four rows in turn the first two, and the
// last two. Each has sums of its own, in which a row has two, of its first and second pairs of
// columns. To bring pairs together that share a sum, columns k and k + 2, would take four
// operations instead of the two that interleave bytes, and passes of 1 to 9 rows 2 to 17 % more
// time.
struct Bf16Bytes : Bf16 {
  static constexpr int kOperandWords = 2;
  static constexpr int kRowsBesideWords = kPassRows;
  static constexpr int kRowsWithTotals = 1;
  static constexpr int kSumsBesideX = kAllSums;
  template <int rows>
  static constexpr int tiles = rows > 6   ? 1
                               : rows > 3 ? 2
                                          : 4;  // at most 24 sums
  template <WeightKind>
  static constexpr int steps = 1;
  template <WeightKind kind>
  static constexpr int decode_operations = kind == WeightKind::fp8 ? 5 : 7;
  struct Operand {
    __m512i low, high;
    friend void keep(Operand& operand) { asm("" : "+v"(operand.low), "+v"(operand.high)); }
  };
  struct Sum {
    __m512 low, high;
  };

  static Operand load_operand(const uint32_t* p) {
    return {_mm512_load_si512(p), _mm512_load_si512(p + kLanes)};
  }
  static void store_operand(uint32_t* p, Operand operand) {
    _mm512_store_si512(p, operand.low);
    _mm512_store_si512(p + kLanes, operand.high);
  }
  static __m512i broadcast(const uint32_t* x) {
    int64_t words;
    memcpy(&words, x, sizeof(words));
    return _mm512_set1_epi64(words);
  }
  static Sum zero() { return {Bf16::zero(), Bf16::zero()}; }
  static Sum dot(Sum sum, Operand weight, __m512i x) {
    return {Bf16::dot(sum.low, weight.low, x), Bf16::dot(sum.high, weight.high, x)};
  }
  static Float to_float(Sum sum) {
    return _mm512_add_ps(_mm512_shuffle_ps(sum.low, sum.high, 0x88),
                         _mm512_shuffle_ps(sum.low, sum.high, 0xdd));
  }

  static Operand interleave(__m512i low, __m512i high) {
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }

  template <WeightKind kind, int>
  static Operand decode(Words word) {
    if constexpr (kind == WeightKind::fp8) {
      const E4m3 bytes(word);
      return interleave(bytes.low, bytes.high);
    } else {
      // 128 + c is 0x4300 | c for the upper half of the codes; the lower half is looked up.
      const __m512i flipped =
          _mm512_xor_si512(word, _mm512_set1_epi32(static_cast<int>(0x80808080)));
      const __mmask64 lower = _mm512_movepi8_mask(flipped);
      const __m512i low = _mm512_mask2_permutex2var_epi8(_mm512_load_si512(kInt8.low), flipped,
                                                         lower, _mm512_load_si512(kInt8.low + 64));
      const __m512i looked_up = _mm512_permutex2var_epi8(_mm512_load_si512(kInt8.high), flipped,
                                                         _mm512_load_si512(kInt8.high + 64));
      return interleave(low, _mm512_mask_mov_epi8(_mm512_set1_epi8(0x43), lower, looked_up));
    }
  }
};

struct FourTimes {
  alignas(64) uint8_t values[64];
  constexpr FourTimes() : values() {
    for (int i = 0; i < 64; ++i) values[i] = kDoubledFp4[i % 16];
  }
};

constexpr FourTimes kFourTimes;

// fp4 with integers: a code is looked up with what stands beside it in its byte, which takes no
// mask as the avx512_vnni tier's look-up does.
struct Fp4Bytes : WithE4m3<Bytes> {
  template <WeightKind>
  static constexpr int decoding_rows = kManyRows;  // six rows take 8 % less time than twice three
  template <WeightKind, int step>
  static Operand decode(Words word) {
    if (step > 0) word = _mm512_srli_epi32(word, 4);
    return _mm512_permutexvar_epi8(word, _mm512_load_si512(kFourTimes.values));
  }
};

// Two values of x rounded to bfloat16.
struct Bf16Words {
  static uint32_t round(float value) {
    return _mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value))) & 0xffff;
  }
  template <int stride>
  static uint32_t word(const float* x) {
    return round(x[0]) | round(x[stride]) << 16;
  }
  template <int codes, int stride>
  static int64_t bulk(const float* x, int64_t K, uint32_t* values) {
    // Pairs of neighbours, of a byte's codes too, lie as they come.
    const __m256i order = pair_order<stride == 1 ? 2 : codes>();
    int64_t k = 0;
    for (; k + 16 <= K; k += 16) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + k / 2),
                          _mm256_permutexvar_epi16(order, rounded));
    }
    return k;
  }
  static float sum(const uint32_t* words, int64_t count) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 valid =
          count - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count - i)) - 1);
      const __m512i pairs = _mm512_maskz_loadu_epi32(valid, words + i);
      sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
      sum = _mm512_add_ps(
          sum, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000))));
    }
    return _mm512_reduce_add_ps(sum);
  }
};

}  // namespace

const GemmKernel* gemm_kernel_avx512_bf16(WeightKind kind, DotKind dot) {
  static constexpr GemmKernel kInt4 = make_kernel<Bf16, Bf16Words, WeightKind::int4>();
  static constexpr GemmKernel kInt8 = make_kernel<Bf16Bytes, Bf16Words, WeightKind::int8>();
  static constexpr GemmKernel kFp4 = make_kernel<Bf16, Bf16Words, WeightKind::fp4>();
  static constexpr GemmKernel kFp8 = make_kernel<Bf16Bytes, Bf16Words, WeightKind::fp8>();
  static constexpr GemmKernel kBf16 = make_kernel<Bf16, Bf16Words, WeightKind::bf16>();
  static constexpr GemmKernel kFp4Bytes = make_kernel<Fp4Bytes, ByteWords<2>, WeightKind::fp4>();
  if (dot == DotKind::int8 && kind == WeightKind::fp4) return &kFp4Bytes;
  if (dot != DotKind::floats) return nullptr;
  switch (kind) {
    case WeightKind::int4:
      return &kInt4;
    case WeightKind::int8:
      return &kInt8;
    case WeightKind::fp4:
      return &kFp4;
    case WeightKind::fp8:
      return &kFp8;
    case WeightKind::bf16:
      return &kBf16;
    default:
      return nullptr;
  }
}

}  // namespace fewbits
