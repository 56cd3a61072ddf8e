// gumbel_quantize on a CUDA device.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

constexpr int64_t kMaxGumbelCodes = 8192;

struct GumbelForwardCudaArgs {
  DType dtype;           // of logits, codebook, vectors and soft
  const void* logits;    // [N, K]
  const int64_t* seeds;  // [N]
  const void* codebook;  // [K, D]
  float tau;
  int64_t* codes;     // [N] out
  void* vectors;      // [N, D] out: codebook[codes], or null
  float* entropy;     // [N] out
  float* mean_probs;  // [K] out
  int64_t* counts;    // [K], zero on entry; out
  void* soft;         // [N, K] out: softmax((logits + G) / tau), or null
  float* partials;    // [gumbel_teams(N, K), K]: workspace
  int* valid;         // [gumbel_teams(N, K)]: workspace
  int64_t rows, num_codes, dim;
  int64_t row_stride;
};

struct GumbelBackwardCudaArgs {
  DType dtype;                // of logits, g_soft, dlogits and soft
  const void* logits;         // [N, K]
  const int64_t* seeds;       // [N]
  const int64_t* codes;       // [N]
  const void* g_soft;         // [N, K]: gradient of the relaxed one-hot, g_vectors codebook^T
  const float* g_entropy;     // [N]
  const float* g_mean_probs;  // [K]
  const int64_t* valid_rows;  // [1], on the device
  float tau;
  void* dlogits;  // [N, K] out
  void* soft;     // [N, K] out, or null
  int64_t rows, num_codes;
  int64_t row_stride;
};

// Warps or blocks that share out the rows on the current device, each with partial sums of its own.
int64_t gumbel_teams(int64_t rows, int64_t num_codes);

// Launch on `stream` (a cudaStream_t) and return at once. Throw std::invalid_argument for a K above
// kMaxGumbelCodes and std::runtime_error when a launch fails.
void gumbel_forward(const GumbelForwardCudaArgs& args, void* stream);
void gumbel_backward(const GumbelBackwardCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
