"""A VQ autoencoder of digit scans, with our codebook and with vector-quantize-pytorch's.

``python -m benchmarks.train.vq_autoencoder`` trains the same encoder and decoder from the same
seeds with either quantizer (moving averages, k-means on the first batch, one commitment weight,
straight-through gradients, revival below one threshold). It reports the held-out error, the codes
in use, and the time of the quantizer alone and of whole steps; JSON and the loss curves go to
``benchmarks/results/train/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe
from latent_rl.nn import EmaCodebook, VectorQuantizer, perplexity

RESULTS = Path(__file__).resolve().parents[1] / "results" / "train"
OURS, PEER = "latent_rl", "vector-quantize-pytorch"
CODES, WIDTH, BATCH = 512, 64, 256
DECAY, COMMITMENT, KMEANS = 0.99, 0.25, 10
# A code below this share of an even count takes the place of a row of the batch.
DEAD_BELOW = 0.1
HELD_OUT = 297


class Autoencoder(nn.Module):
    """8 x 8 scans to 4 x 4 vectors and back; the quantizer stands between."""

    def __init__(self, quantize: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, WIDTH, 4, 2, 1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(WIDTH, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 1, 3, padding=1)
        )
        self.quantize = quantize
        self.quantize_s = 0.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 1, 8, 8] -> reconstruction, the quantizer's loss, codes [B * 16]."""
        grid = self.encoder(images)
        rows = grid.permute(0, 2, 3, 1).reshape(-1, WIDTH)
        started = time.perf_counter()
        vectors, loss, codes = self.quantize(rows)
        self.quantize_s += time.perf_counter() - started
        back = vectors.view(len(images), 4, 4, WIDTH).permute(0, 3, 1, 2)
        return self.decoder(back), loss, codes


class Ours(nn.Module):
    """This project's quantizer: rows -> vectors, loss, codes."""

    def __init__(self) -> None:
        super().__init__()
        book = EmaCodebook(
            CODES, WIDTH, decay=DECAY, dead_below=DEAD_BELOW, kmeans_iterations=KMEANS
        )
        self.quantizer = VectorQuantizer(book, commitment=COMMITMENT)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> [N, D], scalar, [N]."""
        out = self.quantizer(rows, 0)
        return out.vectors, out.loss, out.codes


class Peer(nn.Module):
    """vector-quantize-pytorch's VectorQuantize under the same settings."""

    def __init__(self) -> None:
        super().__init__()
        from vector_quantize_pytorch import VectorQuantize

        self.quantizer = VectorQuantize(
            dim=WIDTH,
            codebook_size=CODES,
            decay=DECAY,
            commitment_weight=COMMITMENT,
            kmeans_init=True,
            kmeans_iters=KMEANS,
            threshold_ema_dead_code=DEAD_BELOW * BATCH * 16 / CODES,
            # Its default is the rotation trick: another gradient than straight through.
            rotation_trick=False,
        )
        # Its constructor does not pass this on; the default is the threshold, ours an even share.
        self.quantizer._codebook.reset_cluster_size = BATCH * 16 / CODES

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> [N, D], scalar, [N]."""
        vectors, codes, loss = self.quantizer(rows[None])
        return vectors[0], loss.sum(), codes[0]


QUANTIZERS: dict[str, type[nn.Module]] = {OURS: Ours, PEER: Peer}


def scans() -> tuple[Tensor, Tensor]:
    """Training and held-out digit scans in [0, 1], [n, 1, 8, 8]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[HELD_OUT:], images[:HELD_OUT]


