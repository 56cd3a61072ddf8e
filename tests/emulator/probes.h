// Launches of probes.cu by name.
#pragma once

#include <string>

namespace latent_rl {
namespace cuda {

void probe(const std::string& name, float* out);  // [64]

}  // namespace cuda
}  // namespace latent_rl
