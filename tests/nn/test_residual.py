"""Residual quantization: levels add up, errors fall, dropped levels, decoding, ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_rl.nn import Codebook, EmaCodebook, ResidualQuantizer, VectorQuantizer


def quantizer(levels: int = 3, codes: int = 8, dim: int = 4, **options: bool) -> ResidualQuantizer:
    torch.manual_seed(0)
    parts = [VectorQuantizer(EmaCodebook(codes, dim, decay=0.8)) for _ in range(levels)]
    return ResidualQuantizer(parts, **options)


def rows(n: int = 200, dim: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def fitted(**options: bool) -> ResidualQuantizer:
    model = quantizer(**options).train()
    for step in range(10):
        model(rows(seed=step), step)
    return model.eval()


def test_levels_code_what_is_left() -> None:
    model, x = fitted(), rows(seed=99)
    out = model(x, 0)
    residual = x
    for q, level in enumerate(model.levels):
        assert torch.equal(out.codes[:, q], level.codes(residual))
        residual = residual - level.codebook(out.codes[:, q])
    torch.testing.assert_close(out.vectors, x - residual)
    assert torch.equal(out.codes, model.codes(x))
    torch.testing.assert_close(model.decode(out.codes), out.vectors)


def test_more_levels_leave_less() -> None:
    model, x = fitted(), rows(seed=99)
    codes = model.codes(x)
    errors = [(x - model.decode(codes[:, :q])).square().mean().item() for q in (1, 2, 3)]
    assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


def test_one_level_is_the_plain_quantizer() -> None:
    model, x = fitted(), rows(seed=99)
    alone = ResidualQuantizer([model.levels[0]]).eval()
    out, plain = alone(x, 0), model.levels[0](x, 0)
    assert torch.equal(out.codes[:, 0], plain.codes)
    torch.testing.assert_close(out.vectors, plain.vectors)
    torch.testing.assert_close(out.loss, plain.loss)


def test_the_gradient_goes_straight_through_and_levels_learn() -> None:
    torch.manual_seed(0)
    model = ResidualQuantizer([VectorQuantizer(Codebook(8, 4), commitment=0.0) for _ in range(2)])
    x = rows().requires_grad_()
    out = model(x, 0)
    weights = torch.randn_like(x)
    (out.vectors * weights).sum().backward(retain_graph=True)
    assert torch.equal(x.grad, weights)
    out.loss.backward()
    assert all(level.codebook.weight.grad.abs().sum() > 0 for level in model.levels)


def test_dropped_levels_follow_the_seed_and_only_in_training() -> None:
    model = quantizer(drop_levels=True).train()
    used = [int((model(rows(), seed).codes >= 0).any(0).sum()) for seed in range(30)]
    assert set(used) == {1, 2, 3}
    out = model(rows(), 5)
    kept = int((out.codes >= 0).any(0).sum())
    assert (out.codes[:, :kept] >= 0).all()
    assert out.perplexity.isnan().tolist() == [q >= kept for q in range(3)]
    assert int((model(rows(), 5).codes >= 0).any(0).sum()) == kept
    assert (model.eval()(rows(), 5).codes >= 0).all()


def test_broken_rows_and_shapes() -> None:
    model, x = fitted(), rows(6, seed=99).reshape(2, 3, 4)
    assert model.codes(x).shape == (2, 3, 3)
    assert model.decode(model.codes(x)).shape == (2, 3, 4)
    broken = rows(4)
    broken[1, 2] = torch.nan
    out = model(broken, 0)
    assert (out.codes[1] == -1).all()
    assert (out.codes[[0, 2, 3]] >= 0).all()
    assert out.loss.isfinite()
    assert (model.decode(torch.full((2, 3), -1)) == 0).all()


def test_the_state_comes_back() -> None:
    model, other = fitted(), quantizer()
    other.load_state_dict(model.state_dict())
    x = rows(seed=99)
    assert torch.equal(other.eval().codes(x), model.codes(x))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one quantizer"):
        ResidualQuantizer([])
    with pytest.raises(ValueError, match=r"one width, got \[2, 3\]"):
        ResidualQuantizer([VectorQuantizer(Codebook(4, d)) for d in (2, 3)])
    with pytest.raises(ValueError, match=r"l2 metric, got \['cosine'\]"):
        ResidualQuantizer([VectorQuantizer(Codebook(4, 2, metric="cosine"))])
    with pytest.raises(ValueError, match="1 to 3 levels, got 4"):
        quantizer().decode(torch.zeros(2, 4, dtype=torch.int64))


RANK_SCRIPT = """
import sys, torch, torch.distributed as dist
from latent_rl.nn import EmaCodebook, ResidualQuantizer, VectorQuantizer
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)
model = ResidualQuantizer(
    [VectorQuantizer(EmaCodebook(8, 4, decay=0.8, dead_below=0.5)) for _ in range(2)]
).train()
x = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(5))
for step, edges in zip(x, [(0, 20, 60), (0, 45, 60), (0, 60, 60)]):
    model(step[edges[rank]:edges[rank + 1]], 0)
torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_hold_the_levels_of_the_joined_batch(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(r), str(tmp_path)], env=environment
        )
        for r in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    alone = ResidualQuantizer(
        [VectorQuantizer(EmaCodebook(8, 4, decay=0.8, dead_below=0.5)) for _ in range(2)]
    ).train()
    for step in torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(5)):
        alone(step, 0)
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        # Only the order of float32 sums differs.
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
