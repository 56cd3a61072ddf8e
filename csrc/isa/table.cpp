// Compiled once per instruction set; gathers the functions of its own namespace.
#include "isa/table.h"

#include "isa/functions.h"

namespace latent_rl {
namespace LATENT_RL_ISA_NAME {

const OpTable& table() {
  static const OpTable kTable = {
      LATENT_RL_ISA_STRING, nearest_code,      quantize_forward, quantize_backward, segment_sum,
      gumbel_forward,       gumbel_backward,   merge_forward,    merge_backward,    sample_codes,
      logprobs_forward,     logprobs_backward, slot_attention,   philox_words,
  };
  return kTable;
}

}  // namespace LATENT_RL_ISA_NAME
}  // namespace latent_rl
