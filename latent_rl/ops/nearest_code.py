"""nearest_code: the closest code of a codebook to each row."""

from __future__ import annotations

import torch
from torch import Tensor

from latent_rl.ops import _checks
from latent_rl.ops._library import accumulator, define

__all__ = ["nearest_code"]

OP = "nearest_code"


def _fake(x: Tensor, codebook: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape[:2], dtype=torch.int64),
        x.new_empty(x.shape[:2], dtype=accumulator(x)),
    )


def _only_fake(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


_ARGUMENTS = "(Tensor x, Tensor codebook, str metric)"
define(OP, OP, f"{_ARGUMENTS} -> (Tensor, Tensor)", _fake, by_width=True)
# Distances take a pass over the rows of their own on a GPU.
define(OP, "nearest_codes", f"{_ARGUMENTS} -> Tensor", _only_fake, by_width=True)


def nearest_code(
    x: Tensor, codebook: Tensor, metric: str = "l2", return_distance: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Find the nearest code of every row: ``argmin_k d(x_n, c_k)``; the lowest id wins a tie.

    Never holds an N x K matrix. float32 input gets the choice that float64 arithmetic makes, up
    to ties at float32 resolution; float16 and bfloat16 input is exact for its rounded values.
    Deterministic; a row's result does not depend on the rows around it. Not differentiable.

    Args:
        x: [N, D] or grouped [G, N, D]; float32, bfloat16, float16 or float64; any strides.
        codebook: [K, D] or [G, K, D], same dtype and device.
        metric: "l2" (squared Euclidean), "cosine" (1 - cosine) or "dot" (negated product).
        return_distance: also return the distance of the code chosen.

    Returns:
        codes int64 [N] or [G, N]: -1 for rows that are not finite; codes that are not finite are
        never chosen. With ``return_distance`` also the distances, float32 (float64 for float64
        input), NaN where the code is -1.

    Raises:
        TypeError: for dtypes. ValueError: for shapes, devices, K = 0 or an unknown metric.
    """
    _checks.check_float(OP, "x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"{OP}: x must have shape [N, D] or [G, N, D], got {list(x.shape)}")
    layout = "[K, D]" if x.ndim == 2 else "[G, K, D]"
    _checks.check_float(OP, "codebook", codebook)
    _checks.check_ndim(OP, "codebook", codebook, x.ndim, layout)
    _checks.check_codebook(OP, codebook)
    _checks.check_like(OP, "codebook", codebook, "x", x)
    _checks.check_metric(OP, metric)
    if codebook.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{OP}: codebook.shape[-1] must equal x.shape[-1] ({x.shape[-1]}), "
            f"got {codebook.shape[-1]}"
        )
    if x.ndim == 3 and codebook.shape[0] != x.shape[0]:
        raise ValueError(
            f"{OP}: codebook.shape[0] must equal x.shape[0] ({x.shape[0]}), got {codebook.shape[0]}"
        )
    grouped = x.ndim == 3
    groups = (x, codebook) if grouped else (x[None], codebook[None])
    rows, table = groups[0].detach(), groups[1].detach()
    if not return_distance:
        codes: Tensor = torch.ops.latent_rl.nearest_codes(rows, table, metric)
        return codes if grouped else codes[0]
    codes, distance = torch.ops.latent_rl.nearest_code(rows, table, metric)
    return (codes, distance) if grouped else (codes[0], distance[0])
