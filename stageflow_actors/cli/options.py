"""Options that several commands share. Defined once, so that they read and behave the same everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["DATA_PATH", "DEFAULT_DATA", "confirmed", "data_option", "output_option"]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_DATA = "stageflow-data"


class _DataPath(click.Path):
    """A directory that is there or can be made. An empty name, as of a variable that is not set, would be the working
    directory, which is filled, or with --fresh set aside."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: name a directory", param, ctx)
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
        help="The data directory of the cluster.",
    )(command)


def output_option(command: F) -> F:
    """`--output table|json|csv`, as `output: str`."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="For people, for programs, for spreadsheets.",
    )(command)


def confirmed(what: str, yes: bool) -> None:
    """Asks whether `what` is to be done; without a terminal `--yes` has to say so."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{what}: say --yes to do it without being asked")
    click.confirm(f"{what}?", abort=True, err=True)
