#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "nvtx_range.h"
#include "sample_tokens/cuda_impl.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

void sample_tokens_cuda(int dtype_code, Address logits, Address seeds, Address offsets,
                        Address tokens, Address parts, int64_t rows, int64_t num_tokens,
                        int64_t row_stride, Address stream) {
  const char* op = "sample_tokens_cuda";
  const DType dtype = check_dtype(op, "logits", dtype_code);
  check_rows(op, rows, num_tokens);
  check_stride(op, "logits", row_stride, num_tokens);
  const cuda::SampleTokensArgs args = {
      dtype,
      data(op, "logits", logits, rows * num_tokens, dtype),
      ids(op, "seeds", seeds, rows),
      ids(op, "offsets", offsets, rows),
      ids(op, "tokens", tokens, rows),
      check_pointer<cuda::TokenPart>(op, "parts", parts,
                                     cuda::sample_tokens_workspace(rows, num_tokens),
                                     alignof(cuda::TokenPart)),
      rows,
      num_tokens,
      row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::sample_tokens(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_sample_tokens_cuda(py::module_& m) {
  m.attr("TOKEN_PART_BYTES") = static_cast<int64_t>(sizeof(cuda::TokenPart));
  m.def("sample_tokens_workspace", &cuda::sample_tokens_workspace);
  m.def("sample_tokens_cuda", &sample_tokens_cuda);
}

}  // namespace latent_rl
