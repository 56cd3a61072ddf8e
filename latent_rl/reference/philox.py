"""The one random stream of the project, in plain integer arithmetic.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): key = the
row's seed, counter = (code // 4, offset low, offset high, 0), one 32-bit word per code. Noise of a
row therefore depends on its seed, its offset and the code alone, never on the batch around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_words(seeds: Tensor, offsets: Tensor, num_codes: int) -> Tensor:
    """32-bit words as int64 [N, num_codes], from int64 ``seeds`` [N] and ``offsets`` [N]."""
    blocks = torch.arange((num_codes + 3) // 4, device=seeds.device)[None]
    zeros = torch.zeros_like(seeds)[:, None] + torch.zeros_like(blocks)
    low, high = offsets & _MASK, (offsets >> 32) & _MASK
    counter = (zeros + blocks, zeros + low[:, None], zeros + high[:, None], zeros)
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    for _ in range(10):
        counter = _round(counter, key)
        key = ((key[0] + _KEY_STEPS[0]) & _MASK, (key[1] + _KEY_STEPS[1]) & _MASK)
    return torch.stack(counter, -1).flatten(1)[:, :num_codes]


def gumbel_noise(seeds: Tensor, offsets: Tensor, num_codes: int) -> Tensor:
    """Standard Gumbel noise, float64 [N, num_codes]: -log(-log u), u = (word + 1/2) / 2^32."""
    uniform = (philox_words(seeds, offsets, num_codes).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))


def _round(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A 32 x 32 bit product wraps in int64 but keeps all of its 64 bits; masking after the shift
    # drops the sign extension.
    first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
    return (
        (second >> 32) & _MASK ^ counter[1] ^ key[0],
        second & _MASK,
        (first >> 32) & _MASK ^ counter[3] ^ key[1],
        first & _MASK,
    )
