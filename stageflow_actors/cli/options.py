"""Options that several commands share: defined once, they read and behave the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = [
    "DEFAULT_DATA",
    "check_confirmed",
    "data_option",
    "json_option",
    "output_option",
    "runtime_data_option",
    "wait_options",
    "yes_option",
]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_DATA = "stageflow-data"


class _DataPath(click.Path):
    """A directory that exists or can be made.

    An empty name, as of a shell variable that is not set, would mean the working directory: a cluster would fill it,
    and `run --fresh` would rename it.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the name is empty: name a directory", param, ctx)
        return super().convert(value, param, ctx)


DATA_PATH = _DataPath(file_okay=False, path_type=Path)


def data_option(command: F) -> F:
    """`--data DIR`: the data directory, as `data: Path`."""
    return click.option(
        "--data",
        envvar="STAGEFLOW_DATA",
        default=DEFAULT_DATA,
        show_default=True,
        show_envvar=True,
        metavar="DIR",
        type=DATA_PATH,
        help="Data directory of the cluster.",
    )(command)


def runtime_data_option(command: F) -> F:
    """`--data DIR` of a command that takes a Runtime, as `data: Path | None`."""
    return click.option(
        "--data",
        envvar="STAGEFLOW_DATA",
        default=None,
        show_envvar=True,
        metavar="DIR",
        type=DATA_PATH,
        help=f"Data directory of the cluster.  [default: that of the Runtime, or {DEFAULT_DATA}]",
    )(command)


def output_option(command: F) -> F:
    """`--output table|json|csv`, as `output: str`."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="Format: a table for people, JSON for programs, CSV for spreadsheets.",
    )(command)


def json_option(command: F) -> F:
    """`--output table|json`, as `output: str`."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="Format: text for people, JSON for programs.",
    )(command)


def wait_options(command: F) -> F:
    """`--wait` and `--timeout SECONDS`, as `wait: bool` and `timeout: float | None`."""
    wait = click.option("--wait", is_flag=True, help="Wait until the instance ends and print its result as JSON.")
    timeout = click.option(
        "--timeout",
        default=None,
        type=click.FloatRange(0),
        metavar="SECONDS",
        help="With --wait: fail after so many seconds; the instance goes on.  [default: no limit]",
    )
    return wait(timeout(command))


def yes_option(command: F) -> F:
    """`--yes`, as `yes: bool`; see `check_confirmed`."""
    return click.option("--yes", is_flag=True, help="Do not ask for confirmation.")(command)


def check_confirmed(action: str, yes: bool) -> None:
    """Ask the user to confirm `action`. Raises `click.UsageError` without `--yes` and without a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{action}: without a terminal, confirm with --yes")
    click.confirm(f"{action}?", abort=True, err=True)
