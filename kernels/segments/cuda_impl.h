// Rows grouped by code on a CUDA device, and sums of the rows of each code: bitwise repeatable.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

// A row and the code it goes to; rows without a valid code go to code K.
struct Placed {
  int row;
  int code;
};

struct GroupRowsArgs {
  const int64_t* codes;  // [N]
  Placed* placed;        // [N] out: ascending by code, then by row
  int* first;            // [K + 1] out: where each code begins in `placed`; first[K] rows are valid
  int64_t* counts;       // [K] out
  int* workspace;        // [group_rows_workspace(N, K)]
  int64_t rows, num_codes;
};

struct SegmentSumCudaArgs {
  DType dtype;
  const void* values;    // [N, D], rows contiguous
  const Placed* placed;  // of group_rows
  const int* first;
  float* sums;      // [K, D] out
  float* partials;  // [segment_sum_workspace(N, D)]
  int64_t rows, num_codes, dim;
  int64_t row_stride;
};

// Entries of the workspaces, so that the caller allocates them.
int64_t group_rows_workspace(int64_t rows, int64_t num_codes);
int64_t segment_sum_workspace(int64_t rows, int64_t dim);

// Launch on `stream` (a cudaStream_t) and return at once. Throw std::invalid_argument for 2^31 rows
// or more and std::runtime_error when a launch fails.
void group_rows(const GroupRowsArgs& args, void* stream);
void segment_sum(const SegmentSumCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
