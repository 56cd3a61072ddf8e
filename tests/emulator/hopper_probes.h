// Launches of hopper_probes.cu.
#pragma once

#include <cstdint>
#include <string>

namespace latent_rl {
namespace cuda {

// out [64, 128] float32 = left [rows, width] right [128, width]^T, both bfloat16, width up to 64,
// with one fault; what lies outside counts as zero.
void hopper_probe(const std::string& fault, const void* left, const void* right, float* out,
                  int64_t rows, int64_t width);

}  // namespace cuda
}  // namespace latent_rl
