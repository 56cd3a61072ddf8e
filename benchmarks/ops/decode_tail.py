"""decode_tail: what a decoding step does after the towers, from the policy's features to a token.

Policy head, code, merge blocks, vocabulary head, token: the engine's own ``Step.act``, in a CUDA
graph as the engine runs it, over a model that consists of these parts alone.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from benchmarks.ops.sample_codes import TEMPERATURE, TOP_K, TOP_P
from benchmarks.ops.sample_codes import composed as sampled_codes
from benchmarks.registry import Call, Entry, Goal, Inputs, Pass, Peer, Shape
from benchmarks.timing import captured
from latent_rl.decode.output import Said
from latent_rl.decode.settings import DecodeSettings
from latent_rl.decode.slot_cache import SlotLayout
from latent_rl.decode.step import Rows, Step
from latent_rl.models.backbone import VocabularyHead
from latent_rl.models.latent_action_model import LatentActionModel
from latent_rl.nn.merge import ResidualMerge
from latent_rl.nn.policy import LatentPolicy

FORWARD = Pass.FORWARD
EAGER, COMPILED = "eager", "torch.compile reduce-overhead"


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Weights and states; M merge blocks, and S = 1 where tokens are sampled too."""
    generator = torch.Generator(device).manual_seed(0)
    rows, hidden, inner, size = (shape[s] for s in ("B", "H", "I", "K"))

    def normal(*sizes: int, fan: int = 1) -> Tensor:
        drawn = torch.randn(*sizes, generator=generator, device=device)
        return drawn.mul_(fan**-0.5).to(dtype)

    tensors = {
        "state": normal(rows, hidden),
        "features": normal(rows, hidden),
        "w_policy": normal(size, hidden, fan=hidden),
        "codebook": normal(size, hidden),
        "w_head": normal(shape["V"], hidden, fan=hidden),
        "sampled": torch.tensor(shape["S"]),
    }
    for block in range(shape["M"]):
        tensors[f"w_gate{block}"] = normal(inner, 2 * hidden, fan=2 * hidden)
        tensors[f"w_up{block}"] = normal(inner, 2 * hidden, fan=2 * hidden)
        tensors[f"w_down{block}"] = normal(hidden, inner, fan=inner)
    return tensors


def blocks_of(t: Inputs) -> int:
    return sum(name.startswith("w_gate") for name in t)


