// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the one
// stream of random numbers of every backend.
//
// key = (seed lo32, seed hi32), counter = (k / 4, offset lo32, offset hi32, 0), word k % 4 -> r;
// u = (r + 0.5) * 2^-32; Gumbel noise G = -log(-log(u)), in float64.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define LRL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LRL_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace latent_rl {
namespace philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

struct Words {
  uint32_t word[4];
};

LRL_HOST_DEVICE Words generate(uint64_t seed, uint64_t offset, uint32_t block) {
  uint32_t c0 = block;
  uint32_t c1 = static_cast<uint32_t>(offset);
  uint32_t c2 = static_cast<uint32_t>(offset >> 32);
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * kMultiplier0;
    const uint64_t p1 = static_cast<uint64_t>(c2) * kMultiplier1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// In (0, 1), exact in float64.
LRL_HOST_DEVICE double uniform(uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

}  // namespace philox
}  // namespace latent_rl
