// Vectors of one register of the instruction set, for code whose speed is that of float32.
#pragma once

#include "isa/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

#if defined(LATENT_RL_LANES_16)
constexpr int kLanesF = 16;
#elif defined(LATENT_RL_LANES_8)
constexpr int kLanesF = 8;
#else
constexpr int kLanesF = 4;
#endif

typedef float LaneF __attribute__((vector_size(4 * kLanesF)));
typedef int32_t LaneI __attribute__((vector_size(4 * kLanesF)));
typedef uint32_t LaneU __attribute__((vector_size(4 * kLanesF)));
typedef uint16_t LaneU16 __attribute__((vector_size(2 * kLanesF)));

LRL_INLINE LaneF load_lanes(const float* p) {
  LaneF v;
  memcpy(&v, p, sizeof(v));
  return v;
}
LRL_INLINE LaneF load_lanes(const BF16* p) {
  LaneU16 h;
  memcpy(&h, p, sizeof(h));
  return bit_cast<LaneF>(__builtin_convertvector(h, LaneU) << 16);
}
LRL_INLINE LaneF load_lanes(const F16* p) {
  LaneU16 h16;
  memcpy(&h16, p, sizeof(h16));
#if defined(LATENT_RL_LANES_16)
  return bit_cast<LaneF>(_mm512_cvtph_ps(bit_cast<__m256i>(h16)));
#elif defined(LATENT_RL_LANES_8)
  return half_to_float(h16);
#else
  const LaneU h = __builtin_convertvector(h16, LaneU);
  const LaneU magnitude = (h & 0x7fffu) << 13;
  // Rebias the exponent by multiplication, which also normalises subnormals.
  const LaneU scaled = bit_cast<LaneU>(bit_cast<LaneF>(magnitude) * 0x1p112f);
  const LaneU special = bit_cast<LaneU>(magnitude >= (0x7c00u << 13));
  const LaneU bits = (special & (magnitude | 0x7f800000u)) | (~special & scaled);
  return bit_cast<LaneF>(bits | ((h & 0x8000u) << 16));
#endif
}

// Up to kLanesF elements; the missing ones are zero.
template <typename T>
LRL_INLINE LaneF load_some_lanes(const T* p, int64_t count) {
  if (count >= kLanesF) return load_lanes(p);
  LaneF v = LaneF{};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<float>(to_double(p[lane]));
  return v;
}

LRL_INLINE LaneF max(LaneF a, LaneF b) { return a > b ? a : b; }
LRL_INLINE LaneF min(LaneF a, LaneF b) { return a < b ? a : b; }

// In any order: bounds on sums of float32 lanes allow for one after the other.
LRL_INLINE float sum_of(LaneF v) {
#if defined(LATENT_RL_LANES_16)
  return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#else
  float sum = v[0];
  for (int lane = 1; lane < kLanesF; ++lane) sum += v[lane];
  return sum;
#endif
}
LRL_INLINE float max_of(LaneF v) {
#if defined(LATENT_RL_LANES_16)
  return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#else
  float best = v[0];
  for (int lane = 1; lane < kLanesF; ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
#endif
}

// One bit per lane of a comparison's result.
LRL_INLINE uint32_t lane_bits(LaneI mask) {
#if defined(LATENT_RL_LANES_16)
  return static_cast<uint32_t>(_mm512_movepi32_mask(bit_cast<__m512i>(mask)));
#elif defined(LATENT_RL_LANES_8)
  return static_cast<uint32_t>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanesF; ++lane) bits |= (mask[lane] != 0 ? 1u : 0u) << lane;
  return bits;
#endif
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
