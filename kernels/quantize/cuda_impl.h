// quantize on a CUDA device, once the codes are known.
#pragma once

#include <cstdint>

#include "segments/cuda_impl.h"

namespace latent_rl {
namespace cuda {

struct QuantizeForwardCudaArgs {
  DType dtype;
  const void* x;         // [N, D]
  const void* codebook;  // [K, D]
  const Placed* placed;  // [N] of group_rows
  const int* first;      // [K + 1] of group_rows
  void* quantized;       // [N, D] out
  float* error;          // [1] out: mean over valid rows and D of (x - c)^2
  float* sums;           // [K, D] out
  float* perplexity;     // [1] out
  float* partials;       // [segment_sum_workspace(N, D)]
  double* block_errors;  // [kQuantizeBlocks]
  int64_t rows, num_codes, dim;
  int64_t x_row_stride;
};

struct QuantizeBackwardCudaArgs {
  DType dtype;
  const void* grad;                 // [N, D] of quantized
  const float* grad_commitment;     // [1]
  const float* grad_codebook_loss;  // [1]
  const void* x;                    // [N, D]
  const void* codebook;             // [K, D]
  const int64_t* codes;             // [N]
  const int64_t* counts;            // [K]
  const float* sums;                // [K, D]
  void* dx;                         // [N, D] out
  void* dcodebook;                  // [K, D] out
  double* scales;                   // [2]: workspace
  int64_t rows, num_codes, dim;
  int64_t grad_row_stride, x_row_stride;
};

// Blocks of the pass over the rows: enough to fill any device, few enough for one block to add up.
constexpr int64_t kQuantizeBlocks = 4096;

// Launch on `stream` (a cudaStream_t) and return at once. Throw std::runtime_error when a launch
// fails.
void quantize_forward(const QuantizeForwardCudaArgs& args, void* stream);
void quantize_backward(const QuantizeBackwardCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
