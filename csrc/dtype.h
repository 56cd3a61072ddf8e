// The dtypes that cross the Python boundary; the codes are repeated in latent_rl/native/_call.py.
#pragma once

#include <cstdint>

namespace latent_rl {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int kDTypeCount = 4;

constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The accumulation dtype of every op: float64 for float64 input, else float32.
constexpr DType accumulation(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace latent_rl
