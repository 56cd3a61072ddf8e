// sample_tokens on a CUDA device.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

// What a stretch of a row leaves: its best choice, and whether it holds NaN or +inf.
struct TokenPart {
  double score;
  int token;
  int illegal;
};

struct SampleTokensArgs {
  DType dtype;
  const void* logits;      // [B, V], rows contiguous
  const int64_t* seeds;    // [B]
  const int64_t* offsets;  // [B]
  int64_t* tokens;         // [B] out
  TokenPart* parts;        // [sample_tokens_workspace(B, V)]
  int64_t rows, num_tokens;
  int64_t row_stride;
};

// Entries of the workspace, so that the caller allocates it.
int64_t sample_tokens_workspace(int64_t rows, int64_t num_tokens);

// Two launches on `stream` (a cudaStream_t); returns at once. Throws std::invalid_argument for
// float64 and std::runtime_error when a launch fails.
void sample_tokens(const SampleTokensArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
