"""Memory that shows what a kernel does to it outside a tensor."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

CANARY, GARBAGE = 0xA5, 0xFF
_ALIGNMENT = 16
_NO_ACCESS = 0


def _before_a_fence(count: int) -> tuple[Tensor, Tensor]:
    """(all, tensor's) bytes of a mapping whose next page faults; both are aligned to 16 bytes."""
    padded = -(-count // _ALIGNMENT) * _ALIGNMENT
    readable = -(-max(padded, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    mapping = mmap.mmap(-1, readable + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    fence = ctypes.c_void_p(address + readable)
    if libc.mprotect(fence, ctypes.c_size_t(mmap.PAGESIZE), _NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(mapping, dtype=torch.uint8, count=readable)
    whole.fill_(CANARY)
    begin = readable - padded
    return whole, whole[begin : begin + count]


def fenced(tensor: Tensor) -> Tensor:
    """A contiguous copy: a kernel that reads sixteen bytes or more past its end faults."""
    inside = _before_a_fence(tensor.numel() * tensor.itemsize)[1]
    copy = inside.view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


class GuardedMemory:
    """torch.empty whose memory is garbage (NaN as a float), between canaries and a fence."""

    def __init__(self) -> None:
        self._given: list[tuple[Tensor, Tensor]] = []

    def empty(
        self, *shape: Any, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        dtype = dtype or torch.get_default_dtype()
        whole, inside = _before_a_fence(torch.Size(sizes).numel() * dtype.itemsize)
        inside.fill_(GARBAGE)
        self._given.append((whole, inside))
        return inside.view(dtype).view(sizes)

    def empty_like(self, other: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        return self.empty(other.shape, dtype=dtype or other.dtype)

    def check(self) -> None:
        for whole, inside in self._given:
            begin = inside.storage_offset()
            outside = torch.cat([whole[:begin], whole[begin + inside.numel() :]])
            assert (outside == CANARY).all(), "a kernel wrote outside its output or workspace"
