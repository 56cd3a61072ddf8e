"""The registry is complete, and what it compares computes the same thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.ops import (
    code_logprobs,
    decode_tail,
    gated_merge,
    gumbel_quantize,
    nearest_code,
    quantize,
)
from benchmarks.packages import PACKAGES, why_absent
from benchmarks.registry import OURS, UNITS, Pass, Peer, Shape, entries
from benchmarks.worker import DTYPES
from latent_rl.backends import OPS

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = entries()
CPU = torch.device("cpu")
# Two sizes of one's own per op: small enough for a test, no two alike.
TINY = {
    "nearest_code": {"N": 37, "D": 8, "K": 5},
    "quantize": {"N": 37, "D": 8, "K": 5},
    "gumbel_quantize": {"N": 37, "K": 5, "D": 8},
    "gated_merge": {"N": 9, "H": 8, "I": 12, "K": 5},
    "sample_codes": {"B": 7, "K": 50},
    "sample_tokens": {"B": 7, "V": 50},
    "decode_tail": {"B": 6, "H": 16, "I": 24, "V": 50, "K": 40, "M": 2, "S": 1},
    "code_logprobs": {"N": 11, "K": 9},
    "slot_attention": {"B": 4, "G": 2, "L": 11, "Hq": 4, "Hk": 2, "D": 8},
}
# The tables of numbers to reach: (device, op, sizes, dtype).
DESIGN = [
    ("cpu", "nearest_code", "8192x2048x128", "float32"),
    ("cpu", "nearest_code", "65536x64x1024", "float32"),
    ("cpu", "nearest_code", "8192x256x8192", "float32"),
    ("cpu", "nearest_code", "65536x16x1024", "float32"),
    ("cpu", "nearest_code", "8192x2048x128", "bfloat16"),
    ("cpu", "quantize", "8192x2048x128", "float32"),
    ("cpu", "quantize", "65536x64x1024", "float32"),
    ("cpu", "quantize", "8192x256x8192", "float32"),
    ("cpu", "sample_codes", "64x128", "float32"),
    ("cuda", "nearest_code", "8192x2048x128", "bfloat16"),
    ("cuda", "nearest_code", "1000000x256x8192", "bfloat16"),
    ("cuda", "nearest_code", "65536x64x1024", "bfloat16"),
    ("cuda", "nearest_code", "8192x2048x128", "float32"),
    ("cuda", "quantize", "8192x2048x128", "bfloat16"),
    ("cuda", "quantize", "65536x64x1024", "bfloat16"),
    ("cuda", "quantize", "1000000x256x8192", "bfloat16"),
    ("cuda", "gumbel_quantize", "65536x8192x256", "bfloat16"),
    ("cuda", "gated_merge", "8192x2048x11008x128", "bfloat16"),
    *(
        ("cuda", "decode_tail", f"{rows}x2048x11008x151936x128x2x0", "bfloat16")
        for rows in (1, 64, 256)
    ),
    *(
        ("cuda", "sample_codes", f"{rows}x{size}", "bfloat16")
        for rows in (1, 64, 256)
        for size in (128, 8192)
    ),
]


def test_every_op_has_an_entry_and_its_tests_exist() -> None:
    assert {name for name, entry in ENTRIES.items() if not entry.parts} == set(OPS)
    assert all(part in OPS for entry in ENTRIES.values() for part in entry.parts)
    for entry in ENTRIES.values():
        assert (ROOT / entry.tests).is_file()


@pytest.mark.parametrize(("device", "op", "tag", "dtype"), DESIGN)
def test_the_shapes_of_the_design_are_measured(device: str, op: str, tag: str, dtype: str) -> None:
    shapes = {shape.tag: shape for shape in ENTRIES[op].shapes}
    assert dtype in shapes[tag].dtypes_on(device)


def test_differentiable_ops_are_measured_forward_and_backward() -> None:
    for op in ("quantize", "gumbel_quantize", "gated_merge", "code_logprobs"):
        assert ENTRIES[op].passes == (Pass.FORWARD, Pass.TRAIN)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_an_entry_is_consistent(entry) -> None:
    names = [peer.name for peer in entry.contestants()]
    assert len(set(names)) == len(names)
    assert names[0] == OURS
    tags = [shape.tag for shape in entry.shapes]
    assert len(set(tags)) == len(tags)
    assert all(peer.package in ("", *PACKAGES) for peer in entry.peers)
    assert len(entry.peers) >= 2
    for shape in entry.shapes:
        assert tuple(shape.sizes) == tuple(TINY[entry.op])
        for (device, dtype, which), goals in (shape.goals or {}).items():
            assert dtype in shape.dtypes_on(device), f"{shape} has goals where it does not run"
            assert which in entry.passes
            assert all(g.against in ("", "every peer", *names) for g in goals)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_traffic_and_work_grow_with_rows_and_passes(entry) -> None:
    sizes = TINY[entry.op]
    shape = Shape(sizes)
    double = Shape({s: 2 * n if s in "NB" else n for s, n in sizes.items()})
    for which in entry.passes:
        for dtype in (torch.float32, torch.bfloat16):
            moved = entry.bytes_moved(shape, dtype, which)
            assert 0 < moved < entry.bytes_moved(double, dtype, which)
        assert 0 < entry.flops(shape, which) < entry.flops(double, which)
    assert entry.bytes_moved(shape, torch.bfloat16, Pass.FORWARD) < entry.bytes_moved(
        shape, torch.float32, Pass.FORWARD
    )


def runnable(entry) -> list[tuple[Peer, str, Pass]]:
    """Contestants of this machine; compiling belongs to the benchmark, not to its tests."""
    return [
        (peer, dtype, which)
        for peer in entry.contestants()
        for dtype in ("float32", "bfloat16")
        for which in entry.passes
        if not (peer.name.startswith("torch.compile") or peer.backend)
        and peer.why_not("cpu", dtype, which) is None
    ]


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_contestant_here_runs(entry) -> None:
    chosen = runnable(entry)
    assert {OURS} < {peer.name for peer, _, _ in chosen}
    for peer, dtype, which in chosen:
        inputs = entry.make_inputs(Shape(TINY[entry.op]), CPU, DTYPES[dtype])
        call = peer.make(inputs, which)
        call()
        result = call()
        if entry.truth is not None and peer.name not in UNITS.values():
            quality = entry.check(inputs, result, entry.truth(inputs))
            # Ours is exact; at five random codes so is every search in float32.
            exact = peer.name == OURS or dtype == "float32"
            assert quality["wrong_rows"] == 0 if exact else quality["wrong_share"] < 0.2


def test_inputs_are_the_same_in_every_process() -> None:
    for op, entry in ENTRIES.items():
        first, second = (entry.make_inputs(Shape(TINY[op]), CPU, torch.float32) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_floor_of_a_decode_tail_is_its_weights() -> None:
    entry = ENTRIES["decode_tail"]
    (shape,) = [s for s in entry.shapes if s["M"] == 1]
    # 758 MB of weights, one merge block among them, and 6 MB of tables and states.
    moved = entry.bytes_moved(shape, torch.bfloat16, Pass.FORWARD)
    assert 758e6 < moved < 765e6


def test_wrong_codes_are_counted() -> None:
    entry = ENTRIES["nearest_code"]
    inputs = entry.make_inputs(Shape({"N": 40, "D": 8, "K": 5}), CPU, torch.float32)
    truth = entry.truth(inputs)
    codes = nearest_code.search(inputs).clone()
    codes[:10] = (codes[:10] + 1) % 5
    assert entry.check(inputs, codes, truth) == {"wrong_rows": 10.0, "wrong_share": 0.25}
    # A code that is exactly as near is not wrong.
    twice = {"x": inputs["x"], "codebook": inputs["codebook"].repeat(2, 1)}
    assert entry.check(twice, nearest_code.search(inputs) + 5, truth)["wrong_rows"] == 0


class TestPeersComputeTheSame:
    """A peer that does less than the op is no peer."""

    def inputs(self, op: str):
        return ENTRIES[op].make_inputs(Shape(TINY[op]), CPU, torch.float32)

    @pytest.mark.parametrize("peer", [gated_merge.concatenated, gated_merge.paper_form])
    def test_gated_merge(self, peer) -> None:
        t = self.inputs("gated_merge")
        torch.testing.assert_close(peer(t), gated_merge.merge(t))

    def test_quantize(self) -> None:
        t = self.inputs("quantize")
        torch.testing.assert_close(quantize.composed(t), quantize.quantize(t))

    def test_code_logprobs(self) -> None:
        t = self.inputs("code_logprobs")
        torch.testing.assert_close(code_logprobs.composed(t), code_logprobs.code_logprobs(t))

    @pytest.mark.parametrize("sampled", [0, 1])
    def test_decode_tail(self, sampled: int) -> None:
        sizes = {**TINY["decode_tail"], "S": sampled}
        t = ENTRIES["decode_tail"].make_inputs(Shape(sizes), CPU, torch.float32)
        tail = decode_tail.Tail(t)
        first = tail().clone()
        theirs = decode_tail.Composed({**t, "sampled": torch.tensor(0)})
        tokens = theirs.spoken(t["state"], first[:, 1])
        assert torch.equal(tokens, first[:, 0]) == (not sampled)
        # Each call is a step further along the rows' streams.
        assert not torch.equal(tail(), first)
        assert tail.rows.steps.tolist() == [2] * sizes["B"]

    def test_gumbel_quantize_up_to_its_noise(self) -> None:
        t = self.inputs("gumbel_quantize")
        theirs, ours = gumbel_quantize.functional(t), gumbel_quantize.gumbel_quantize(t)
        torch.testing.assert_close(theirs[1], ours[1])
        # Both return rows of the codebook, up to the rounding of 1 - y + y in float32.
        off = (theirs[0][:, None] - t["codebook"]).abs().amax(-1).amin(1)
        assert off.max() < 1e-5


@pytest.mark.parametrize("op", ["quantize", "gumbel_quantize", "gated_merge", "code_logprobs"])
def test_backward_asks_for_every_gradient(op: str) -> None:
    entry = ENTRIES[op]
    inputs = entry.make_inputs(Shape(TINY[op]), CPU, torch.float32)
    module = {
        "quantize": quantize,
        "gumbel_quantize": gumbel_quantize,
        "gated_merge": gated_merge,
        "code_logprobs": code_logprobs,
    }[op]
    grads = entry.ours(inputs, Pass.TRAIN)()
    assert len(grads) == len(module.WANTED)
    for name, grad in zip(module.WANTED, grads, strict=True):
        assert grad.shape == inputs[name].shape
        assert grad.abs().sum() > 0
    outputs = entry.ours(inputs, Pass.FORWARD)()
    assert not any(out.requires_grad for out in outputs)


def test_a_package_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_absent("flash-kmeans") == (
        "flash-kmeans is not installed (pip install 'latent-rl[bench-cuda]')"
    )
    assert why_absent("") is None


def test_a_peer_says_why_it_takes_no_part() -> None:
    peer = Peer("p", lambda inputs, which: None, devices=("cuda",), dtypes=("float32",))
    assert peer.why_not("cpu", "float32", Pass.FORWARD) == "runs on cuda only"
    assert peer.why_not("cuda", "bfloat16", Pass.FORWARD) == "takes float32 only"
    assert peer.why_not("cuda", "float32", Pass.FORWARD) is None
    forward = Peer("p", lambda inputs, which: None, passes=(Pass.FORWARD,))
    assert forward.why_not("cpu", "float32", Pass.TRAIN) == "has no forward+backward pass"


def test_extras_name_every_package() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for key, package in PACKAGES.items():
        listed = " ".join(extras[package.extra])
        assert any(name in listed for name in package.distributions), key
