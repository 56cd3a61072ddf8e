// What each instruction set's namespace defines.
#pragma once

#include "ops.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

void nearest_code(const NearestArgs& args, int threads);
void quantize_forward(const QuantizeForwardArgs& args, int threads);
void quantize_backward(const QuantizeBackwardArgs& args, int threads);
void segment_sum(const SegmentSumArgs& args, int threads);
void gumbel_forward(const GumbelForwardArgs& args, int threads);
void gumbel_backward(const GumbelBackwardArgs& args, int threads);
void merge_forward(const MergeForwardArgs& args, int threads);
void merge_backward(const MergeBackwardArgs& args, int threads);
void sample_codes(const SampleArgs& args, int threads);
void logprobs_forward(const LogprobsForwardArgs& args, int threads);
void logprobs_backward(const LogprobsBackwardArgs& args, int threads);
void slot_attention(const SlotAttentionArgs& args, int threads);
void philox_words(int64_t seed, int64_t offset, int64_t count, uint32_t* words);

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
