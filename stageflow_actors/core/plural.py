"""Numbers of things, as they are told to people."""

from __future__ import annotations

__all__ = ["pluralize"]


def pluralize(number: int, noun: str, nouns: str = "") -> str:
    """`1 message`, `12,345 messages`; `nouns` is the plural where an s does not make it."""
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"
