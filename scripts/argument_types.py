"""Command lines of the scripts: their parser, and number types that refuse a run of zero trials."""

from __future__ import annotations

import argparse

__all__ = ["above_zero", "from_one", "script_parser", "share"]


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the docstring of the script, as it is."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


def from_one(text: str) -> int:
    """Return a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return number


def above_zero(text: str) -> float:
    """Return a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number


def share(text: str) -> float:
    """Return a number above 0 and up to 1."""
    number = above_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, not {text!r}")
    return number
