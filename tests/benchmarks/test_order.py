"""The order of backends that times suggest, and where shapes disagree."""

from __future__ import annotations

from benchmarks import order


def row(shape: int, served: str, **contestants: float | str) -> dict:
    """A row of gated_merge: ms of each backend, or why it failed."""
    found = {}
    for name, value in contestants.items():
        at = "latent_rl" if name == served else f"latent_rl ({name})"
        if isinstance(value, str):
            found[at] = {"status": "failed", "reason": value}
        else:
            found[at] = {"status": "measured", "timing": {"p25_ms": value}}
    return {
        "op": "gated_merge",
        "pass": "forward",
        "shape": {"N": shape},
        "dtype": "bfloat16",
        "backend": served,
        "contestants": found,
    }


def test_the_fastest_comes_first_and_exceptions_are_named() -> None:
    rows = [
        row(8192, "cuda", cuda=2.0, triton=1.0, reference=3.0),
        row(64, "cuda", cuda=1.0, triton=1.2, reference=9.0),
    ]
    found = order.order_of("gated_merge", rows)
    assert found.suggested == ("triton", "cuda", "reference")
    assert [point.where for point in found.exceptions()] == ["forward N=64 bfloat16"]
    text = "\n".join(order.lines_of(found))
    assert "gated_merge: triton > cuda > reference (now cuda > triton > reference)" in text
    assert "forward N=64 bfloat16: cuda is fastest, triton takes 1.20x" in text


def test_a_tie_keeps_the_present_order() -> None:
    found = order.order_of("gated_merge", [row(8, "cuda", cuda=1.02, triton=1.0)])
    assert found.suggested == ("cuda", "triton")
    assert not found.exceptions()
    assert "as it stands" in order.lines_of(found)[0]


def test_a_row_that_failed_comes_last() -> None:
    rows = [
        row(8, "cuda", cuda=2.0, triton=1.0),
        row(9, "cuda", cuda=2.0, triton="out of shared memory", reference=5.0),
    ]
    found = order.order_of("gated_merge", rows)
    assert found.suggested[-1] == "triton"
    assert "triton failed: out of shared memory" in "\n".join(order.lines_of(found))


def test_nothing_to_compare() -> None:
    assert order.order_of("gated_merge", [row(8, "cuda", cuda=1.0)]) is None
    assert order.suggest({"rows": []}) == []
