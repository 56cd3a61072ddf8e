"""Which dtype a custom op should compute in under ``torch.autocast``."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype where it is on for this device type, else None.

    Autocast does not see inside a custom op, so modules that call one cast by hand.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
