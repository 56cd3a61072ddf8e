// Noise in float32, for draws whose scores are checked against float64's.
//
// The noise lies in [-3.2, 22.9]: a code further than 27 below the likeliest cannot be drawn.
#pragma once

#include "isa/float_rows.h"
#include "isa/noise.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

// Beyond a likeliest logit of this size float64 rounds the noise itself by more than 1e-8.
constexpr double kLargestTop = 1e8;

LRL_INLINE VecU32 words16(const NoiseBlock& block, int64_t vector) {
  VecU32 words;
  memcpy(&words, &block.part[2 * vector], sizeof(words));
  return words;
}

// 2^32 v, v = 1 - u, to 6e-8 relatively.
LRL_INLINE VecF complement(VecU32 words) { return __builtin_convertvector(~words, VecF) + 0.5f; }

// log(1 + f) for f in [-0.3, 0.42], relatively to 1e-7: the coefficients are those of Cephes.
LRL_INLINE VecF log1p_small(VecF f) {
  const VecF z = f * f;
  VecF p = splat_f(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * z - 0.5f * z);
}

// log of positive normal numbers; where `near_one` holds it is log(1 + f) of the f given.
LRL_INLINE VecF log_f(VecF x, VecI32 near_one, VecF f) {
  const VecI32 bits = bit_cast<VecI32>(x);
  const VecI32 exponent = near_one ? VecI32{} : (bits - 0x3f3504f3) >> 23;
  const VecF rest = bit_cast<VecF>(bits - (exponent << 23)) - 1.0f;
  const VecF e = __builtin_convertvector(exponent, VecF);
  const VecF small = log1p_small(near_one ? f : rest);
  return (small - e * 2.12194440e-4f) + e * 0.693359375f;
}

// E = -log u in float32, to 3e-7 relatively. Where u is near 1 the logarithm is taken of its
// complement, which the word holds exactly.
LRL_INLINE VecF exponential_f(VecU32 words) {
  const VecF u = (__builtin_convertvector(words, VecF) + 0.5f) * 0x1p-32f;
  const VecI32 near_one = bit_cast<VecI32>(words >= 0xc0000000u);
  const VecF minus_v = complement(words) * -0x1p-32f;
  return -log_f(u, near_one, minus_v);
}

// Gumbel noise G = -log E in float32: within 4e-7 (1 + |G|).
LRL_INLINE VecF gumbel_f(VecU32 words) { return -log_f(exponential_f(words), VecI32{}, VecF{}); }

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
