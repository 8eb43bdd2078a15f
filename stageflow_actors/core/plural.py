"""`pluralize`: a number with its noun, for messages."""

from __future__ import annotations

__all__ = ["pluralize"]


def pluralize(number: int, noun: str, nouns: str = "") -> str:
    """Return `1 message` or `12,345 messages`; `nouns` is an irregular plural."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"
