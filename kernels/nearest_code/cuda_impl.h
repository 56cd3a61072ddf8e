// The screen of nearest_code for Hopper: what screen.py launches, by TMA and wgmma. README.md has
// the bound, the design and what is predicted of it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace latent_rl {
namespace cuda {

// Widest rows the screen takes: they stay in shared memory while all codes pass by.
constexpr int64_t kScreenWidest = 256;

struct NearestScreenCudaArgs {
  DType dtype;          // bfloat16 or float16
  const void* x;        // [G, N, D]; address and strides are multiples of 16 bytes
  const void* table;    // [G, K, D], contiguous; address and rows are multiples of 16 bytes
  const float* bias;    // [G, K]
  const float* scale;   // [G, K], or null where every scale is 1
  const float* limits;  // [G, 8], as prepare.py left them
  int64_t* codes;       // [G, N] out, of decided rows
  int64_t* listed;      // [G, N] out: undecided rows
  float* threshold;     // [G, N] out: what their candidates must score
  int* count;           // [G], zero before: how many are listed
  int64_t groups;
  int64_t rows;
  int64_t num_codes;
  int64_t dim;
  int64_t x_group_stride;  // elements
  int64_t x_row_stride;
  float accumulation, underflow, slack;  // screen_bounds of triton_impl.py
};

// Queues the screen on `stream`. Throws std::runtime_error when the launch fails.
void nearest_screen(const NearestScreenCudaArgs& args, void* stream);

}  // namespace cuda
}  // namespace latent_rl
