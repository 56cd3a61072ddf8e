#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "nearest_code/cuda_impl.h"
#include "nvtx_range.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

constexpr int64_t kLimits = 8;
constexpr int64_t kCopyBytes = 16;  // what the copy engine aligns to

// Addresses and strides of what the copy engine reads.
void check_copied(const char* op, const char* name, Address address, int64_t stride) {
  if (address % kCopyBytes != 0 || stride * 2 % kCopyBytes != 0) {
    throw std::invalid_argument(std::string(op) + ": " + name +
                                " and its strides must be multiples of 16 bytes");
  }
}

void nearest_screen_cuda(int dtype_code, Address x, Address table, Address bias, Address scale,
                         Address limits, Address codes, Address listed, Address threshold,
                         Address count, int64_t groups, int64_t rows, int64_t num_codes,
                         int64_t dim, int64_t x_group_stride, int64_t x_row_stride,
                         float accumulation, float underflow, float slack, Address stream) {
  const char* op = "nearest_screen_cuda";
  const DType dtype = check_dtype(op, "x", dtype_code);
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    throw DTypeError(std::string(op) + ": x must be bfloat16 or float16");
  }
  check_rows(op, rows, num_codes);
  check_size(op, "groups", groups, 0);
  check_size(op, "dim", dim, 1);
  check_stride(op, "x", x_row_stride, dim);
  // Places in a box are 32-bit integers.
  if (rows > INT32_MAX / 2 || groups > INT32_MAX || dim > cuda::kScreenWidest) {
    throw std::invalid_argument(std::string(op) +
                                ": rows must be less than 2^30 and dim at most 256, got " +
                                std::to_string(rows) + " and " + std::to_string(dim));
  }
  check_copied(op, "x", x, x_row_stride);
  check_copied(op, "x", x, x_group_stride);
  check_copied(op, "table", table, dim);
  const int64_t total = groups * rows, entries = groups * num_codes;
  const auto floats = [op](const char* name, Address address, int64_t size) {
    return data<float>(op, name, address, size, DType::kFloat32);
  };
  const cuda::NearestScreenCudaArgs args = {
      dtype,
      data(op, "x", x, total * dim, dtype),
      data(op, "table", table, entries * dim, dtype),
      floats("bias", bias, entries),
      floats("scale", scale, 0),
      floats("limits", limits, groups * kLimits),
      ids(op, "codes", codes, total),
      ids(op, "listed", listed, total),
      floats("threshold", threshold, total),
      check_pointer<int>(op, "count", count, groups, sizeof(int)),
      groups,
      rows,
      num_codes,
      dim,
      x_group_stride,
      x_row_stride,
      accumulation,
      underflow,
      slack};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::nearest_screen(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_nearest_code_cuda(py::module_& m) { m.def("nearest_screen_cuda", &nearest_screen_cuda); }

}  // namespace latent_rl
