#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "nvtx_range.h"
#include "quantize/cuda_impl.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

constexpr DType kFloat = DType::kFloat32;

void quantize_forward_cuda(int dtype_code, Address x, Address codebook, Address placed,
                           Address first, Address quantized, Address error, Address sums,
                           Address perplexity, Address partials, Address block_errors, int64_t rows,
                           int64_t num_codes, int64_t dim, int64_t x_row_stride, Address stream) {
  const char* op = "quantize_forward_cuda";
  const DType dtype = check_dtype(op, "x", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "x", x_row_stride, dim);
  const cuda::QuantizeForwardCudaArgs args = {
      dtype,
      data(op, "x", x, rows * dim, dtype),
      data(op, "codebook", codebook, num_codes * dim, dtype),
      check_pointer<cuda::Placed>(op, "placed", placed, rows, 8),
      check_pointer<int>(op, "first", first, num_codes + 1, 4),
      data(op, "quantized", quantized, rows * dim, dtype),
      data<float>(op, "error", error, 1, kFloat),
      data<float>(op, "sums", sums, num_codes * dim, kFloat),
      data<float>(op, "perplexity", perplexity, 1, kFloat),
      data<float>(op, "partials", partials, rows * dim, kFloat),
      data<double>(op, "block_errors", block_errors, cuda::kQuantizeBlocks, DType::kFloat64),
      rows,
      num_codes,
      dim,
      x_row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::quantize_forward(args, reinterpret_cast<void*>(stream));
}

void quantize_backward_cuda(int dtype_code, Address grad, Address grad_commitment,
                            Address grad_codebook_loss, Address x, Address codebook, Address codes,
                            Address counts, Address sums, Address dx, Address dcodebook,
                            Address scales, int64_t rows, int64_t num_codes, int64_t dim,
                            int64_t grad_row_stride, int64_t x_row_stride, Address stream) {
  const char* op = "quantize_backward_cuda";
  const DType dtype = check_dtype(op, "x", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "grad", grad_row_stride, dim);
  check_stride(op, "x", x_row_stride, dim);
  const cuda::QuantizeBackwardCudaArgs args = {
      dtype,
      data(op, "grad", grad, rows * dim, dtype),
      data<float>(op, "grad_commitment", grad_commitment, 1, kFloat),
      data<float>(op, "grad_codebook_loss", grad_codebook_loss, 1, kFloat),
      data(op, "x", x, rows * dim, dtype),
      data(op, "codebook", codebook, num_codes * dim, dtype),
      ids(op, "codes", codes, rows),
      ids(op, "counts", counts, num_codes),
      data<float>(op, "sums", sums, num_codes * dim, kFloat),
      data(op, "dx", dx, rows * dim, dtype),
      data(op, "dcodebook", dcodebook, num_codes * dim, dtype),
      data<double>(op, "scales", scales, 2, DType::kFloat64),
      rows,
      num_codes,
      dim,
      grad_row_stride,
      x_row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::quantize_backward(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_quantize_cuda(py::module_& m) {
  m.attr("QUANTIZE_BLOCKS") = cuda::kQuantizeBlocks;
  m.def("quantize_forward_cuda", &quantize_forward_cuda);
  m.def("quantize_backward_cuda", &quantize_backward_cuda);
}

}  // namespace latent_rl
