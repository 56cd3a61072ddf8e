"""How long a tile configuration should take: only good enough to try likely winners first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What a device offers; an H200 by its datasheet and what copies and products reach on it."""

    processors: int = 132
    gb_per_s: float = 4300.0
    l2_gb_per_s: float = 9000.0
    tflops: float = 790.0
    shared_bytes: int = 227 * 1024
    registers: int = 255


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Work:
    """A launch as the model sees it.

    Attributes:
        programs: blocks of threads.
        flops: of all of them, padding included.
        memory_bytes: that come from device memory at least once.
        cache_bytes: that all programs ask for together, mostly of the L2.
        accumulators: float32 numbers of a program that live in registers.
        shared_bytes: of a program.
        loads_in_flight: pipeline stages of the inner loop.
        tile: rows and columns of a product, on which the matrix units' share depends.
    """

    programs: int
    flops: float
    memory_bytes: float
    cache_bytes: float
    accumulators: int
    shared_bytes: int
    loads_in_flight: int
    tile: tuple[int, int]
    warps: int

    def fits(self, chip: Chip) -> bool:
        """Whether it can run at all and need not spill."""
        per_thread = self.accumulators / (32 * self.warps)
        return self.shared_bytes <= chip.shared_bytes and per_thread <= 0.8 * chip.registers

    def predicted_us(self, chip: Chip, element_bytes: int) -> float:
        """Products, memory and cache side by side; the longest, over whole waves of programs."""
        by_shared = chip.shared_bytes // max(self.shared_bytes, 1)
        by_registers = int(64 * 1024 / (self.accumulators + 48 * 32 * self.warps))
        resident = max(1, min(by_shared, by_registers, 64 // self.warps, 16))
        slots = chip.processors * resident
        # The last wave is as long as the others, however few programs it has.
        fill = self.programs / (cdiv(self.programs, slots) * slots)
        fill = max(fill, min(1.0, self.programs / chip.processors) / resident)
        rows, columns = self.tile
        # Operands are read from shared memory once per tile: small tiles starve the units.
        units = rows * columns / (rows * columns + 24 * (rows + columns))
        latency = min(1.0, resident * self.loads_in_flight * self.warps / 24)
        rate = chip.tflops * (1.0 if element_bytes == 2 else 0.5)
        products = self.flops / (rate * 1e6 * units * fill)
        memory = self.memory_bytes / (chip.gb_per_s * 1e3 * latency)
        cache = self.cache_bytes / (chip.l2_gb_per_s * 1e3 * latency)
        return max(products, memory, cache) + 0.15 * (products + memory + cache)
