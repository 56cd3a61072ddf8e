// What lies between the matrix products of gated_merge. Rows of I columns; tables float32 [K, I].
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

struct MergeForwardCudaArgs {
  DType dtype;
  void* pre_gate;           // [N, I], e's half of the product; becomes the whole
  void* pre_up;             // [N, I]
  const float* table_gate;  // [K, I], the codes' half
  const float* table_up;    // [K, I]
  const int64_t* codes;     // [N]
  void* activation;         // [N, I]
  int64_t rows;
  int64_t num_codes;
  int64_t width;  // I
};

struct MergeBackwardCudaArgs {
  DType dtype;
  const void* d_activation;  // [N, I]
  const void* pre_gate;      // [N, I]
  const void* pre_up;        // [N, I]
  const int64_t* codes;      // [N]
  void* d_pre;               // [N, 2 I], the gate's columns first
  void* activation;          // [N, I]
  int64_t rows;
  int64_t num_codes;
  int64_t width;
};

void merge_forward(const MergeForwardCudaArgs& args, void* stream);
void merge_backward(const MergeBackwardCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
