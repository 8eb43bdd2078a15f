"""Numbers on the command lines of these scripts: a run that would try nothing is refused, not called well."""

from __future__ import annotations

import argparse

__all__ = ["above_zero", "from_one", "share"]


def from_one(text: str) -> int:
    """A whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return number


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def share(text: str) -> float:
    """A number above 0, up to 1."""
    number = above_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, not {text!r}")
    return number
