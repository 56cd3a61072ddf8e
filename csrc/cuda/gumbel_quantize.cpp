#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "gumbel_quantize/cuda_impl.h"
#include "nvtx_range.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

constexpr DType kFloat = DType::kFloat32;

float check_tau(const char* op, double tau) {
  if (tau > 0.0) return static_cast<float>(tau);
  throw std::invalid_argument(std::string(op) + ": tau must be positive, got " +
                              std::to_string(tau));
}

void gumbel_forward_cuda(int dtype_code, Address logits, Address seeds, Address codebook,
                         double tau, Address codes, Address vectors, Address entropy,
                         Address mean_probs, Address counts, Address soft, Address partials,
                         Address valid, int64_t rows, int64_t num_codes, int64_t dim,
                         int64_t row_stride, Address stream) {
  const char* op = "gumbel_forward_cuda";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "logits", row_stride, num_codes);
  const cuda::GumbelForwardCudaArgs args = {
      dtype,
      data(op, "logits", logits, rows * num_codes, dtype),
      ids(op, "seeds", seeds, rows),
      data(op, "codebook", codebook, num_codes * dim, dtype),
      check_tau(op, tau),
      ids(op, "codes", codes, rows),
      optional_data(op, "vectors", vectors, rows * dim, dtype),
      data<float>(op, "entropy", entropy, rows, kFloat),
      data<float>(op, "mean_probs", mean_probs, num_codes, kFloat),
      ids(op, "counts", counts, num_codes),
      optional_data(op, "soft", soft, rows * num_codes, dtype),
      data<float>(op, "partials", partials, num_codes, kFloat),
      check_pointer<int>(op, "valid", valid, 1, 4),
      rows,
      num_codes,
      dim,
      row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::gumbel_forward(args, reinterpret_cast<void*>(stream));
}

void gumbel_backward_cuda(int dtype_code, Address logits, Address seeds, Address codes,
                          Address g_soft, Address g_entropy, Address g_mean_probs,
                          Address valid_rows, double tau, Address dlogits, Address soft,
                          int64_t rows, int64_t num_codes, int64_t row_stride, Address stream) {
  const char* op = "gumbel_backward_cuda";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  const cuda::GumbelBackwardCudaArgs args = {
      dtype,
      data(op, "logits", logits, rows * num_codes, dtype),
      ids(op, "seeds", seeds, rows),
      ids(op, "codes", codes, rows),
      data(op, "g_soft", g_soft, rows * num_codes, dtype),
      data<float>(op, "g_entropy", g_entropy, rows, kFloat),
      data<float>(op, "g_mean_probs", g_mean_probs, num_codes, kFloat),
      ids(op, "valid_rows", valid_rows, 1),
      check_tau(op, tau),
      data(op, "dlogits", dlogits, rows * num_codes, dtype),
      optional_data(op, "soft", soft, rows * num_codes, dtype),
      rows,
      num_codes,
      row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::gumbel_backward(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_gumbel_quantize_cuda(py::module_& m) {
  m.def("gumbel_teams", &cuda::gumbel_teams);
  m.def("gumbel_forward_cuda", &gumbel_forward_cuda);
  m.def("gumbel_backward_cuda", &gumbel_backward_cuda);
}

}  // namespace latent_rl
