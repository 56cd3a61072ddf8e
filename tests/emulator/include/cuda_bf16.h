// bfloat16: the conversions the kernels use, rounding to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  return __uint_as_float(static_cast<unsigned>(v.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float v) {
  const unsigned bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __float2bfloat16(v); }
// Rounds once: to odd in float32 first, which keeps what the second rounding needs to know.
inline __nv_bfloat16 __double2bfloat16(double v) {
  float near = static_cast<float>(v);
  const double exact = static_cast<double>(near);
  if (exact != v && v == v && std::isfinite(near)) {
    unsigned bits = __float_as_uint(near);
    if ((exact > v) == (v > 0)) --bits;  // towards zero
    near = __uint_as_float(bits | 1);
  }
  return __float2bfloat16(near);
}
