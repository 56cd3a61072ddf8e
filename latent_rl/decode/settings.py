"""How a call decodes: everything that is the same for all of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latent_rl import ops

__all__ = ["DecodeSettings", "Steering", "seeds_of"]


@dataclass(frozen=True)
class DecodeSettings:
    """Sampling and stopping.

    Attributes:
        temperature, top_k, top_p, min_p: of the codes, as in ``ops.sample_codes``.
        do_sample_tokens: sample tokens at temperature 1 from the same seeds; else the most likely.
        min_new_tokens: an end-of-sequence token is not taken earlier.
        eos_token_ids: tokens that end a request.
        stop_strings: texts that end a request; their last token is its last.
        suppress_tokens: tokens that are never taken.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    do_sample_tokens: bool = False
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    suppress_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Steering:
    """Forced and allowed codes by request, on the device; None where there are none.

    Attributes:
        forced: int64 [R + 1, T], -1 where the policy chooses.
        allowed: bool [R + 1, K].
    """

    forced: Tensor | None = None
    allowed: Tensor | None = None

    @classmethod
    def of(
        cls,
        forced: int | Tensor | None,
        allowed: Sequence[int] | Tensor | None,
        *,
        requests: int,
        steps: int,
        num_codes: int,
        device: torch.device,
    ) -> Steering:
        """Check and place.

        Args:
            forced: one code for all, or int64 [R, >= T] with -1 for the policy's choice.
            allowed: ids of the codes to choose from, or bool [K] or [R, K].
            requests: R.
            steps: T.
            num_codes: K.
            device: where the engine runs.

        Raises:
            TypeError: for codes that are no integers or a mask that is no bool.
            ValueError: for shapes, codes outside [-1, K) and rows without an allowed code.
        """
        return cls(
            None if forced is None else _forced(forced, requests, steps, num_codes, device),
            None if allowed is None else _allowed(allowed, requests, num_codes, device),
        )


def seeds_of(seed: int | Tensor, requests: int, device: torch.device) -> Tensor:
    """int64 [R]: a tensor [R] as it is, one number as ``ops.row_seeds``.

    Raises:
        ValueError: for a tensor of another shape.
    """
    if not isinstance(seed, Tensor) or seed.ndim == 0:
        return ops.row_seeds(int(seed), requests, device)
    if seed.shape != (requests,):
        raise ValueError(f"Decoder: seed must be an int or [{requests}], got {list(seed.shape)}")
    return seed.to(device=device, dtype=torch.int64)


def _forced(
    forced: int | Tensor, requests: int, steps: int, num_codes: int, device: torch.device
) -> Tensor:
    codes = torch.as_tensor(forced)
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise TypeError(f"Decoder: forced_codes must be integers, got {codes.dtype}")
    if codes.ndim == 0:
        codes = codes.expand(requests, steps)
    if codes.ndim != 2 or codes.shape[0] != requests or codes.shape[1] < steps:
        raise ValueError(
            f"Decoder: forced_codes must be [{requests}, >= {steps}], got {list(codes.shape)}"
        )
    codes = codes[:, :steps].to(device=device, dtype=torch.int64)
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) >= num_codes):
        raise ValueError(f"Decoder: forced_codes must be in [-1, {num_codes})")
    return torch.cat([codes, codes.new_full((1, steps), -1)])


def _allowed(
    allowed: Sequence[int] | Tensor, requests: int, num_codes: int, device: torch.device
) -> Tensor:
    mask = torch.as_tensor(allowed)
    if mask.dtype != torch.bool:
        if mask.numel() == 0:
            raise ValueError("Decoder: allowed_codes must leave at least one code, got none")
        if mask.ndim != 1 or mask.dtype.is_floating_point:
            raise TypeError("Decoder: allowed_codes must be code ids, or bool [K] or [R, K]")
        if int(mask.min()) < 0 or int(mask.max()) >= num_codes:
            raise ValueError(f"Decoder: allowed_codes must be ids in [0, {num_codes})")
        ids, mask = mask, torch.zeros(num_codes, dtype=torch.bool)
        mask[ids.long()] = True
    if mask.shape not in ((num_codes,), (requests, num_codes)):
        raise ValueError(
            f"Decoder: allowed_codes must be [{num_codes}] or [{requests}, {num_codes}], "
            f"got {list(mask.shape)}"
        )
    mask = mask.to(device).expand(requests, num_codes)
    if not bool(mask.any(-1).all()):
        raise ValueError("Decoder: allowed_codes must leave every request at least one code")
    return torch.cat([mask, mask.new_ones(1, num_codes)])
