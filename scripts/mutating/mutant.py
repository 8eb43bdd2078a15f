"""One mistake, where it is planted, and the tests that die of it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`edits` are (file, text, replacement), each text found exactly once; `killers` are test ids."""

    name: str
    mistake: str
    edits: tuple[tuple[str, str, str], ...]
    killers: tuple[str, ...]
