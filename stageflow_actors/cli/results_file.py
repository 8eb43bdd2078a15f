"""The results of `stageflow run`: counted for the summary, and written to the file of `--results`.

The file appears under its name complete or not at all: it is written as NAME.part and renamed at the end. A pipe or a
device is written directly, because a rename would replace it by a file.
"""

from __future__ import annotations

import os
import stat
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stageflow_actors.core.result import WorkflowResult

__all__ = ["ResultsFile", "Tally", "is_special"]


class Tally:
    """Counts the outcomes of the lines. Instances that ended before `since` (Unix epoch, seconds) count as skipped."""

    def __init__(self, since: float) -> None:
        self._since = since
        self.statuses: Counter[str] = Counter()
        self.skipped = 0
        self.refused = 0

    @property
    def results(self) -> int:
        """Number of instances that have ended, in this run or before."""
        return sum(self.statuses.values())

    @property
    def done(self) -> int:
        """Number of instances that ended in this run."""
        return self.results - self.skipped

    @property
    def seen(self) -> int:
        """Number of lines that are finished, refused ones included."""
        return self.results + self.refused

    @property
    def well(self) -> bool:
        """True if every line became an instance that completed."""
        return not self.refused and set(self.statuses) <= {"completed"}

    def add(self, result: WorkflowResult[Any]) -> None:
        """Count the result of one instance."""
        self.statuses[result.status.value] += 1
        if result.status.terminal and result.finished_at < self._since:
            self.skipped += 1


class ResultsFile:
    """Writes one JSON object per instance. The path `-` is stdout.

    At the end, call one method: `finish` renames NAME.part to NAME, `keep` keeps NAME.part, `discard` removes it.

    Raises `click.UsageError` for a file that cannot be written, or that would overwrite the input `source`.
    """

    def __init__(self, path: str, source: str) -> None:
        self._file: IO[bytes]
        self._path: Path | None = None
        self._empty = True
        self._kept = self._special = False
        if path == "-":
            if sys.stdout is None:
                raise click.UsageError("--results - is standard output, and it is closed")
            self._file = sys.stdout.buffer
            return
        self._special = is_special(path)
        if self._special:
            self._file = _written(path, path)
            return
        # A link, such as /dev/stdout, stands for the file behind it.
        self._path = Path(os.path.realpath(path) if os.path.islink(path) else path)
        if self._path.is_dir():
            raise click.UsageError(f"--results {path} is a directory; name a file in it")
        # One name for all runs: the next run overwrites the remains of a killed one.
        self._part = self._path.with_name(f"{self._path.name}.part")
        for each in (self._path, self._part):
            if _is_input(each, source):
                raise click.UsageError(f"--results {path} would overwrite the input {each}: name another file")
        self._file = _written(self._part, path)

    def write(self, result: WorkflowResult[Any], context: Any) -> None:
        """Write the line of one instance; `context` in plain values."""
        import orjson

        line = {
            "instance_id": result.instance_id,
            "status": result.status.value,
            "error": result.error,
            "context": context,
        }
        self._empty = False
        self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS))

    def finish(self) -> None:
        """Complete the file and give it its name."""
        self._file.flush()
        if self._path is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self._path)

    def keep(self) -> str | None:
        """Keep the results of an interrupted run as NAME.part, and return a notice; an earlier file stays as it is."""
        if self._empty:
            self.discard()
            return None
        self._file.flush()
        if self._path is None:
            return None
        self._file.close()
        self._kept = True
        kept = f"the results so far are in {self._part}"
        return f"{kept}; {self._path} is unchanged" if self._path.exists() else kept

    def discard(self) -> None:
        """Remove NAME.part; an earlier file stays as it is. Does nothing after `keep`."""
        if self._path is not None and not self._kept:
            self._file.close()
            self._part.unlink(missing_ok=True)
        elif self._special:
            with suppress(OSError):  # `write` has raised the error already
                self._file.close()


def is_special(path: str) -> bool:
    """True if `path` exists and is neither a regular file nor a directory."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _written(path: Path | str, named: str) -> IO[bytes]:
    try:
        return open(path, "wb")
    except OSError as error:
        raise click.UsageError(f"--results {named} cannot be written: {error.strerror}") from None


def _is_input(path: Path, source: str) -> bool:
    try:
        read = os.fstat(0) if source == "-" else os.stat(source)
        # A terminal, a pipe or /dev/null holds no data that could be lost.
        return stat.S_ISREG(read.st_mode) and os.path.samestat(read, path.stat())
    except OSError:
        return False
