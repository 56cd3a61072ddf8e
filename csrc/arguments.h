// Addresses and sizes from Python, checked and turned into the ops' arguments.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "ops.h"

namespace latent_rl {

using Address = uintptr_t;

// Pointers to elements of `dtype`, and to int64 ids.
template <typename T = void>
T* data(const char* op, const char* name, Address address, int64_t count, DType dtype) {
  return check_pointer<T>(op, name, address, count, element_bytes(dtype));
}
inline int64_t* ids(const char* op, const char* name, Address address, int64_t count) {
  return check_pointer<int64_t>(op, name, address, count, 8);
}
inline void* optional_data(const char* op, const char* name, Address address, int64_t count,
                           DType dtype) {
  return address == 0 ? nullptr : data(op, name, address, count, dtype);
}

inline void check_rows(const char* op, int64_t rows, int64_t num_codes) {
  check_size(op, "rows", rows, 0);
  check_size(op, "num_codes", num_codes, 1);
  if (num_codes > INT32_MAX)
    throw std::invalid_argument(std::string(op) + ": num_codes is too large");
}

inline SampleArgs sample_args(const char* op, int dtype_code, Address logits, Address seeds,
                              Address offsets, double temperature, int64_t top_k, double top_p,
                              double min_p, Address codes, Address logprob, Address logprob_full,
                              Address entropy, int64_t rows, int64_t num_codes,
                              int64_t row_stride) {
  const DType dtype = check_dtype(op, "logits", dtype_code);
  const DType acc = accumulation(dtype);
  check_rows(op, rows, num_codes);
  check_size(op, "top_k", top_k, 0);
  check_stride(op, "logits", row_stride, num_codes);
  if (!(temperature >= 0.0)) {
    throw std::invalid_argument(std::string(op) + ": temperature must not be negative, got " +
                                std::to_string(temperature));
  }
  return SampleArgs{dtype,
                    data(op, "logits", logits, rows * num_codes, dtype),
                    ids(op, "seeds", seeds, rows),
                    ids(op, "offsets", offsets, rows),
                    temperature,
                    top_p,
                    min_p,
                    top_k,
                    ids(op, "codes", codes, rows),
                    data(op, "logprob", logprob, rows, acc),
                    data(op, "logprob_full", logprob_full, rows, acc),
                    data(op, "entropy", entropy, rows, acc),
                    rows,
                    num_codes,
                    row_stride};
}

}  // namespace latent_rl
