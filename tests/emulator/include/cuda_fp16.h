// float16: the conversions the kernels use, rounding to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __align__(2) __half {
  uint16_t bits;
};
inline float __half2float(__half v) {
  const _Float16 value = emulator::bits_as<_Float16>(v.bits);
  return static_cast<float>(value);
}
inline __half __float2half(float v) {
  return {emulator::bits_as<uint16_t>(static_cast<_Float16>(v))};
}
inline __half __float2half_rn(float v) { return __float2half(v); }
inline __half __double2half(double v) {
  return {emulator::bits_as<uint16_t>(static_cast<_Float16>(v))};
}
