// Gumbel noise from the Philox stream of common/philox.h, eight blocks of four words at a time.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>  // its functions are always inlined, so no copy can reach the linker
#endif

#include "common/philox.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

constexpr int64_t kNoiseBlock = 32;

struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;
};

// The 64-bit products of the low 32 bits of each lane: one instruction where a 64-bit
// multiplication takes three or more.
LRL_INLINE VecU64 multiply32(VecU64 a, uint32_t factor) {
#if defined(__AVX512F__)
  // The masked form keeps GCC from warning about the undefined operand of the plain one.
  return bit_cast<VecU64>(
      _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(a), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  HalfI64 low, high;
  split(a, &low, &high);
  const __m256i by = _mm256_set1_epi64x(factor);
  const __m256i products[2] = {_mm256_mul_epu32(bit_cast<__m256i>(low), by),
                               _mm256_mul_epu32(bit_cast<__m256i>(high), by)};
  return bit_cast<VecU64>(products);
#elif defined(__SSE2__)
  __m128i parts[4];
  memcpy(parts, &a, sizeof(parts));
  const __m128i by = _mm_set1_epi64x(factor);
  for (int part = 0; part < 4; ++part) parts[part] = _mm_mul_epu32(parts[part], by);
  return bit_cast<VecU64>(parts);
#else
  return (a & 0xffffffffULL) * static_cast<uint64_t>(factor);
#endif
}

LRL_INLINE VecU64 widen(HalfU32 v) {
#if defined(__AVX512F__)
  return bit_cast<VecU64>(_mm512_maskz_cvtepu32_epi64(0xff, bit_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, VecU64);
#endif
}

struct PhiloxWords {
  VecU64 word[4];  // 32 bits in each lane
};

// The four words of counters (block, offset low, offset high, 0), one in each lane, of some
// vectors.
template <int kParts>
LRL_INLINE void philox_words_of(PhiloxKey key, const VecU64 (&block)[kParts],
                                PhiloxWords (&out)[kParts]) {
  const VecU64 low32 = VecU64{} + 0xffffffffULL;
  // Bits above the low 32 of c0 and c2 do no harm until the end: a product does not read them.
  VecU64 c0[kParts], c1[kParts], c2[kParts], c3[kParts];
  for (int part = 0; part < kParts; ++part) {
    c0[part] = block[part];
    c1[part] = VecU64{} + (key.offset & 0xffffffffULL);
    c2[part] = VecU64{} + (key.offset >> 32);
    c3[part] = VecU64{};
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed);
  uint32_t k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    for (int part = 0; part < kParts; ++part) {
      const VecU64 p0 = multiply32(c0[part], philox::kMultiplier0);
      const VecU64 p1 = multiply32(c2[part], philox::kMultiplier1);
      c0[part] = (p1 >> 32) ^ c1[part] ^ static_cast<uint64_t>(k0);
      c2[part] = (p0 >> 32) ^ c3[part] ^ static_cast<uint64_t>(k1);
      c1[part] = p1;
      c3[part] = p0;
    }
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
  for (int part = 0; part < kParts; ++part) {
    out[part] = {{c0[part] & low32, c1[part] & low32, c2[part] & low32, c3[part] & low32}};
  }
}
LRL_INLINE PhiloxWords philox_words_of(PhiloxKey key, VecU64 block) {
  const VecU64 blocks[1] = {block};
  PhiloxWords words[1];
  philox_words_of(key, blocks, words);
  return words[0];
}

// 32 words in the order of their codes, eight to a part.
struct NoiseBlock {
  HalfU32 part[kNoiseBlock / kLanesD];
};

// The words of codes [32 * block, 32 * block + 32).
LRL_INLINE NoiseBlock philox_block(PhiloxKey key, int64_t block) {
  const VecU64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const PhiloxWords w = philox_words_of(key, lane + static_cast<uint64_t>(block) * 8);
  // Words 0 and 1, and words 2 and 3, of each counter side by side; then counter after counter.
  const VecU64 front = w.word[0] | (w.word[1] << 32);
  const VecU64 back = w.word[2] | (w.word[3] << 32);
#if defined(__clang__)
  const VecU64 first = __builtin_shufflevector(front, back, 0, 8, 1, 9, 2, 10, 3, 11);
  const VecU64 second = __builtin_shufflevector(front, back, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const VecU64 first = __builtin_shuffle(front, back, VecU64{0, 8, 1, 9, 2, 10, 3, 11});
  const VecU64 second = __builtin_shuffle(front, back, VecU64{4, 12, 5, 13, 6, 14, 7, 15});
#endif
  NoiseBlock out;
  split(first, &out.part[0], &out.part[1]);
  split(second, &out.part[2], &out.part[3]);
  return out;
}

LRL_INLINE VecD gumbel(VecU64 word) {
  const VecD u = (bit_cast<VecD>(word | 0x4330000000000000ULL) - 0x1p52 + 0.5) * 0x1p-32;
  return -log(-log(u));
}

// The word of each code, given its counter's four.
LRL_INLINE VecU64 word_of_code(const PhiloxWords& w, VecU64 ids) {
  const VecU64 odd = VecU64{} - (ids & 1);
  const VecU64 upper = VecU64{} - ((ids >> 1) & 1);
  const VecU64 front = (w.word[0] & ~odd) | (w.word[1] & odd);
  const VecU64 back = (w.word[2] & ~odd) | (w.word[3] & odd);
  return (front & ~upper) | (back & upper);
}

// The words of the codes in `ids`, each below 2^31.
LRL_INLINE VecU64 words_of_codes(PhiloxKey key, VecU64 ids) {
  return word_of_code(philox_words_of(key, ids >> 2), ids);
}

// Those of 32 codes, whose rounds do not wait for each other.
LRL_INLINE NoiseBlock words_of_codes(PhiloxKey key, const int32_t* ids) {
  constexpr int kParts = kNoiseBlock / kLanesD;
  NoiseBlock block;
  VecU64 id[kParts], counter[kParts];
  for (int part = 0; part < kParts; ++part) {
    HalfU32 some;
    memcpy(&some, ids + part * kLanesD, sizeof(some));
    id[part] = widen(some);
    counter[part] = id[part] >> 2;
  }
  PhiloxWords words[kParts];
  philox_words_of(key, counter, words);
  for (int part = 0; part < kParts; ++part) {
    block.part[part] = __builtin_convertvector(word_of_code(words[part], id[part]), HalfU32);
  }
  return block;
}

struct GumbelBounds {
  VecD upper;
  VecD lower;
};

// Bounds of gumbel(word) without a logarithm. With v = 1 - u, v < -log(u) < v / (1 - v), so
// -log(v) + log(1 - v) < G < -log(v), where log(1 - v) > -1.387 v for v <= 1/2. As log2 is concave,
// v = 2^e (1 + f) has 0 <= log2(v) - (e + f) < 0.0861, and e + f is the bit pattern of the double
// read as a fixed-point number. The bounds are 0.06 apart where it matters (u near 1); 1e-9 covers
// the rounding of the float64 logarithms and of the pattern.
LRL_INLINE GumbelBounds gumbel_bounds(VecU64 word) {
  const VecU64 bits = (word ^ 0xffffffffULL) | 0x4330000000000000ULL;
  const VecD scaled = bit_cast<VecD>(bits) - 0x1p52 + 0.5;  // v * 2^32
  const VecU64 pattern = bit_cast<VecU64>(scaled) >> 20;
  const VecD biased = bit_cast<VecD>(pattern | 0x4330000000000000ULL) - 0x1p52;
  const VecD upper = (0x1p32 * (32.0 + 1023.0) - biased) * 0x1.62e42fefa39fp-33 + 1e-9;
  const VecD lower = upper - 0.05968 - scaled * (1.387 * 0x1p-32);
  return {upper, scaled > splat(0x1p31) ? splat(-kInf) : lower};
}

// noise[k] for k in [0, count), count rounded up to 32 by the caller's buffer.
inline void gumbel_noise(PhiloxKey key, int64_t count, double* noise) {
  for (int64_t k = 0; k < count; k += kNoiseBlock) {
    const NoiseBlock words = philox_block(key, k / kNoiseBlock);
    for (int64_t part = 0; part < kNoiseBlock / kLanesD; ++part) {
      store8(noise + k + part * kLanesD, gumbel(widen(words.part[part])));
    }
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
