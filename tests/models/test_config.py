"""Settings are checked once, where they are made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from latent_rl.models import LatentConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_codes", 0, "num_codes must be >= 1, got 0"),
        ("policy_layers", 0, "policy_layers must be >= 1"),
        ("code_dim", 0, "code_dim must be >= 1 or None, got 0"),
        ("quantizer", "fsq", "quantizer must be one of vq, gumbel, got 'fsq'"),
        ("merge_form", "sum", "merge_form must be one of residual, norm_delta, block"),
        ("metric", "dot", "metric must be one of l2, cosine"),
        ("dtype", "int8", "dtype must be one of float32"),
        ("vq_decay", 1.0, r"vq_decay must be in \[0, 1\), got 1.0"),
        ("gumbel_tau", 0.0, "gumbel_tau must be > 0, got 0.0"),
    ],
)
def test_bad_values_name_the_field(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentConfig(**{field: value})


def test_unknown_fields_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown field\(s\) codes; known: .*num_codes"):
        LatentConfig.from_mapping({"codes": 4})


def test_wrong_types_are_value_errors() -> None:
    with pytest.raises(ValueError, match="wrong type"):
        LatentConfig.from_mapping({"num_codes": "many"})


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LatentConfig().num_codes = 3  # type: ignore[misc]
