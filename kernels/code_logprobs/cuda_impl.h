// [N, K] rows, each with one code, against the rows of an optional reference.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

struct LogprobsRows {
  DType dtype;
  const void* logits;      // [N, K]
  const void* ref_logits;  // [N, K] or null
  const int64_t* codes;    // [N]
  int64_t rows;
  int64_t num_codes;
  int64_t row_stride;
  int64_t ref_row_stride;
};

struct LogprobsForwardCudaArgs {
  LogprobsRows in;
  float* logprob;  // [N]
  float* entropy;  // [N]
  float* kl;       // [N]
};

struct LogprobsBackwardCudaArgs {
  LogprobsRows in;
  const float* g_logprob;  // [N]
  const float* g_entropy;  // [N]
  const float* g_kl;       // [N]
  void* dlogits;           // [N, K], contiguous
};

void logprobs_forward(const LogprobsForwardCudaArgs& args, void* stream);
void logprobs_backward(const LogprobsBackwardCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
