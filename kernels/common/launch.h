// How every kernel is launched, and how it reaches its dynamic shared memory.
//
// Plain runtime calls, so that the tests' emulator can stand in for the runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace latent_rl {
namespace cuda {

constexpr size_t kSharedByDefault = 48 * 1024;

inline void check(const char* op, cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what +
                           " failed: " + cudaGetErrorString(status));
}

// Launches `kernel(args...)` and returns at once. Throws std::runtime_error when the launch fails.
template <typename... Params, typename... Args>
void launch(const char* op, void (*kernel)(Params...), dim3 grid, unsigned threads,
            size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (shared_bytes > kSharedByDefault) {
    // More than the default must be asked for.
    check(op,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), "the launch");
}

// Blocks for `tasks` of one block each; kernels stride over what is left.
inline unsigned blocks_for(int64_t tasks) {
  constexpr int64_t kMost = 1 << 20;
  return static_cast<unsigned>(tasks < kMost ? tasks : kMost);
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ T* dynamic_shared() {
#ifdef LATENT_RL_EMULATED
  return static_cast<T*>(emulator::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

}  // namespace cuda
}  // namespace latent_rl
