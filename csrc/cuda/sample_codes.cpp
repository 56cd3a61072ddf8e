#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "nvtx_range.h"
#include "sample_codes/cuda_impl.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

void sample_codes_cuda(int dtype_code, Address logits, Address seeds, Address offsets,
                       double temperature, int64_t top_k, double top_p, double min_p, Address codes,
                       Address logprob, Address logprob_full, Address entropy, int64_t rows,
                       int64_t num_codes, int64_t row_stride, Address stream) {
  const char* op = "sample_codes_cuda";
  const SampleArgs args =
      sample_args(op, dtype_code, logits, seeds, offsets, temperature, top_k, top_p, min_p, codes,
                  logprob, logprob_full, entropy, rows, num_codes, row_stride);
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::sample_codes(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_sample_codes_cuda(py::module_& m) { m.def("sample_codes_cuda", &sample_codes_cuda); }

}  // namespace latent_rl
