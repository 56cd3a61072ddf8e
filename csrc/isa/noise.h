// Gumbel noise from the Philox stream of common/philox.h, eight blocks of four words at a time.
#pragma once

#include "common/philox.h"
#include "isa/vec.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

constexpr int64_t kNoiseBlock = 32;

struct PhiloxKey {
  uint64_t seed;
  uint64_t offset;
};

// The 32 words of codes [32 * block, 32 * block + 32), in the order of the codes.
LRL_INLINE void philox_block(PhiloxKey key, int64_t block, uint32_t* words) {
  const VecU64 low32 = VecU64{} + 0xffffffffULL;
  const VecU64 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  VecU64 c0 = (lane + static_cast<uint64_t>(block) * 8) & low32;
  VecU64 c1 = VecU64{} + (key.offset & 0xffffffffULL);
  VecU64 c2 = VecU64{} + (key.offset >> 32);
  VecU64 c3 = VecU64{};
  uint32_t k0 = static_cast<uint32_t>(key.seed);
  uint32_t k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round) {
    const VecU64 p0 = c0 * static_cast<uint64_t>(philox::kMultiplier0);
    const VecU64 p1 = c2 * static_cast<uint64_t>(philox::kMultiplier1);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c1 = p1 & low32;
    c3 = p0 & low32;
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
  // Words 0 and 1, and words 2 and 3, of each counter side by side; then counter after counter.
  const VecU64 front = c0 | (c1 << 32);
  const VecU64 back = c2 | (c3 << 32);
#if defined(__clang__)
  const VecU64 first = __builtin_shufflevector(front, back, 0, 8, 1, 9, 2, 10, 3, 11);
  const VecU64 second = __builtin_shufflevector(front, back, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  const VecU64 first = __builtin_shuffle(front, back, VecU64{0, 8, 1, 9, 2, 10, 3, 11});
  const VecU64 second = __builtin_shuffle(front, back, VecU64{4, 12, 5, 13, 6, 14, 7, 15});
#endif
  memcpy(words, &first, sizeof(first));
  memcpy(words + 16, &second, sizeof(second));
}

LRL_INLINE VecD gumbel_of_words(const uint32_t* words) {
  HalfU32 r;
  memcpy(&r, words, sizeof(r));
  const VecU64 bits = __builtin_convertvector(r, VecU64) | 0x4330000000000000ULL;
  const VecD u = (bit_cast<VecD>(bits) - 0x1p52 + 0.5) * 0x1p-32;
  return -log(-log(u));
}

// An upper bound of gumbel_of_words without a logarithm. -log(u) > 1 - u = v, so G < -log(v), and
// -log(v) <= -ln 2 * floor(log2 v). The slack covers the rounding of the float64 logarithms.
LRL_INLINE VecD gumbel_bound(const uint32_t* words) {
  HalfU32 r;
  memcpy(&r, words, sizeof(r));
  // v = (~r + 0.5) * 2^-32; floor(log2(~r + 0.5)) is the exponent of the double.
  const VecU64 bits = __builtin_convertvector(~r, VecU64) | 0x4330000000000000ULL;
  const VecU64 exponent = bit_cast<VecU64>(bit_cast<VecD>(bits) - 0x1p52 + 0.5) >> 52;
  const VecD biased = bit_cast<VecD>(exponent | 0x4330000000000000ULL) - 0x1p52;
  return (32.0 + 1023.0 - biased) * 0x1.62e42fefa39fp-1 + 1e-9;
}

// noise[k] for k in [0, count), count rounded up to 32 by the caller's buffer.
inline void gumbel_noise(PhiloxKey key, int64_t count, double* noise) {
  uint32_t words[kNoiseBlock];
  for (int64_t k = 0; k < count; k += kNoiseBlock) {
    philox_block(key, k / kNoiseBlock, words);
    for (int64_t part = 0; part < kNoiseBlock; part += kLanesD) {
      store8(noise + k + part, gumbel_of_words(words + part));
    }
  }
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
