#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "gated_merge/cuda_impl.h"
#include "nvtx_range.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

void merge_forward_cuda(int dtype_code, Address pre_gate, Address pre_up, Address table_gate,
                        Address table_up, Address codes, Address activation, int64_t rows,
                        int64_t num_codes, int64_t width, Address stream) {
  const char* op = "merge_forward_cuda";
  const DType dtype = check_dtype(op, "pre_gate", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "width", width, 1);
  const int64_t count = rows * width, entries = num_codes * width;
  const cuda::MergeForwardCudaArgs args = {
      dtype,
      data(op, "pre_gate", pre_gate, count, dtype),
      data(op, "pre_up", pre_up, count, dtype),
      data<float>(op, "table_gate", table_gate, entries, DType::kFloat32),
      data<float>(op, "table_up", table_up, entries, DType::kFloat32),
      ids(op, "codes", codes, rows),
      data(op, "activation", activation, count, dtype),
      rows,
      num_codes,
      width};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::merge_forward(args, reinterpret_cast<void*>(stream));
}

void merge_backward_cuda(int dtype_code, Address d_activation, Address pre_gate, Address pre_up,
                         Address codes, Address d_pre, Address activation, int64_t rows,
                         int64_t num_codes, int64_t width, Address stream) {
  const char* op = "merge_backward_cuda";
  const DType dtype = check_dtype(op, "pre_gate", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "width", width, 1);
  const int64_t count = rows * width;
  const cuda::MergeBackwardCudaArgs args = {dtype,
                                            data(op, "d_activation", d_activation, count, dtype),
                                            data(op, "pre_gate", pre_gate, count, dtype),
                                            data(op, "pre_up", pre_up, count, dtype),
                                            ids(op, "codes", codes, rows),
                                            data(op, "d_pre", d_pre, 2 * count, dtype),
                                            data(op, "activation", activation, count, dtype),
                                            rows,
                                            num_codes,
                                            width};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::merge_backward(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_gated_merge_cuda(py::module_& m) {
  m.def("merge_forward_cuda", &merge_forward_cuda);
  m.def("merge_backward_cuda", &merge_backward_cuda);
}

}  // namespace latent_rl
