"""Merge forms against their formulas, written out with plain linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from latent_rl.nn import BlockMerge, Merge, MergeBlock, NormDeltaMerge, ResidualMerge

H, D, INNER, K = 6, 4, 10, 5


def make(form: str, norm: nn.Module) -> Merge:
    torch.manual_seed(0)
    merge: Merge
    if form == "residual":
        merge = ResidualMerge(H, D, INNER, 2)
        for block in merge.blocks:
            nn.init.normal_(block.w_down)  # type: ignore[arg-type]
        return merge
    return (NormDeltaMerge if form == "norm_delta" else BlockMerge)(H, D, INNER, 2, norm)


def by_hand(block: MergeBlock, e: Tensor, c: Tensor) -> Tensor:
    joined = torch.cat([e, c], -1)
    return (silu(joined @ block.w_gate.T) * (joined @ block.w_up.T)) @ block.w_down.T


@pytest.mark.parametrize("form", ["residual", "norm_delta", "block"])
def test_forms_equal_their_formulas(form: str) -> None:
    norm = nn.RMSNorm(H)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    merge = make(form, norm)
    e, codebook = torch.randn(2, 3, H), torch.randn(K, D)
    codes = torch.randint(K, (2, 3))
    first, second = merge.blocks
    c = codebook[codes]
    b1 = by_hand(first, e, c)  # type: ignore[arg-type]
    b2 = by_hand(second, e + b1, c)  # type: ignore[arg-type]
    expected = {
        "residual": e + b1 + b2,
        "norm_delta": norm(e + b1 + b2) - e,
        "block": norm(b2),
    }[form]
    torch.testing.assert_close(merge(e, codes, codebook), expected, rtol=1e-5, atol=1e-5)


def test_untrained_residual_merge_is_the_identity() -> None:
    e = torch.randn(7, H)
    merged = ResidualMerge(H, D, INNER, 2)(e, torch.randint(K, (7,)), torch.randn(K, D))
    assert torch.equal(merged, e)


def test_untrained_residual_merge_still_learns() -> None:
    merge = ResidualMerge(H, D, INNER, 2)
    optimizer = torch.optim.Adam(merge.parameters(), lr=0.05)
    e, codebook, codes = torch.randn(32, H), torch.randn(K, D), torch.randint(K, (32,))
    target = e + torch.randn(K, H)[codes]
    losses = []
    for _ in range(150):
        loss = (merge(e, codes, codebook) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("form", ["residual", "norm_delta", "block"])
def test_code_vectors_take_the_gradient_of_the_code(form: str) -> None:
    merge = make(form, nn.RMSNorm(H))
    e, codebook = torch.randn(9, H), torch.randn(K, D, requires_grad=True)
    codes = torch.randint(K, (9,))
    vectors = codebook.detach()[codes].requires_grad_()
    table = merge(e, codes, codebook)
    straight = merge(e, codes, codebook, vectors)
    torch.testing.assert_close(table, straight)
    pull = torch.randn(9, H)
    (table * pull).sum().backward()
    (straight * pull).sum().backward()
    assert codebook.grad is not None
    assert vectors.grad is not None
    # The table's gradient is the sum over the rows that used each code.
    summed = torch.zeros(K, D).index_add(0, codes, vectors.grad)
    torch.testing.assert_close(codebook.grad, summed, rtol=1e-4, atol=1e-5)


def test_norm_is_a_copy() -> None:
    norm = nn.RMSNorm(H)
    merge = BlockMerge(H, D, INNER, 1, norm)
    assert merge.norm is not norm
    nn.init.zeros_(merge.norm.weight)  # type: ignore[arg-type]
    assert norm.weight.all()


def test_autocast_computes_in_its_dtype() -> None:
    merge = make("residual", nn.RMSNorm(H))
    e, codes, codebook = torch.randn(9, H), torch.randint(K, (9,)), torch.randn(K, D)
    with torch.autocast("cpu", torch.bfloat16):
        low = merge.blocks[0](e, codes, codebook)
    assert low.dtype == torch.bfloat16
    full = merge.blocks[0](e, codes, codebook)
    assert not torch.equal(low.float(), full)
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1 * full.abs().max().item())


def test_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks must be >= 1, got 0"):
        ResidualMerge(H, D, INNER, 0)
