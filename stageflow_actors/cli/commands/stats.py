"""`stageflow stats`: the figures of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stageflow_actors.cli.options import data_option, output_option
from stageflow_actors.cli.output import Column, count, emit, print_facts, print_json, size
from stageflow_actors.core.plural import pluralize

__all__ = ["stats"]


@click.command()
@data_option
@output_option
def stats(data: Path, output: str) -> None:
    """Show figures of a cluster: instances, messages, disk.

    \b
    stageflow stats
    stageflow stats --output json
    """
    from stageflow_actors.runtime.client.attach import attach

    with attach(data) as attached:
        broker = attached.wait(attached.admin.stats(""))
        finished = {} if attached.history is None else attached.history.count()
    queues = broker["queues"]
    figures: dict[str, Any] = {
        "running": attached.live,
        "instances": broker["groups"],
        **{state: sum(queue[state] for queue in queues) for state in ("ready", "leased", "delayed", "dead")},
        "message_bytes": broker["live_bytes"],
        "queues": len(queues),
        "paused": sorted(queue["name"] for queue in queues if queue["state"] == "paused"),
        "actors": sum(queue["consumers"] for queue in queues),
        "busy": sum(queue["busy"] for queue in queues),
        "connections": broker["sessions"],
        "broker_epoch": broker["epoch"],
        "malformed_frames": broker["malformed"],
        "refusing": broker["refusing"],
        "finished": finished,
        "journal_bytes": _bytes_in(attached.data_dir.journal),
        "history_bytes": sum(_bytes_of(path) for path in attached.data_dir.path.glob("history.db*")),
    }
    if output == "json":
        print_json(figures)
    elif output == "csv":
        flat = {name: value for name, value in figures.items() if name not in ("finished", "paused")}
        flat |= {f"finished_{status}": number for status, number in finished.items()}
        emit(
            [{"figure": name, "value": value} for name, value in flat.items()],
            (Column("figure"), Column("value")),
            output,
        )
    else:
        print_facts(
            {
                "cluster": f"{'running' if attached.live else 'at rest'}, {attached.data_dir.path}",
                "live": pluralize(figures["instances"], "instance"),
                "finished": ", ".join(f"{count(number)} {status}" for status, number in sorted(finished.items()))
                or "none",
                "messages": ", ".join(f"{count(figures[s])} {s}" for s in ("ready", "leased", "delayed", "dead"))
                + f" in {pluralize(len(queues), 'queue')}, {size(figures['message_bytes'])}",
                "paused": ", ".join(figures["paused"]),
                "refusing": figures["refusing"],
                "actors": f"{count(figures['actors'])}, {count(figures['busy'])} busy" if attached.live else "",
                "disk": f"journal {size(figures['journal_bytes'])}, history {size(figures['history_bytes'])}",
            }
        )


def _bytes_in(directory: Path) -> int:
    return sum(_bytes_of(path) for path in directory.glob("*.journal"))


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0  # deleted in between
