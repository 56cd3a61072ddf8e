"""One break per line of defence of every kernel; each must turn one of its tests red."""

from tests.mutation.runner import Mutation

_OPS, _NATIVE, _EMULATED = "tests/ops/test_", "tests/native/test_", "tests/emulator/test_"
# Kernels on the CPU are built again for each of these; the interpreter and the emulator need none.
_FAST = ("-mnot slow",)

MUTATIONS = (
    Mutation(
        "philox: nine rounds instead of ten",
        "kernels/common/philox.h",
        "kRounds = 10",
        "kRounds = 9",
        (f"{_NATIVE}philox.py",),
    ),
    Mutation(
        "nearest_code native: a quarter of the error bound",
        "csrc/isa/nearest_code.cpp",
        "return 2.0 * (bound + book.exact_gamma() * scale);",
        "return 0.5 * (bound + book.exact_gamma() * scale);",
        (f"{_NATIVE}nearest_code_bounds.py", f"{_NATIVE}nearest_code_native.py"),
    ),
    Mutation(
        "quantize native: the commitment pushes away",
        "csrc/isa/quantize.cpp",
        "load_some(g + d, left, 0.0) + args.scale * diff",
        "load_some(g + d, left, 0.0) - args.scale * diff",
        (f"{_OPS}quantize.py", *_FAST),
    ),
    Mutation(
        "gumbel_quantize native: the softmax forgets the temperature",
        "csrc/isa/gumbel_quantize.cpp",
        "(load8(logits + k) + load8(noisy + k)) / tau;",
        "(load8(logits + k) + load8(noisy + k));",
        (f"{_OPS}gumbel_quantize.py", *_FAST),
    ),
    Mutation(
        "gated_merge native: the slope of silu",
        "csrc/isa/gated_merge.cpp",
        "(1.0f - s))",
        "(1.0f + s))",
        (f"{_OPS}gated_merge.py", *_FAST),
    ),
    Mutation(
        "sample_codes native: top-p takes its mass before temperature",
        "csrc/isa/sample_codes.cpp",
        "const double target = top_p * mass > 0.0 ? top_p * mass : 1.0;",
        "const double target = top_p * mass > 0.0 ? 0.9 * top_p * mass : 1.0;",
        (f"{_OPS}sample_codes.py", *_FAST),
    ),
    Mutation(
        "code_logprobs native: the KL's gradient loses its mean",
        "csrc/isa/code_logprobs.cpp",
        "load16(row.q.logits.at + k)) - gap) - kl);",
        "load16(row.q.logits.at + k)) - gap));",
        (f"{_OPS}code_logprobs.py", *_FAST),
    ),
    Mutation(
        "slot_attention native: the first visible position is skipped",
        "csrc/ops.h",
        "const int64_t begin = run[0] > 0 ? run[0] : 0;",
        "const int64_t begin = run[0] > 0 ? run[0] + 1 : 0;",
        (f"{_OPS}slot_attention.py",),
    ),
    Mutation(
        "slot_attention triton: stretches are joined without rescaling",
        "kernels/slot_attention/triton_impl.py",
        "total += part * weight",
        "total += part",
        (f"{_OPS}triton_slot_attention.py::test_in_the_interpreter",),
    ),
    Mutation(
        "sample_codes cuda: one tie too many stays",
        "kernels/sample_codes/cuda_impl.cu",
        "before >= keep",
        "before > keep",
        (f"{_EMULATED}sample_codes_emulated.py",),
    ),
    Mutation(
        "sample_codes cuda: of equal codes the highest ids come first",
        "kernels/sample_codes/cuda_impl.cu",
        "(key == mine[i] && other < k)",
        "(key == mine[i] && other > k)",
        (f"{_EMULATED}sample_codes_emulated.py",),
    ),
    Mutation(
        "nearest_code triton: parts of the codebook are merged without their codes",
        "kernels/nearest_code/rerank.py",
        "code = tl.where(nearer, found, code)",
        "code = tl.where(nearer, code, found)",
        (f"{_OPS}nearest_code.py::test_triton_in_the_interpreter",),
    ),
    Mutation(
        "sample_tokens cuda: float32 decides what float64 should",
        "kernels/sample_tokens/cuda_impl.cu",
        "top - 2.0f * slack_of(top)",
        "top",
        (f"{_EMULATED}sample_tokens_emulated.py",),
    ),
    Mutation(
        "segments cuda: rows without a code count for code 0",
        "kernels/segments/cuda_impl.cu",
        "code < sort.num_codes ? code : sort.num_codes);",
        "code < sort.num_codes ? code : 0);",
        (f"{_EMULATED}segments_emulated.py",),
    ),
    Mutation(
        "quantize cuda: half the commitment's gradient",
        "kernels/quantize/cuda_impl.cu",
        "static_cast<double>(*args.grad_commitment) * 2.0",
        "static_cast<double>(*args.grad_commitment) * 1.0",
        (f"{_EMULATED}quantize_emulated.py",),
    ),
    Mutation(
        "gumbel_quantize cuda: the gradient forgets the temperature",
        "kernels/gumbel_quantize/cuda_impl.cu",
        "g[j] = soft[j] * (g[j] - soft_mean) * inverse_tau +",
        "g[j] = soft[j] * (g[j] - soft_mean) +",
        (f"{_EMULATED}gumbel_quantize_emulated.py",),
    ),
    Mutation(
        "nearest_code triton: candidates are those of the best score alone",
        "kernels/nearest_code/screen.py",
        "threshold = best - 2.0 * error",
        "threshold = best + 0.0 * error",
        (f"{_OPS}nearest_code.py::test_triton_in_the_interpreter",),
    ),
    Mutation(
        "nearest_code triton: every row counts as decided",
        "kernels/nearest_code/screen.py",
        "(best - second > 2.0 * error)",
        "(best - second > -1.0)",
        (f"{_OPS}nearest_code.py::test_triton_in_the_interpreter",),
    ),
    Mutation(
        "gated_merge cuda: the slope of silu",
        "kernels/gated_merge/cuda_impl.cu",
        "s * (1.0f + gate[w] * (1.0f - s));",
        "s * (1.0f + gate[w] * (1.0f + s));",
        (f"{_EMULATED}gated_merge_emulated.py",),
    ),
    Mutation(
        "code_logprobs cuda: the KL's gradient loses its mean",
        "kernels/code_logprobs/cuda_impl.cu",
        "to_float(refs.at.at[w])) - row.kl);",
        "to_float(refs.at.at[w])));",
        (f"{_EMULATED}code_logprobs_emulated.py",),
    ),
    Mutation(
        "gated_merge triton: both products take the gate's weights",
        "kernels/gated_merge/triton_impl.py",
        "up = tl.dot(e, w_up, up,",
        "up = tl.dot(e, w_gate, up,",
        (f"{_OPS}gated_merge_triton.py::test_in_the_interpreter",),
    ),
)
