"""The hot paths: torch ops with a PyTorch reference and C++, CUDA and Triton backends."""

from latent_rl.ops.code_logprobs import CodeLogprobsOutput, code_logprobs
from latent_rl.ops.gated_merge import gated_merge, gated_merge_step, merge_tables
from latent_rl.ops.gumbel_quantize import GumbelQuantizeOutput, gumbel_quantize
from latent_rl.ops.nearest_code import nearest_code
from latent_rl.ops.quantize import QuantizeOutput, quantize
from latent_rl.ops.sample_codes import SampleCodesOutput, sample_codes
from latent_rl.ops.sample_tokens import sample_tokens
from latent_rl.ops.seeds import row_seeds
from latent_rl.ops.slot_attention import slot_attention

__all__ = [
    "CodeLogprobsOutput",
    "GumbelQuantizeOutput",
    "QuantizeOutput",
    "SampleCodesOutput",
    "code_logprobs",
    "gated_merge",
    "gated_merge_step",
    "gumbel_quantize",
    "merge_tables",
    "nearest_code",
    "quantize",
    "row_seeds",
    "sample_codes",
    "sample_tokens",
    "slot_attention",
]
