"""The autoencoder comparison: both quantizers learn, from the same start, and the table fits."""

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.train import vq_autoencoder as bench


@pytest.mark.parametrize("name", [bench.OURS, bench.PEER])
def test_it_learns(name, monkeypatch) -> None:
    if name == bench.PEER:
        pytest.importorskip("vector_quantize_pytorch")
    monkeypatch.setattr(bench, "BATCH", 16)
    monkeypatch.setattr(bench, "CODES", 32)
    run = bench.train(name, seed=0, steps=25)
    assert len(run["curve"]) == 25
    assert sum(run["curve"][-5:]) < 0.8 * sum(run["curve"][:5])
    assert 1 < run["perplexity"] <= 32
    assert 1 < run["codes_used"] <= 32
    assert run["step_ms"] > run["quantize_forward_ms"] > 0


def test_runs_of_a_seed_start_from_the_same_encoder_and_see_the_same_batches() -> None:
    images, held_out = bench.scans()
    assert images.shape[1:] == held_out.shape[1:] == (1, 8, 8)
    assert len(images) + len(held_out) == 1797
    assert 0 <= images.min() < images.max() <= 1
    first, second = bench.scans(), bench.scans()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_table_gives_means_and_ratios() -> None:
    def run(error: float, step_ms: float) -> dict[str, float]:
        return {"held_out_mse": error, "perplexity": 10.0, "step_ms": step_ms}

    runs = {bench.OURS: [run(1.0, 2.0), run(3.0, 2.0)], bench.PEER: [run(2.0, 6.0), run(2.0, 6.0)]}
    table = bench.table_of(runs, {bench.OURS: 0.5, bench.PEER: 2.0})
    columns = [list(column.cells) for column in table.columns]
    assert columns[1][0] == "2 +- 1.4"
    assert columns[3][2] == "3.00x"
    assert columns[4][2] == "4.00x"
