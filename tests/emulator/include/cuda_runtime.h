// Stands in for CUDA's header: the part of the runtime and of the device's language that the
// kernels use, for a C++ compiler. See runtime.h for how a grid runs.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Thread-local, so that the emulator finds and poisons all of it; fibers share one thread.
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 blockDim, gridDim;
extern uint3 threadIdx, blockIdx;

#define LRL_EMULATED_VECTORS(name, type)                                                        \
  struct __align__(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct __align__(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LRL_EMULATED_VECTORS(float, float)
LRL_EMULATED_VECTORS(double, double)
LRL_EMULATED_VECTORS(int, int)
LRL_EMULATED_VECTORS(uint, unsigned)
LRL_EMULATED_VECTORS(longlong, long long)
LRL_EMULATED_VECTORS(ushort, unsigned short)
#undef LRL_EMULATED_VECTORS

#include "cuda_host.h"
#include "cuda_intrinsics.h"
#include "cuda_warp.h"
