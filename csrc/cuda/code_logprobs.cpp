#include <pybind11/pybind11.h>

#include "arguments.h"
#include "code_logprobs/cuda_impl.h"
#include "cuda/bindings.h"
#include "nvtx_range.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

constexpr DType kFloat = DType::kFloat32;

cuda::LogprobsRows rows_argument(const char* op, int dtype_code, Address logits, Address ref_logits,
                                 Address codes, int64_t rows, int64_t num_codes, int64_t row_stride,
                                 int64_t ref_row_stride) {
  const DType dtype = check_dtype(op, "logits", dtype_code);
  check_rows(op, rows, num_codes);
  check_stride(op, "logits", row_stride, num_codes);
  if (ref_logits != 0) check_stride(op, "ref_logits", ref_row_stride, num_codes);
  return {dtype,
          data(op, "logits", logits, rows * num_codes, dtype),
          optional_data(op, "ref_logits", ref_logits, rows * num_codes, dtype),
          ids(op, "codes", codes, rows),
          rows,
          num_codes,
          row_stride,
          ref_row_stride};
}

void logprobs_forward_cuda(int dtype_code, Address logits, Address ref_logits, Address codes,
                           Address logprob, Address entropy, Address kl, int64_t rows,
                           int64_t num_codes, int64_t row_stride, int64_t ref_row_stride,
                           Address stream) {
  const char* op = "logprobs_forward_cuda";
  const cuda::LogprobsForwardCudaArgs args = {
      rows_argument(op, dtype_code, logits, ref_logits, codes, rows, num_codes, row_stride,
                    ref_row_stride),
      data<float>(op, "logprob", logprob, rows, kFloat),
      data<float>(op, "entropy", entropy, rows, kFloat), data<float>(op, "kl", kl, rows, kFloat)};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::logprobs_forward(args, reinterpret_cast<void*>(stream));
}

void logprobs_backward_cuda(int dtype_code, Address logits, Address ref_logits, Address codes,
                            Address g_logprob, Address g_entropy, Address g_kl, Address dlogits,
                            int64_t rows, int64_t num_codes, int64_t row_stride,
                            int64_t ref_row_stride, Address stream) {
  const char* op = "logprobs_backward_cuda";
  const cuda::LogprobsRows in = rows_argument(op, dtype_code, logits, ref_logits, codes, rows,
                                              num_codes, row_stride, ref_row_stride);
  const cuda::LogprobsBackwardCudaArgs args = {
      in, data<float>(op, "g_logprob", g_logprob, rows, kFloat),
      data<float>(op, "g_entropy", g_entropy, rows, kFloat),
      data<float>(op, "g_kl", g_kl, rows, kFloat),
      data(op, "dlogits", dlogits, rows * num_codes, in.dtype)};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::logprobs_backward(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_code_logprobs_cuda(py::module_& m) {
  m.def("logprobs_forward_cuda", &logprobs_forward_cuda);
  m.def("logprobs_backward_cuda", &logprobs_backward_cuda);
}

}  // namespace latent_rl
