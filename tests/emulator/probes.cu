// Kernels that are right, and kernels each wrong in one way that the emulator must find.
#include <cuda_runtime.h>

#include "common/block.cuh"
#include "common/launch.h"
#include "probes.h"

namespace latent_rl {
namespace cuda {
namespace {

constexpr int kThreads = 64;

__device__ float* shared_floats() {
  __shared__ float values[kThreads];
  return values;
}

// Every thread reads its neighbour's value.
__global__ void _exchange_kernel(float* out, bool barrier) {
  float* values = shared_floats();
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void _uninitialised_kernel(float* out) {
  out[threadIdx.x] = shared_floats()[threadIdx.x];
}

__global__ void _one_sided_kernel(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1.0f;
  } else {
    __syncwarp();
    __syncthreads();
    out[threadIdx.x] = 2.0f;
  }
}

// Half a warp waits for lanes that wait elsewhere.
__global__ void _half_warp_kernel(float* out) {
  if (threadIdx.x % 32 < 16) {
    out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
  }
  __syncthreads();
}

__global__ void _misaligned_kernel(float* out) {
  *reinterpret_cast<float4*>(out + 1) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

__global__ void _past_array_kernel(float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 0.0f;
  out[threadIdx.x] = values[threadIdx.x + static_cast<unsigned>(out[0]) + 1];
}

__global__ void _past_shared_kernel(float* out, int index) {
  dynamic_shared<float>()[index] = 0.0f;
  out[threadIdx.x] = 0.0f;
}

__global__ void _past_tensor_kernel(float* out, int index) { out[0] = out[index]; }

__global__ void _float_atomic_kernel(float* out) {
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = 0.0f;
  atomicAdd(out, threadIdx.x % 2 == 0 ? 1e8f : 0.1f * static_cast<float>(threadIdx.x));
}

__global__ void _warp_kernel(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float value = static_cast<float>(lane);
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  const unsigned evens = __ballot_sync(kFullWarp, lane % 2 == 0);
  const unsigned mates = __match_any_sync(kFullWarp, lane % 4);
  const float above = __shfl_down_sync(kFullWarp, static_cast<float>(lane), 1u);
  const float below = __shfl_up_sync(kFullWarp, static_cast<float>(lane), 2u);
  const float third = __shfl_sync(kFullWarp, static_cast<float>(lane), 3);
  float lower = 0.0f;
  if (lane < 16) lower = static_cast<float>(__reduce_add_sync(0xffffu, 1u));
  out[threadIdx.x] = value + static_cast<float>(__popc(evens & mates)) * 1000.0f + above * 0.5f +
                     below * 0.25f + third + lower * 1e5f;
}

}  // namespace

void probe(const std::string& name, float* out) {
  const auto run = [&](auto kernel, size_t shared, auto... args) {
    launch("probe", kernel, 1, kThreads, shared, nullptr, out, args...);
  };
  if (name == "exchange") run(_exchange_kernel, 0, true);
  if (name == "race") run(_exchange_kernel, 0, false);
  if (name == "uninitialised") run(_uninitialised_kernel, 0);
  if (name == "one_sided") run(_one_sided_kernel, 0);
  if (name == "half_warp") run(_half_warp_kernel, 0);
  if (name == "misaligned") run(_misaligned_kernel, 0);
  if (name == "past_array") run(_past_array_kernel, 0);
  if (name == "past_shared") run(_past_shared_kernel, 256, 64);
  if (name == "inside_shared") run(_past_shared_kernel, 256, 63);
  if (name == "past_tensor") run(_past_tensor_kernel, 0, kThreads);
  if (name == "float_atomic") run(_float_atomic_kernel, 0);
  if (name == "warp") run(_warp_kernel, 0);
}

}  // namespace cuda
}  // namespace latent_rl
