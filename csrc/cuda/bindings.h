// The Python face of each op's CUDA kernels; addresses are device pointers.
#pragma once

#include <pybind11/pybind11.h>

namespace latent_rl {

void bind_sample_codes_cuda(pybind11::module_& m);
void bind_sample_tokens_cuda(pybind11::module_& m);
void bind_segments_cuda(pybind11::module_& m);
void bind_quantize_cuda(pybind11::module_& m);
void bind_gumbel_quantize_cuda(pybind11::module_& m);
void bind_code_logprobs_cuda(pybind11::module_& m);
void bind_gated_merge_cuda(pybind11::module_& m);
void bind_nearest_code_cuda(pybind11::module_& m);

}  // namespace latent_rl
