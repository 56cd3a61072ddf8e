// Elements of the three dtypes of the kernels as float32, and vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

__device__ inline void from_float(float v, float* out) { *out = v; }
__device__ inline void from_float(float v, __nv_bfloat16* out) { *out = __float2bfloat16(v); }
__device__ inline void from_float(float v, __half* out) { *out = __float2half(v); }

__device__ inline float nan_float() { return __int_as_float(0x7fc00000); }

// Read and written in one access, so its address must be a multiple of its size.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T at[kWidth];
};

template <int kWidth, typename T>
__device__ Vector<T, kWidth> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}
template <int kWidth, typename T>
__device__ void store_vector(T* to, const Vector<T, kWidth>& v) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = v;
}

constexpr int kVectorBytes = 16;
template <typename T>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(T));

// Whether rows of `count` elements at `stride` can be read sixteen bytes at a time.
template <typename T>
bool vectorises(const void* base, int64_t stride, int64_t count) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && stride % kVectorWidth<T> == 0 &&
         count % kVectorWidth<T> == 0;
}

template <typename T>
struct DeviceType {
  using type = T;
};

// Calls `run` with the device type of `dtype`; float64 has no kernels on a device.
template <typename Run>
void with_device_type(const char* op, DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(DeviceType<float>());
    case DType::kBFloat16:
      return run(DeviceType<__nv_bfloat16>());
    case DType::kFloat16:
      return run(DeviceType<__half>());
    case DType::kFloat64:
      break;
  }
  throw std::invalid_argument(std::string(op) + ": float64 has no CUDA kernel");
}

}  // namespace cuda
}  // namespace latent_rl
