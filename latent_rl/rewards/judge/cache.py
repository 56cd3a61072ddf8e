"""Judgements on disk: one small file each, written aside and renamed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["JudgementCache"]

logger = logging.getLogger(__name__)

FORMAT = 1
SHRINK_TO = 0.9


class JudgementCache:
    """Values under hex keys in `directory/ab/abcd....json`.

    Several processes may read and write it at once: a file appears whole or not at all, and two
    that write the same key write the same thing. A damaged file counts as absent. Above `max_bytes`
    the files unused for longest are deleted, down to nine tenths; the size is taken when the cache
    is opened and each time this process has added a tenth of the limit, so several processes
    together may pass the limit by a tenth each.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.directory.mkdir(parents=True, exist_ok=True)
        self._added = 0
        self.shrink()

    def get(self, key: str) -> Any | None:
        """The value under a key, or None."""
        path = self._path(key)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT or record["key"] != key:
                return None
            value = record["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning("judge cache: %s is damaged and will be written anew", path)
            return None
        with contextlib.suppress(OSError):  # read-only caches have no order of use
            os.utime(path)
        return value

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value under a key. A disk that is full or read-only is warned of: judgements
        are then made again, which costs money but changes no result."""
        path = self._path(key)
        text = json.dumps({"format": FORMAT, "key": key, "value": value})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(aside).replace(path)
            except BaseException:
                Path(aside).unlink(missing_ok=True)
                raise
        except OSError as error:
            logger.warning("judge cache: cannot write %s: %s", path, error)
            return
        self._added += len(text)
        if self._added > self.max_bytes // 10:
            self.shrink()

    def shrink(self) -> None:
        """Delete the files unused for longest if there are more than `max_bytes`."""
        self._added = 0
        files = []
        for path in self.directory.glob("??/*"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            if total <= SHRINK_TO * self.max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"
