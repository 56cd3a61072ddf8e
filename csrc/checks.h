// Checks at the Python boundary: a wrong pointer, size or dtype raises, and never crashes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace latent_rl {

// TypeError in Python; std::invalid_argument becomes ValueError.
struct DTypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void check_size(const char* op, const char* name, int64_t value, int64_t least) {
  if (value < least) {
    throw std::invalid_argument(std::string(op) + ": " + name + " must be at least " +
                                std::to_string(least) + ", got " + std::to_string(value));
  }
}

inline void check_stride(const char* op, const char* name, int64_t stride, int64_t width) {
  if (stride < width) {
    throw std::invalid_argument(std::string(op) + ": the row stride of " + name +
                                " must be at least its width (" + std::to_string(width) +
                                "), got " + std::to_string(stride));
  }
}

inline DType check_dtype(const char* op, const char* name, int code) {
  if (code < 0 || code >= kDTypeCount) {
    throw DTypeError(std::string(op) + ": " + name +
                     " must be float32, float64, bfloat16 or float16, got dtype code " +
                     std::to_string(code));
  }
  return static_cast<DType>(code);
}

// A null pointer is legal only where nothing is read; a pointer off its alignment never is.
template <typename T>
T* check_pointer(const char* op, const char* name, uintptr_t address, int64_t count,
                 int64_t alignment) {
  if (address == 0 && count > 0) {
    throw std::invalid_argument(std::string(op) + ": " + name + " is a null pointer but " +
                                std::to_string(count) + " elements are wanted of it");
  }
  if (address % static_cast<uintptr_t>(alignment) != 0) {
    throw std::invalid_argument(std::string(op) + ": " + name + " is not aligned to its " +
                                std::to_string(alignment) + "-byte elements");
  }
  return reinterpret_cast<T*>(address);
}

}  // namespace latent_rl
