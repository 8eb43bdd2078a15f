"""`stageflow graph`: a workflow as Mermaid text."""

from __future__ import annotations

import click

__all__ = ["graph"]


@click.command()
@click.argument("target", metavar="MODULE:WORKFLOW")
def graph(target: str) -> None:
    """Print a workflow as a Mermaid graph.

    GitHub, GitLab and many editors draw Mermaid text. MODULE is an importable module or a path to a .py file. The
    module is imported; no stage runs.

    \b
    stageflow graph orders.py:orders
    stageflow graph orders.py:orders > orders.mmd
    """
    from stageflow_actors.cli.importer import load
    from stageflow_actors.definition.mermaid import mermaid
    from stageflow_actors.definition.workflow import Workflow

    workflow = load(target, Workflow)
    workflow.validate({name for stage in workflow.stages for name in stage.services | stage.compensation_services})
    click.echo(mermaid(workflow), nl=False)
