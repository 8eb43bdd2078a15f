"""`stageflow scale` and `stageflow health`: a running cluster as a whole."""

from __future__ import annotations

from pathlib import Path

import click

from stageflow_actors.cli.options import data_option

__all__ = ["health", "scale"]


@click.command()
@click.argument("workflow")
@click.argument("stage")
@click.argument("actors", type=click.IntRange(0, 1_000), metavar="N")
@data_option
def scale(workflow: str, stage: str, actors: int, data: Path) -> None:
    """Run STAGE of WORKFLOW with N worker processes from now on, until the cluster is stopped.

    Of a map stage, what handles its items. Fewer: those that are idle end first, and busy ones when they are done.

    \b
    stageflow scale orders process-payment 8
    """
    from stageflow_actors.runtime.runtime import Runtime

    with Runtime.connect(data) as client:
        client.scale(workflow, stage, actors)


@click.command()
@click.option("--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@data_option
def health(output: str, data: Path) -> int:
    """Whether broker, coordinator and all pools are well: exit code 0, or 1 and a line for each fault.

    \b
    stageflow health
    stageflow health --output json
    """
    from stageflow_actors.cli.output import print_json
    from stageflow_actors.diagnostics.health import examine

    faults = examine(data)
    if output == "json":
        print_json({"healthy": not faults, "faults": [{"part": f.part, "fault": f.text} for f in faults]})
    elif faults:
        for fault in faults:
            click.echo(f"{fault.part}: {fault.text}")
    else:
        click.echo("well")
    return 1 if faults else 0
