"""The ring of contestants: starts their processes, lets them take turns, collects the times."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

from benchmarks.worker import Contestant, Failed, Ready, Task, serve

# A call this slow takes part in few rounds: its relative noise is small and its time is not.
SLOW_MS, SLOW_ROUNDS = 500.0, 3
MIN_ROUNDS = 5

# Imported once, by the server that processes are forked from: nothing of a peer's.
PRELOAD = ["torch", "benchmarks.worker", "latent_rl.ops"]


class Handle(Protocol):
    """A contestant somewhere else."""

    def prepare(self, task: Task) -> Ready | Failed: ...

    def turn(self, call_ms: float) -> list[float] | Failed: ...

    def release(self) -> None: ...


class Process:
    """A contestant in a process of its own; a dead or stuck process is a result too."""

    def __init__(
        self,
        name: str,
        threads: int,
        limit_s: float,
        holder: Callable[[int], Any] = Contestant,
    ) -> None:
        """``holder(threads)`` is made in the process; its methods are what can be asked."""
        self.name, self.threads, self.limit_s, self._holder = name, threads, limit_s, holder
        self._connection: Connection | None = None
        self._process: Any = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, self.threads, self._holder), daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection = ours
        return ours

    def started(self) -> Process:
        if self._connection is None:
            self._start()
        return self

    def ask(self, method: str, *arguments: object) -> Any:
        connection = self._connection or self._start()
        try:
            connection.send((method, arguments))
            if connection.poll(self.limit_s):
                return connection.recv()
            self._process.kill()
            self.stop()
            return Failed(f"took longer than {self.limit_s:g} s")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            return Failed(f"its process died with exit code {code}")

    def prepare(self, task: Task) -> Ready | Failed:
        answer: Ready | Failed = self.ask("prepare", task)
        return answer

    def preheat(self, task: Task) -> None:
        """Compile for a task; what fails here fails again, and is reported, when it is prepared."""
        self.ask("preheat", task)

    def turn(self, call_ms: float) -> list[float] | Failed:
        answer: list[float] | Failed = self.ask("turn", call_ms)
        return answer

    def release(self) -> None:
        if self._connection is not None:
            self.ask("release")

    def stop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            # It ends by itself when idle; third parties' thread pools can hang at exit.
            self._process.join(2)
            self._process.kill()
            self._process.join()
        self._connection = None


class Ring:
    """The processes of one run at one number of threads, started when first needed."""

    def __init__(self, threads: int, limit_s: float = 300.0) -> None:
        self.threads, self.limit_s = threads, limit_s
        self._processes: dict[str, Process] = {}

    def __getitem__(self, name: str) -> Process:
        if name not in self._processes:
            self._processes[name] = Process(name, self.threads, self.limit_s)
        return self._processes[name]

    def preheat(self, tasks: Mapping[str, Task], workers: int) -> None:
        """Let several contestants build and compile at the same time, before any is timed."""
        # Processes are started by this thread alone.
        processes = [(self[name].started(), task) for name, task in tasks.items()]
        with ThreadPoolExecutor(max_workers=workers) as pool:
            list(pool.map(lambda pair: pair[0].preheat(pair[1]), processes))

    def ceilings(self, device: str, dtypes: tuple[str, ...]) -> dict[str, Any]:
        process = self["ceilings"]
        found = process.ask("ceilings", device, dtypes)
        process.stop()
        if isinstance(found, Failed):
            raise RuntimeError(f"ceilings: {found.reason}")
        return dict(found)

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes.values():
            process.stop()


def interleave(
    handles: Mapping[str, Handle],
    ready: Mapping[str, Ready],
    *,
    rounds: int,
    budget_s: float,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, list[float] | Failed]:
    """Every contestant takes one turn per round, so that drift of the machine hits all alike.

    The order rotates. Ends after ``rounds`` rounds, or after ``budget_s`` seconds and at least
    five rounds; contestants slower than half a second a call leave after three.
    """
    samples: dict[str, list[float] | Failed] = {name: [] for name in ready}
    # The least seen so far: one disturbed call must not pass a contestant off as slow.
    pace = {name: answer.call_ms for name, answer in ready.items()}
    deadline = now() + budget_s
    names = list(ready)
    for done in range(rounds):
        if done >= MIN_ROUNDS and now() > deadline:
            break
        first = done % len(names) if names else 0
        for name in names[first:] + names[:first]:
            held = samples[name]
            if isinstance(held, Failed):
                continue
            if pace[name] > SLOW_MS and done >= SLOW_ROUNDS:
                continue
            times = handles[name].turn(pace[name])
            if isinstance(times, Failed):
                samples[name] = times
            else:
                held.extend(times)
                pace[name] = min(pace[name], *times)
    return samples
