#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "nvtx_range.h"
#include "segments/cuda_impl.h"

namespace py = pybind11;

namespace latent_rl {
namespace {

constexpr int64_t kIntBytes = 4;

void group_rows_cuda(Address codes, Address placed, Address first, Address counts,
                     Address workspace, int64_t rows, int64_t num_codes, Address stream) {
  const char* op = "group_rows_cuda";
  check_rows(op, rows, num_codes);
  const cuda::GroupRowsArgs args = {
      ids(op, "codes", codes, rows),
      check_pointer<cuda::Placed>(op, "placed", placed, rows, 2 * kIntBytes),
      check_pointer<int>(op, "first", first, num_codes + 1, kIntBytes),
      ids(op, "counts", counts, num_codes),
      check_pointer<int>(op, "workspace", workspace, 1, kIntBytes),
      rows,
      num_codes};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::group_rows(args, reinterpret_cast<void*>(stream));
}

void segment_sum_cuda(int dtype_code, Address values, Address placed, Address first, Address sums,
                      Address partials, int64_t rows, int64_t num_codes, int64_t dim,
                      int64_t row_stride, Address stream) {
  const char* op = "segment_sum_cuda";
  const DType dtype = check_dtype(op, "values", dtype_code);
  check_rows(op, rows, num_codes);
  check_size(op, "dim", dim, 1);
  check_stride(op, "values", row_stride, dim);
  const cuda::SegmentSumCudaArgs args = {
      dtype,
      data(op, "values", values, rows * dim, dtype),
      check_pointer<cuda::Placed>(op, "placed", placed, rows, 2 * kIntBytes),
      check_pointer<int>(op, "first", first, num_codes + 1, kIntBytes),
      data<float>(op, "sums", sums, num_codes * dim, DType::kFloat32),
      data<float>(op, "partials", partials, rows * dim, DType::kFloat32),
      rows,
      num_codes,
      dim,
      row_stride};
  const py::gil_scoped_release release;
  const NvtxRange range(op);
  cuda::segment_sum(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_segments_cuda(py::module_& m) {
  m.def("group_rows_workspace", &cuda::group_rows_workspace);
  m.def("segment_sum_workspace", &cuda::segment_sum_workspace);
  m.def("group_rows_cuda", &group_rows_cuda);
  m.def("segment_sum_cuda", &segment_sum_cuda);
}

}  // namespace latent_rl
