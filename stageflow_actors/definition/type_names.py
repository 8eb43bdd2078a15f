"""Names of classes in errors: with their module where two classes have the same name."""

from __future__ import annotations

__all__ = ["distinct_names"]


def distinct_names(wanted: type, given: type) -> tuple[str, str]:
    """Return the names of two classes, such that they differ if the classes do."""
    if wanted is given or wanted.__name__ != given.__name__:
        return wanted.__name__, given.__name__
    names = tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in (wanted, given))
    if names[0] != names[1]:
        return names[0], names[1]
    return names[0], f"another class {names[1]} (the code that defines it was run twice: run the workflow's again, too)"
