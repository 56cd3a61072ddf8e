// sample_codes on a CUDA device.
#pragma once

#include "ops.h"

namespace latent_rl {
namespace cuda {

constexpr int64_t kMaxSampleCodes = 8192;

// Launches one kernel for the whole batch on `stream` (a cudaStream_t) and returns at once. The
// pointers of `args` are device pointers; K is at most kMaxSampleCodes. Throws
// std::invalid_argument for a K too large and std::runtime_error when the launch fails.
void sample_codes(const SampleArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
