"""Reads which device code a binary carries, where cuobjdump is not at hand."""

from __future__ import annotations

import struct
from pathlib import Path

# The container's magic number; then version u16, header size u16, payload size u64.
_MAGIC = struct.pack("<I", 0xBA55ED50)
# An entry's header: kind u16 (1 PTX, 2 machine code), u16, header size u32, payload size u64, and
# the architecture as u32 at byte 28.
_MACHINE_CODE = 2
_ARCHITECTURE_AT = 28


def machine_code_architectures(binary: Path) -> set[int]:
    """Architectures (80, 90, 100) with machine code in every fat binary of a shared library."""
    data = binary.read_bytes()
    found: list[set[int]] = []
    at = data.find(_MAGIC)
    while at >= 0:
        _, header, payload = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + payload
        here = set()
        while entry < end:
            kind, _, entry_header, entry_payload = struct.unpack_from("<HHIQ", data, entry)
            if kind == _MACHINE_CODE:
                here.add(struct.unpack_from("<I", data, entry + _ARCHITECTURE_AT)[0])
            entry += entry_header + entry_payload
        if here:
            found.append(here)
        at = data.find(_MAGIC, end)
    return set.intersection(*found) if found else set()
