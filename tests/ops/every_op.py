"""Every op as a value: inputs for any number of rows, the call, and what of it belongs to rows.

What every op promises is checked on these by ``every_op_checks``: on a CPU, on the emulator, in
Triton's interpreter and on a CUDA device, by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latent_rl import ops

Inputs = dict[str, Tensor]
RawCalls = Callable[[Mapping[str, Tensor]], list[tuple[Any, tuple[Any, ...]]]]
_RAW = torch.ops.latent_rl
# Neither divides a vector's width, a warp or a tile; the even ones take the wide loads.
ODD, EVEN = {"K": 131, "D": 37, "I": 75}, {"K": 128, "D": 64, "I": 96}


@dataclass(frozen=True)
class OpCase:
    """One way to call one op.

    Attributes:
        op: its name in the dispatch table.
        make: (rows, sizes, generator) -> float32 and int64 inputs on the CPU.
        call: the public function; its results, one after another.
        raw: the torch ops underneath with arguments, for ``torch.library.opcheck``.
        rows: inputs with one row per row; the first of them decides what a poisoned row gives.
        row_outputs: positions of the results with one row per row.
        leaves: inputs with a gradient.
        wide: inputs that stay float32.
        exact: results are the same bits in any batch, layout and capture. Not where a library
            chooses how to multiply; ``exact_gradients`` likewise.
        cuda_rows: rows of the dispatch table that serve it on a CUDA device.
    """

    name: str
    op: str
    make: Callable[[int, Mapping[str, int], torch.Generator], Inputs]
    call: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]
    raw: RawCalls
    rows: tuple[str, ...]
    row_outputs: tuple[int, ...]
    leaves: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    exact: bool = True
    exact_gradients: bool = True
    cuda_rows: tuple[str, ...] = ("cuda",)

    def inputs(
        self,
        rows: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        sizes: Mapping[str, int] = ODD,
        seed: int = 0,
    ) -> Inputs:
        """The same inputs on every device; floats in ``dtype``."""
        made = self.make(rows, sizes, torch.Generator().manual_seed(seed))
        return {
            name: t.to(device, dtype)
            if t.is_floating_point() and name not in self.wide
            else t.to(device)
            for name, t in made.items()
        }


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator)


def _search(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    width = sizes["D"]
    return {
        "x": _normal(generator, rows, width),
        "codebook": _normal(generator, sizes["K"], width),
    }


def _nearest(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.nearest_code(t["x"], t["codebook"], return_distance=True))


def _nearest_grouped(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Two codebooks at once; rows first in the results."""
    x = torch.stack([t["x"], -t["x"]])
    books = torch.stack([t["codebook"], t["codebook"].flip(0)])
    codes, distance = ops.nearest_code(x, books, "cosine", return_distance=True)
    return codes.T, distance.T


def _nearest_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    args = t["x"][None], t["codebook"][None], "l2"
    return [(_RAW.nearest_code.default, args), (_RAW.nearest_codes.default, args)]


def _quantize(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.quantize(t["x"], t["codebook"]))


def _quantize_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    x, codebook = t["x"].detach(), t["codebook"].detach()
    out = ops.quantize(x, codebook)
    grads = torch.ones_like(x), out.commitment_loss * 2, out.codebook_loss * 3
    saved = x, codebook, out.codes, out.counts, out.sums
    return [
        (_RAW.quantize_forward.default, (t["x"], t["codebook"], "l2")),
        (_RAW.quantize_backward.default, (*grads, *saved)),
    ]


def _gumbel_inputs(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    return {
        "logits": _normal(generator, rows, sizes["K"], scale=2.0),
        "codebook": _normal(generator, sizes["K"], sizes["D"]),
        "seeds": torch.randint(2**62, (rows,), generator=generator),
    }


def _gumbel(hard: bool) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]:
    def call(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            ops.gumbel_quantize(t["logits"], t["codebook"], tau=0.7, seed=t["seeds"], hard=hard)
        )

    return call