def train(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One run: the losses of every step, the held-out error, and seconds."""
    torch.manual_seed(seed)
    images, held_out = scans()
    model = Autoencoder(lambda rows: rows)  # type: ignore[arg-type,return-value]
    # The same initial encoder and decoder whatever the quantizer draws.
    model.quantize = quantizer = QUANTIZERS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    draw = torch.Generator().manual_seed(seed)
    curve, step_s, quantize_s = [], [], []
    for _ in range(steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=draw)]
        started, model.quantize_s = time.perf_counter(), 0.0
        back, loss, _ = model(batch)
        error = nn.functional.mse_loss(back, batch)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        step_s.append(time.perf_counter() - started)
        quantize_s.append(model.quantize_s)
        curve.append(error.item())
    quantizer.eval()
    with torch.no_grad():
        back, _, codes = model.eval()(held_out)
    counts = torch.bincount(codes.clamp_min(0), minlength=CODES)
    # The first steps hold k-means and the allocator's warm-up.
    return {
        "held_out_mse": nn.functional.mse_loss(back, held_out).item(),
        "perplexity": perplexity(counts).item(),
        "codes_used": int((counts > 0).sum()),
        "step_ms": 1e3 * statistics.median(step_s[5:]),
        "quantize_forward_ms": 1e3 * statistics.median(quantize_s[5:]),
        "curve": curve,
    }


def quantizer_alone(name: str, repeats: int) -> float:
    """Milliseconds of forward, moving averages and backward on one batch's rows; median."""
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name]().train()
    rows = torch.randn(BATCH * 16, WIDTH, requires_grad=True)
    grad = torch.randn(BATCH * 16, WIDTH)
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        vectors, loss, _ = quantizer(rows)
        torch.autograd.grad((vectors * grad).sum() + loss, rows)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[3:])


def main() -> None:
    """Train both from every seed, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--label", default="", help="name of the machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in QUANTIZERS}
    for seed in range(args.seeds):
        # In turns, so that a slow minute of the machine meets both.
        for name in QUANTIZERS:
            runs[name].append(train(name, seed, args.steps))
            print(name, seed, {k: v for k, v in runs[name][-1].items() if k != "curve"}, flush=True)
    alone = {name: quantizer_alone(name, 40) for name in QUANTIZERS}
    Console(width=130).print(table_of(runs, alone))
    machine = describe(torch.device("cpu"), args.label)
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = f"vq_autoencoder-{machine.slug}-{args.threads}t"
    settings = {"K": CODES, "D": WIDTH, "rows": BATCH * 16, "steps": args.steps, "decay": DECAY}
    record = {
        "machine": machine.as_dict(), "settings": settings, "runs": runs,
        "quantizer_forward_backward_ms": alone,
    }  # fmt: skip
    (RESULTS / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_curves(runs, RESULTS / f"{stem}.png")


def table_of(runs: dict[str, list[dict[str, Any]]], alone: dict[str, float]) -> Table:
    """Means over seeds with their spread, and ratios of times."""
    table = Table(title=f"VQ autoencoder, {len(runs[OURS])} seeds: mean +- standard deviation")
    for heading in ("quantizer", "held-out MSE", "perplexity", "step ms", "quantizer alone ms"):
        table.add_column(heading)
    for name, found in runs.items():
        cells = []
        for key in ("held_out_mse", "perplexity"):
            values = [run[key] for run in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4g} +- {spread:.2g}")
        step = statistics.median(run["step_ms"] for run in found)
        table.add_row(name, *cells, f"{step:.2f}", f"{alone[name]:.2f}")
    steps = {n: statistics.median(run["step_ms"] for run in found) for n, found in runs.items()}
    faster = steps[PEER] / steps[OURS], alone[PEER] / alone[OURS]
    table.add_row("peer / ours", "", "", *(f"{ratio:.2f}x" for ratio in faster))
    return table


def draw_curves(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training error against steps, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for color, (name, found) in zip(("tab:blue", "tab:orange"), runs.items(), strict=True):
        for seed, run in enumerate(found):
            axis.plot(run["curve"], color=color, alpha=0.6, label=name if seed == 0 else None)
    axis.set(yscale="log", xlabel="step", ylabel="reconstruction error (MSE)")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
