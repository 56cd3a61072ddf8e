// Stands in for the driver's header: tensor maps, and how to find the function that makes them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  unsigned char opaque[128];
};

namespace emulator {
// What the emulator keeps inside a map.
struct TensorMap {
  uint64_t magic;
  const unsigned char* base;
  uint64_t sizes[3], strides[3];  // bytes; columns lie side by side
  uint32_t box[3];
  bool swizzled;
};
constexpr uint64_t kMapMagic = 0x74656e736f726d70u;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "it must fit");

// The rules of cuTensorMapEncodeTiled's documentation, for 16-bit elements in three dimensions.
inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                             const cuuint64_t* sizes, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill) {
  constexpr uint64_t kElement = 2, kAlignment = 16;
  bool legal = rank == 3 && reinterpret_cast<uintptr_t>(base) % kAlignment == 0;
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  TensorMap mine = {kMapMagic, static_cast<const unsigned char*>(base), {}, {kElement}, {}, false};
  for (int i = 0; i < 3; ++i) {
    mine.sizes[i] = sizes[i];
    mine.box[i] = box[i];
    legal &= sizes[i] > 0 && sizes[i] <= uint64_t{1} << 32;
    legal &= box[i] > 0 && box[i] <= 256 && steps[i] == 1;
  }
  for (int i = 1; i < 3; ++i) {
    mine.strides[i] = strides[i - 1];
    legal &= mine.strides[i] % kAlignment == 0 && mine.strides[i] < uint64_t{1} << 40;
    legal &= mine.strides[i] >= mine.strides[i - 1] * sizes[i - 1];
  }
  mine.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  legal &= box[0] * kElement % kAlignment == 0;
  legal &= !mine.swizzled || box[0] * kElement <= 128;
  if (!legal) return CUDA_ERROR_INVALID_VALUE;
  memcpy(map, &mine, sizeof(mine));
  return CUDA_SUCCESS;
}
}  // namespace emulator

enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess = 0,
  cudaDriverEntryPointSymbolNotFound = 1
};
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *found = known ? reinterpret_cast<void*>(&emulator::encode_tiled) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