def _gumbel_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    given = t["logits"].detach(), t["codebook"].detach(), 0.7, t["seeds"], True
    out = ops.gumbel_quantize(given[0], given[1], tau=0.7, seed=t["seeds"])
    grads = [torch.ones_like(g) for g in (out.vectors, out.entropy, out.mean_probs)]
    return [
        (_RAW.gumbel_quantize_forward.default, (t["logits"], t["codebook"], *given[2:])),
        (_RAW.gumbel_quantize_backward.default, (*grads, *given, out.codes)),
    ]


def _merge_inputs(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    hidden, inner, width = 48, sizes["I"], sizes["D"]
    scale = (hidden + width) ** -0.5
    return {
        "e": _normal(generator, rows, hidden),
        "codes": torch.randint(sizes["K"], (rows,), generator=generator),
        "codebook": _normal(generator, sizes["K"], width),
        "w_gate": _normal(generator, inner, hidden + width, scale=scale),
        "w_up": _normal(generator, inner, hidden + width, scale=scale),
        "w_down": _normal(generator, hidden, inner, scale=inner**-0.5),
    }


_WEIGHTS = ("w_gate", "w_up", "w_down")


def _merge(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    weights = [t[name] for name in _WEIGHTS]
    return (ops.gated_merge(t["e"], t["codes"], t["codebook"], *weights),)


def _merge_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    given = tuple(t[name].detach() for name in ("e", "codes", "codebook", *_WEIGHTS))
    out, *saved = _RAW.gated_merge_forward(*given)
    backward = (torch.ones_like(out), *given, *saved, True, True)
    return [
        (_RAW.gated_merge_forward.default, given),
        (_RAW.gated_merge_backward.default, backward),
    ]


def _step_inputs(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    made = _merge_inputs(rows, sizes, generator)
    tables = ops.merge_tables(made["codebook"], made["w_gate"], made["w_up"])
    return {**{k: v for k, v in made.items() if k != "codebook"}, "tables": tables}


def _step(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    weights = [t[name] for name in _WEIGHTS]
    return (ops.gated_merge_step(t["e"], t["codes"], t["tables"], *weights),)


def _step_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    given = tuple(t[name] for name in ("e", "codes", "tables", *_WEIGHTS))
    return [(_RAW.gated_merge_step.default, given)]


def _policy(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    return {
        "logits": _normal(generator, rows, sizes["K"], scale=2.0),
        "seeds": torch.randint(2**62, (rows,), generator=generator),
        "offsets": torch.randint(1000, (rows,), generator=generator),
    }


_TRUNCATION = {"temperature": 0.8, "top_k": 32, "top_p": 0.95, "min_p": 0.001}


def _sample(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.sample_codes(t["logits"], seed=t["seeds"], offset=t["offsets"], **_TRUNCATION))


def _sample_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    options = tuple(_TRUNCATION.values())
    return [(_RAW.sample_codes.default, (t["logits"], *options, t["seeds"], t["offsets"]))]


def _sample_token(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return (ops.sample_tokens(t["logits"], seed=t["seeds"], offset=t["offsets"]),)


def _sample_token_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    return [(_RAW.sample_tokens.default, (t["logits"], t["seeds"], t["offsets"]))]


def _scored(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    return {
        "logits": _normal(generator, rows, sizes["K"], scale=2.0),
        "codes": torch.randint(sizes["K"], (rows,), generator=generator),
        "ref": _normal(generator, rows, sizes["K"]),
    }


def _logprobs(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(ops.code_logprobs(t["logits"], t["codes"], t.get("ref")))


def _logprobs_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    wide = torch.float64 if t["logits"].dtype == torch.float64 else torch.float32
    grads = [torch.ones(len(t["codes"]), dtype=wide, device=t["codes"].device)] * 3
    given = t["codes"], t.get("ref")
    return [
        (_RAW.code_logprobs_forward.default, (t["logits"], *given)),
        (_RAW.code_logprobs_backward.default, (*grads, t["logits"].detach(), *given)),
    ]


# Two rows share each prompt of PROMPT positions; every row has a slot of OWN positions.
PROMPT, OWN = 50, 40


def _slots(rows: int, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    heads, key_heads, dim = 6, 2, sizes["D"]
    prompts = (rows + 1) // 2
    storage = max(1, prompts * PROMPT + rows * OWN)
    row = torch.arange(rows)
    shared = torch.randint(1, PROMPT + 1, (prompts,), generator=generator)[row // 2]
    own = torch.randint(1, OWN + 1, (rows,), generator=generator)
    begins = (torch.rand(rows, generator=generator) * (shared + own)).long()
    own_at = prompts * PROMPT + row * OWN
    return {
        "query": _normal(generator, rows, heads, dim),
        "keys": _normal(generator, storage, key_heads, dim),
        "values": _normal(generator, storage, key_heads, dim),
        "runs": torch.stack([begins, shared + own, row // 2 * PROMPT, shared, own_at], 1),
    }


def _attend(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    given = (t[name] for name in ("query", "keys", "values", "runs"))
    return (ops.slot_attention(*given, longest=PROMPT + OWN),)


def _attend_raw(t: Mapping[str, Tensor]) -> list[tuple[Any, tuple[Any, ...]]]:
    given = tuple(t[name] for name in ("query", "keys", "values", "runs"))
    return [(_RAW.slot_attention.default, (*given, PROMPT + OWN, 0.3))]


# (op, row) of the dispatch table without float32: what they multiply with has none.
NO_FLOAT32 = {("gated_merge", "triton"), ("nearest_code", "hopper")}
_BOTH = ("logits", "codebook")
EVERY_OP = (
    OpCase("nearest_code", "nearest_code", _search, _nearest, _nearest_raw,
           rows=("x",), row_outputs=(0, 1), cuda_rows=("triton", "hopper")),
    OpCase("nearest_code, grouped", "nearest_code", _search, _nearest_grouped, _nearest_raw,
           rows=("x",), row_outputs=(0, 1), cuda_rows=("triton", "hopper")),
    OpCase("quantize", "quantize", _search, _quantize, _quantize_raw,
           rows=("x",), row_outputs=(0, 1), leaves=("x", "codebook")),
    OpCase("gumbel_quantize", "gumbel_quantize", _gumbel_inputs, _gumbel(True), _gumbel_raw,
           rows=("logits", "seeds"), row_outputs=(0, 1, 2), leaves=_BOTH, exact_gradients=False),
    OpCase("gumbel_quantize, soft", "gumbel_quantize", _gumbel_inputs, _gumbel(False), _gumbel_raw,
           rows=("logits", "seeds"), row_outputs=(0, 1, 2), leaves=_BOTH,
           exact=False, exact_gradients=False),
    OpCase("gated_merge", "gated_merge", _merge_inputs, _merge, _merge_raw,
           rows=("e", "codes"), row_outputs=(0,), leaves=("e", "codebook", *_WEIGHTS),
           exact=False, exact_gradients=False, cuda_rows=("cuda", "triton")),
    OpCase("gated_merge_step", "gated_merge", _step_inputs, _step, _step_raw,
           rows=("e", "codes"), row_outputs=(0,), wide=("tables",),
           exact=False, cuda_rows=("cuda", "triton")),
    OpCase("sample_codes", "sample_codes", _policy, _sample, _sample_raw,
           rows=("logits", "seeds", "offsets"), row_outputs=(0, 1, 2, 3)),
    OpCase("sample_tokens", "sample_tokens", _policy, _sample_token, _sample_token_raw,
           rows=("logits", "seeds", "offsets"), row_outputs=(0,)),
    OpCase("code_logprobs", "code_logprobs", _scored, _logprobs, _logprobs_raw,
           rows=("logits", "codes", "ref"), row_outputs=(0, 1, 2), leaves=("logits",)),
    OpCase("slot_attention", "slot_attention", _slots, _attend, _attend_raw,
           rows=("query", "runs"), row_outputs=(0,), cuda_rows=("triton",)),
)  # fmt: skip
