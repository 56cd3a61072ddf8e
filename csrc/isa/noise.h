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
  for (int i = 0; i < 8; ++i) {
    words[4 * i + 0] = static_cast<uint32_t>(c0[i]);
    words[4 * i + 1] = static_cast<uint32_t>(c1[i]);
    words[4 * i + 2] = static_cast<uint32_t>(c2[i]);
    words[4 * i + 3] = static_cast<uint32_t>(c3[i]);
  }
}

LRL_INLINE VecD gumbel_of_words(const uint32_t* words) {
  HalfU32 r;
  memcpy(&r, words, sizeof(r));
  const VecU64 bits = __builtin_convertvector(r, VecU64) | 0x4330000000000000ULL;
  const VecD u = (bit_cast<VecD>(bits) - 0x1p52 + 0.5) * 0x1p-32;
  return -log(-log(u));
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
