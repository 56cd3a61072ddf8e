// Reductions over one block, in an order fixed by the block's size: bitwise repeatable.
#pragma once

#include <cstdint>

namespace latent_rl {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
struct Sum {
  __device__ T operator()(T a, T b) const { return a + b; }
};
template <typename T>
struct Max {
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// The reduction of `value` over the block, in every thread. `shared` has one entry per warp and one
// more; the block may use it again after the call.
template <int kThreads, typename T, typename Op>
__device__ T block_reduce(T value, Op op, T* shared) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize, "a block has at most 32 warps");
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, step));
  }
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = shared[lane < kWarps ? lane : 0];
    for (int step = kWarps / 2; step > 0; step /= 2) {
      value = op(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    if (lane == 0) shared[kWarps] = value;
  }
  __syncthreads();
  value = shared[kWarps];
  __syncthreads();
  return value;
}

}  // namespace cuda
}  // namespace latent_rl
