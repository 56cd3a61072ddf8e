// Tensor maps, which tell Hopper's copy engine where a tensor's boxes lie.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "dtype.h"

namespace latent_rl {
namespace cuda {

constexpr int kSwizzleBytes = 128;

// A tensor [groups, rows, columns] of 16-bit elements, strides in elements. The engine wants the
// address and the strides to be multiples of 16 bytes.
struct Boxes {
  const void* base;
  DType dtype;
  int64_t groups, rows, columns, group_stride, row_stride;
};

// Map of boxes of `box_rows` rows of 128 bytes, swizzled by 128 bytes. The driver's function is
// asked for at run time, since linking to the driver would keep the library from loading without
// one. Throws std::runtime_error when the driver has no such function or refuses the tensor.
inline CUtensorMap tensor_map(const char* op, const Boxes& boxes, unsigned box_rows) {
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  constexpr unsigned kFirstVersion = 12000;
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(op,
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kFirstVersion,
                                         cudaEnableDefault, &result),
        "cudaGetDriverEntryPointByVersion");
  if (found == nullptr || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled");
  }
  const auto unsigned64 = [](int64_t value) { return static_cast<cuuint64_t>(value); };
  const cuuint64_t bytes = unsigned64(element_bytes(boxes.dtype));
  const cuuint64_t sizes[] = {unsigned64(boxes.columns), unsigned64(boxes.rows),
                              unsigned64(boxes.groups)};
  const cuuint64_t strides[] = {unsigned64(boxes.row_stride) * bytes,
                                unsigned64(boxes.group_stride) * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kSwizzleBytes / bytes), box_rows, 1};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = reinterpret_cast<Encode>(found)(
      &map,
      boxes.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      3, const_cast<void*>(boxes.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled failed with CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace cuda
}  // namespace latent_rl