class _Backbone(nn.Module):
    """What the vocabulary head and a step ask of a backbone."""

    def __init__(self, w_head: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        self.head.weight = nn.Parameter(w_head, requires_grad=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.head


class TailModel:
    """The part of a :class:`LatentActionModel` behind its towers, by that class's own methods."""

    def __init__(self, t: Inputs) -> None:
        hidden, size = t["state"].shape[1], len(t["codebook"])
        inner, device = t["w_gate0"].shape[0], torch.device("meta")
        with device:
            merge = ResidualMerge(hidden, hidden, inner, blocks_of(t))
            policy = LatentPolicy(nn.Identity(), hidden, size)
        for index, block in enumerate(cast(Any, merge.blocks)):
            for name in ("w_gate", "w_up", "w_down"):
                setattr(block, name, nn.Parameter(t[f"{name}{index}"], requires_grad=False))
        policy.head.weight = nn.Parameter(t["w_policy"], requires_grad=False)
        codebook = SimpleNamespace(weight=t["codebook"])
        self.latent = SimpleNamespace(
            merge=merge, policy=policy, quantizer=SimpleNamespace(codebook=codebook)
        )
        self.backbone = _Backbone(t["w_head"])
        self._head = VocabularyHead(self.backbone)

    merge = LatentActionModel.merge
    merge_tables = LatentActionModel.merge_tables
    lm_scores = LatentActionModel.lm_scores


class Tail:
    """A step's action over B slots that never end."""

    def __init__(self, t: Inputs) -> None:
        rows, device = len(t["state"]), t["state"].device
        self.t, self.model = t, TailModel(t)
        self.rows = Rows.empty(rows, 1, len(t["codebook"]), device)
        self.rows.limits.fill_(1 << 40)
        self.rows.active.fill_(True)
        self.said = Said.empty(rows, t["state"].shape[1], t["state"].dtype, device)
        settings = DecodeSettings(
            temperature=TEMPERATURE,
            top_k=TOP_K,
            top_p=TOP_P,
            do_sample_tokens=bool(t["sampled"]),
        )
        store = SimpleNamespace(layout=SlotLayout(0, 0, rows, 1))
        self.step = Step(
            cast(Any, self.model),
            self.rows,
            self.said,
            cast(Any, (store, store)),
            cast(Any, None),
            self.model.merge_tables(),
            settings,
            forced=False,
            allowed=False,
        )

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Ids int64 [B, 2] of tokens and codes, in the same storage at every call."""
        state = self.t["state"]
        logits = self.model.latent.policy.logits(self.t["features"])
        self.step.act(slice(0, len(state)), state, logits, state.dtype)
        return self.said.ids


def engine(t: Inputs, which: Pass) -> Call:
    """As the engine launches it: a CUDA graph on a device."""
    tail = Tail(t)
    if not t["state"].is_cuda:
        return tail
    call, remark = captured(tail, t["state"].device)
    if remark != "CUDA graph":
        raise RuntimeError(f"decode_tail: the engine's step is {remark}")
    return call


def engine_compiled(t: Inputs, which: Pass) -> Call:
    """As ``Decoder(compiled=True)`` launches it: Inductor's kernels in the engine's graph."""
    tail = Tail(t)
    compiled = torch.compile(tail.__call__)
    if not t["state"].is_cuda:
        return compiled
    call, remark = captured(compiled, t["state"].device)
    if remark != "CUDA graph":
        raise RuntimeError(f"decode_tail: the compiled step is {remark}")
    return call


def linear_of(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Composed(nn.Module):
    """The same as PyTorch has it: topk, softmax, multinomial, joined inputs, linears.

    A module, as a user would write it: a compiler's graph copies inputs, not parameters.
    """

    def __init__(self, t: Inputs) -> None:
        super().__init__()
        self.sampled = bool(t["sampled"])
        self.policy, self.head = linear_of(t["w_policy"]), linear_of(t["w_head"])
        self.codebook = nn.Parameter(t["codebook"], requires_grad=False)
        names = ("w_gate", "w_up", "w_down")
        self.merge = nn.ModuleList(
            nn.ModuleDict({name: linear_of(t[f"{name}{block}"]) for name in names})
            for block in range(blocks_of(t))
        )

    def forward(self, state: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codes, int64 [B] each, from states and features [B, H]."""
        codes = sampled_codes({"logits": self.policy(features)})[0][:, 0]
        return self.spoken(state, codes), codes

    def spoken(self, state: Tensor, codes: Tensor) -> Tensor:
        """Tokens under codes [B]."""
        x, code = state, self.codebook[codes]
        for block in cast("list[Any]", self.merge):
            joined = torch.cat([x, code], -1)
            x = x + block["w_down"](silu(block["w_gate"](joined)) * block["w_up"](joined))
        logits = self.head(x).float()
        if self.sampled:
            return torch.multinomial(logits.softmax(-1), 1)[:, 0]
        return logits.argmax(-1)


def eager(t: Inputs, which: Pass) -> Call:
    module = Composed(t)

    @torch.no_grad()
    def call() -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", module(t["state"], t["features"]))

    return call


def reduce_overhead(t: Inputs, which: Pass) -> Call:
    """Compiled into kernels of its own and a CUDA graph."""
    compiled = torch.compile(Composed(t), mode="reduce-overhead", dynamic=False, fullgraph=True)

    @torch.no_grad()
    def call() -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return cast("tuple[Tensor, Tensor]", compiled(t["state"], t["features"]))

    return call


def weights(shape: Shape) -> int:
    """Numbers of every weight read: of the wide products the half that meets the state."""
    hidden = shape["H"]
    return hidden * (shape["K"] + 3 * shape["M"] * shape["I"] + shape["V"])


def traffic(shape: Shape, dtype: torch.dtype, which: Pass) -> int:
    """Weights, states and, float32, the tables' rows of the codes there can be; tokens come out."""
    states = 2 * shape["B"] * shape["H"] * dtype.itemsize
    tables = 8 * min(shape["B"], shape["K"]) * shape["I"] * shape["M"]
    return weights(shape) * dtype.itemsize + states + tables + 28 * shape["B"]


def on_cuda(rows: int, blocks: int, sampled: int, note: str) -> Shape:
    sizes = {"B": rows, "H": 2048, "I": 11008, "V": 151_936, "K": 128, "M": blocks, "S": sampled}
    goals = (Goal(at_most_floor=1.12 if rows <= 64 else 1.25), Goal(1.3, COMPILED), Goal(3, EAGER))
    return Shape(sizes, note, {"cuda": ("bfloat16",)}, {("cuda", "bfloat16", FORWARD): goals})


ENTRY = Entry(
    op="decode_tail",
    parts=("sample_codes", "gated_merge", "sample_tokens"),
    passes=(FORWARD,),
    shapes=(
        Shape(
            {"B": 64, "H": 128, "I": 256, "V": 512, "K": 64, "M": 2, "S": 0},
            "the demo's model",
            {"cpu": ("float32",)},
        ),
        on_cuda(1, 2, 0, "Qwen2.5-VL-3B, the paper's two merge blocks"),
        on_cuda(64, 2, 0, "Qwen2.5-VL-3B, the paper's two merge blocks"),
        on_cuda(256, 2, 0, "Qwen2.5-VL-3B, the paper's two merge blocks"),
        on_cuda(64, 1, 0, "Qwen2.5-VL-3B, one merge block"),
        on_cuda(64, 2, 1, "Qwen2.5-VL-3B, tokens sampled too"),
    ),
    make_inputs=make_inputs,
    ours=engine,
    own_launch=True,
    peers=(
        Peer(
            "torch.compile of the engine",
            engine_compiled,
            own_launch=True,
            note="ours: Decoder(compiled=True)",
        ),
        Peer(EAGER, eager, own_launch=True, note="launched kernel by kernel, as users do"),
        Peer(COMPILED, reduce_overhead, own_launch=True, note="its own CUDA graph on a GPU"),
    ),
    bytes_moved=traffic,
    flops=lambda s, which: 2 * s["B"] * weights(s),
    tests="tests/decode/test_decoder.py",
)
