"""First guesses: calls that do not fit a signature, and what is to be written instead.

A call of a definition method that Python refuses with a `TypeError` is adapted where its meaning is plain; otherwise
it raises a `WorkflowDefinitionError` that shows the call to write. A call that fits costs nothing here.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from stageflow_actors.definition.handler import default_id
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = [
    "Guess",
    "adapts",
    "branch_arguments",
    "closest",
    "delay_arguments",
    "keyword_arguments",
    "map_arguments",
    "named_handler",
    "parallel_arguments",
]

F = TypeVar("F", bound=Callable[..., Any])

Guess = Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]
"""Returns the arguments that are meant, from those that were given; None if that is not plain."""

_COMMON = {
    "data": "data_dir",
    "data_directory": "data_dir",
    "default_workers": "default_actors",
    "depends_on": "after",
    "max_attempts": "retry",
    "max_retries": "retry",
    "memory": "max_memory",
    "memory_limit": "max_memory",
    "policy": "retry",
    "processes": "actors",
    "retries": "retry",
    "retry_policy": "retry",
    "rollback": "compensation",
    "stage_id": "id",
    "time_limit": "timeout",
    "undo": "compensation",
    "max_workers": "actors",
    "workers": "actors",
}
"""Names of stage options in other systems, and ours."""


def adapts(shape: str, guess: Guess | None = None) -> Callable[[F], F]:
    """Return a decorator for a function of the definition.

    Args:
        shape: The call to write, for errors.
        guess: Called as `guess(*args, **kwargs)` with arguments that do not fit.

    Returns:
        The decorator. The decorated function has the signature of the function.
    """

    def decorate(function: F) -> F:
        takes_id = function.__code__.co_varnames[1:2] == ("id",)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            if takes_id and guess is not None and len(args) > 1 and not isinstance(args[1], str):
                args, kwargs = guess(*args, **kwargs) or (args, kwargs)
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if not _is_of_the_call(error):
                    raise
                problem = str(error)
            meant = None if guess is None else guess(*args, **kwargs)
            if meant is not None:
                try:
                    return function(*meant[0], **meant[1])
                except TypeError as error:
                    if not _is_of_the_call(error):
                        raise
                    problem = str(error)
            unknown = re.search(r"unexpected keyword argument '(\w+)'", problem)
            likely = None if unknown is None else closest(unknown[1], inspect.signature(function).parameters)
            hint = "" if likely is None else f" (did you mean {likely!r}?)"
            options = "" if unknown is None or likely else _options_of(function)
            raise WorkflowDefinitionError(f"{_problem(problem)}{hint}: write {shape}{options}")

        return checked  # type: ignore[return-value]

    return decorate


def named_handler(self: Any, *args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of `("id", handler)` and `(handler, "id")` as `(handler, id="id")`."""
    names = [each for each in args if isinstance(each, str)]
    if len(args) != 2 or len(names) != 1 or "id" in options:
        return None
    (handler,) = (each for each in args if not isinstance(each, str))
    return (self, handler), {**options, "id": names[0]}


def keyword_arguments(
    owner: Any, args: tuple[Any, ...], names: tuple[str, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return positional arguments as those of these names, in order; the first one stays positional."""
    if not 1 < len(args) <= len(names) or any(name in options for name in names[: len(args)]):
        return None
    return (owner, args[0]), {**options, **dict(zip(names[1:], args[1:], strict=False))}


def parallel_arguments(self: Any, *args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments for `([a, b])`, `(a, b)` and `("id", a, b)`."""
    id = options.pop("id", None)
    if id is None and args and isinstance(args[0], str):
        id, args = args[0], args[1:]
    if len(args) == 1 and isinstance(args[0], (list, tuple)):
        args = tuple(args[0])
    if (
        not args
        or "branches" in options
        or not all(callable(each) or hasattr(each, "spec") or hasattr(each, "execute") for each in args)
    ):
        return None
    return (self, id or _free_id(self, "parallel"), list(args)), options


def branch_arguments(self: Any, *args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments for `(selector, arms)`."""
    arms = args[1] if len(args) == 2 else options.get("arms")
    if not args or len(args) > 2 or not callable(args[0]) or not isinstance(arms, Mapping):
        return None
    return (self, _free_id(self, "branch"), args[0]), {**options, "arms": arms}


def map_arguments(self: Any, *args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments for `(handler, over=...)` and `("id", handler, over)`."""
    if len(args) == 1 and not isinstance(args[0], str) and "handler" not in options:
        return (self, options.pop("id", None) or default_id(args[0]) or _free_id(self, "map"), *args), options
    if len(args) == 3 and isinstance(args[0], str) and "over" not in options:
        return (self, *args[:2]), {**options, "over": args[2]}
    return None


def delay_arguments(self: Any, *args: Any, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments for `(seconds)`."""
    if len(args) == 1 and not isinstance(args[0], str) and not options:
        return (self, _free_id(self, "delay"), *args), {}
    if not args and set(options) == {"duration"}:
        return (self, _free_id(self, "delay")), options
    return None


def _options_of(function: Callable[..., Any]) -> str:
    """Return the keyword arguments that a function takes, for an error."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind in kinds and each.name not in ("self", "cls")]
    return f"; the arguments are {', '.join(names)}" if names else ""


def _free_id(workflow: Any, kind: str) -> str:
    """Return an id for a step without one, by its place."""
    return f"{kind}-{len(workflow.steps) + 1}"


def _is_of_the_call(error: TypeError) -> bool:
    """Return True if the arguments did not fit; False for an error inside of the function."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return (
        last is not None
        and last.tb_frame.f_code.co_name in _WRAPPERS
        and "definition" in last.tb_frame.f_code.co_filename
    )


_WRAPPERS = ("checked", "constructed")
"""The functions that call a decorated function of the definition."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """Return the name among `known` that `name` is most likely a misspelling of, or None if none is that close."""
    import difflib  # only errors need it

    known = list(known)
    if _COMMON.get(name) in known:
        return _COMMON[name]
    plain = {each.replace("_", ""): each for each in known}
    found = difflib.get_close_matches(name.replace("_", "").lower(), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def _problem(text: str) -> str:
    """Return the message of a `TypeError` of a call without `self` in its counts."""
    text = text.replace("__init__()", "()").replace(".()", "()")
    counted = re.search(r"takes (?:from \d+ to )?(\d+) positional arguments? but (\d+)", text)
    if counted is not None:
        return f"{text[: counted.start()]}got more arguments than it takes".replace("() got", "(...) got")
    return re.sub(r"\bpositional ", "", text).replace("()", "(...)")
