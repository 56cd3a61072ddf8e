"""Attention over packed rows: completions see their prompt and themselves, nothing else."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latent_rl.nn.precision import autocast_dtype
from latent_rl.train.replay.blocks import FULL, SLIDING, Packing
from latent_rl.train.replay.kernels import choose_kernel

__all__ = ["NAME", "packed_attention", "prepare_tower", "why_not"]

NAME = "latent_rl_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Exact attention within each sequence, under the signature of transformers' functions.

    Args:
        module: the attention layer (unused).
        query: [1, heads, N, D].
        key, value: [1, key heads, N, D].
        attention_mask: ignored; `packing` says who sees whom.
        dropout: of the weights.
        scaling: of the products.
        sliding_window: keys a query sees, itself included.
        packing: of the N positions.

    Returns:
        [1, N, heads, D] and None.

    Raises:
        ValueError: for variants of attention this is not: soft-capped scores, sinks.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f'replay: packed attention with {name} is not supported; set replay_layout="padded"'
            )
    if packing is None:
        raise ValueError("replay: packed attention was called without a packing")
    # [N, heads, D]: rows are gathered whole. Autocast would cast what was gathered, and a float32
    # tower's rotary positions make float32 of what its products made.
    dtype = autocast_dtype(query.device) or query.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    kernel = choose_kernel(query, packing)
    found = kernel.attend(
        query, key, value, packing, scaling=scaling, window=sliding_window, dropout=dropout
    )
    if packing.begin:
        found = pad(found, (0, 0, 0, 0, packing.begin, 0))
    return found[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


class _PackedLayer:
    """Hooks of one layer that act when its attention is called with a packing.

    They run inside activation checkpointing as well, so a recomputed layer does the same again.
    Of the last layer only the actions' outputs are read: it makes keys and values of every
    position, and everything behind them of those positions alone.
    """

    def __init__(self, config: Any, last: bool) -> None:
        self.config, self.last = config, last
        self.previous: list[Any] = []
        self.begin = 0

    def install(self, layer: Any) -> None:
        attention = layer.self_attn
        attention.register_forward_pre_hook(self.before, with_kwargs=True)
        attention.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        if self.last:
            for module in (getattr(attention, "o_proj", None), getattr(layer, "mlp", None)):
                if module is not None:
                    module.register_forward_pre_hook(self.cut)
                    module.register_forward_hook(self.widen)

    def before(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self.previous.append(self.config._attn_implementation)
        packing: Packing | None = kwargs.get("packing")
        self.begin = 0
        if packing is not None:
            self.config._attn_implementation = NAME
            if self.last and packing.final is not None:
                packing = packing.final
                self.begin = packing.begin
            kwargs = {**kwargs, "packing": packing}
        return args, kwargs

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.config._attn_implementation = self.previous.pop()

    def cut(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, self.begin :], *args[1:]) if self.begin else args

    def widen(self, module: nn.Module, args: Any, output: Any) -> Any:
        return pad(output, (0, 0, self.begin, 0)) if self.begin else output


def prepare_tower(tower: nn.Module) -> None:
    """Let a tower's layers understand `packing`; without one they do what they always did.

    Raises:
        ValueError: for towers that cannot, with the reason.
    """
    if getattr(tower, "_latent_rl_packs", False):
        return
    reason = why_not(tower)
    if reason is not None:
        raise ValueError(
            f"replay: cannot pack rows for {type(tower).__name__}: {reason}; "
            'set replay_layout="padded"'
        )
    layers, config = list(cast(Any, tower).layers), cast(Any, tower).config
    for layer in layers:
        _PackedLayer(config, layer is layers[-1]).install(layer)
    cast(Any, tower)._latent_rl_packs = True


def why_not(tower: nn.Module) -> str | None:
    """Why a tower cannot read packed rows, or None when it can."""
    layers, config = getattr(tower, "layers", None), cast(Any, tower).config
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        return "it has no layers with self_attn"
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        return f"its layers are of kinds {sorted(kinds)}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps attention scores"
    return None
