"""Stateful parts: what a run must remember besides the model, the optimiser and the schedule."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latent_rl.train.checkpoint_files import write_atomically

__all__ = ["Stateful", "StatefulParts"]

FORMAT = 1
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state to resume from: a module, a controller, a schedule.

    `state_dict` returns a mapping with string keys whose values are tensors, None, bool, int,
    float, str, or lists and mappings of these. `load_state_dict` gets it back with tensors on the
    CPU and tuples as lists; it must leave the object exactly as it was when saved.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """Return what to remember."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any:
        """Take over what `state_dict` returned."""
        ...


class StatefulParts:
    """The named parts of a trainer that checkpoints carry.

    A trainer's `stateful` is one. Add to it in the constructor, before `train`:

        self.stateful.add("adaptive_beta", self.controller)

    and every checkpoint holds `state-adaptive_beta.safetensors`, and a resumed run gives it back
    before the first step. A part of a run is required in the checkpoint it resumes from: a missing
    one raises, so that no run continues with a state that started over.
    """

    def __init__(self) -> None:
        self._parts: dict[str, tuple[Stateful, bool]] = {}

    def add(self, name: str, part: Stateful, *, per_rank: bool = False) -> None:
        """Carry a part in checkpoints.

        name      lower case letters, digits and underscores; names the file
        per_rank  whether every process has a state of its own (a share of a rollout); otherwise
                  the first process writes it and all read it

        Raises:
            ValueError: a name that is taken or not of this form.
            TypeError: a part without `state_dict` and `load_state_dict`.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"StatefulParts.add: name must match {_NAME.pattern}, got {name!r}")
        if name in self._parts:
            raise ValueError(f"StatefulParts.add: name {name!r} is taken")
        if not isinstance(part, Stateful):
            raise TypeError(
                "StatefulParts.add: part must have state_dict and load_state_dict, "
                f"got {type(part).__name__}"
            )
        self._parts[name] = (part, per_rank)

    def save(self, directory: Path, *, rank: int, world_size: int) -> None:
        """Write this process's share of the parts, each whole or not at all.

        Raises:
            TypeError: a state that holds something else than `Stateful` allows.
        """
        directory.mkdir(parents=True, exist_ok=True)
        for name, (part, per_rank) in self._parts.items():
            if per_rank or rank == 0:
                path = _path(directory, name, rank if per_rank else None)
                _write(path, part.state_dict(), world_size)

    def load(self, directory: Path, *, rank: int, world_size: int) -> None:
        """Give every part its state back.

        Raises:
            ValueError: a state that is missing, corrupt, or one per process of another number of
                processes.
        """
        for name, (part, per_rank) in self._parts.items():
            path = _path(directory, name, rank if per_rank else None)
            if not path.is_file():
                raise ValueError(
                    f"{directory} holds no {path.name}: it was written by a run of other settings, "
                    "another number of processes or an older version; resume with the settings it "
                    "was made with, or start a new run from its weights"
                )
            state, written_by = _read(path)
            if per_rank and written_by != world_size:
                raise ValueError(
                    f"{path}: written by {written_by} processes, this run has {world_size}; resume "
                    "with as many, or start a new run from the checkpoint's weights"
                )
            try:
                part.load_state_dict(state)
            except (KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"{path} does not fit this run: {error}") from error


def _path(directory: Path, name: str, rank: int | None) -> Path:
    return directory / f"state-{name}{'' if rank is None else f'.rank{rank}'}.safetensors"


def _write(path: Path, state: Mapping[str, Any], world_size: int) -> None:
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            storage = value.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory, such as tied weights.
            tensors[where] = value.clone() if storage in storages else value
            storages.add(storage)
            return {"tensor": where}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{path.name}: keys must be str, got {key!r} in {where or '.'}")
            return {"mapping": {key: plain(v, f"{where}/{key}") for key, v in value.items()}}
        if isinstance(value, (list, tuple)):
            return [plain(item, f"{where}/{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(
            f"{path.name}: {where} must be a tensor, None, bool, int, float, str, list or mapping, "
            f"got {type(value).__name__}"
        )

    record = {"format": FORMAT, "world_size": world_size, "state": plain(state, "")}
    metadata = {"format": "pt", "record": json.dumps(record)}
    write_atomically(path, lambda aside: save_file(tensors, aside, metadata=metadata))


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The state in a file and the number of processes that took part in writing it."""

    def rebuilt(value: Any) -> Any:
        if isinstance(value, list):
            return [rebuilt(item) for item in value]
        if isinstance(value, dict):
            if "tensor" in value:
                # A copy: the file's own memory goes when rotation removes it on a network disk.
                return file.get_tensor(value["tensor"]).clone()
            return {key: rebuilt(item) for key, item in value["mapping"].items()}
        return value

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            if record["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {record['format']!r}")
            return rebuilt(record["state"]), int(record["world_size"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read checkpoint file {path}: {error!r}") from error
