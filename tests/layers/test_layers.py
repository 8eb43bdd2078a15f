"""Each contract on imports bites: an import that it forbids is planted in a copy, and import-linter names it.

That the real packages keep all contracts is a step of `scripts/test` of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

PLANTED = {
    "layers": [
        ("stageflow_actors/errors.py", "stageflow_actors.definition.ids"),
        ("stageflow_actors/definition/ids.py", "stageflow_actors.core.plan"),
        ("stageflow_actors/core/plan.py", "stageflow_actors.history.rows"),
        ("stageflow_actors/history/rows.py", "stageflow_actors.runtime.config"),
        ("stageflow_actors/runtime/config.py", "stageflow_actors.testing.in_process"),
        ("stageflow_actors/testing/in_process.py", "stageflow_actors.diagnostics.health"),
        ("stageflow_actors/diagnostics/health.py", "stageflow_actors.cli.output"),
    ],
    "processes": [
        ("stageflow_actors/runtime/client/session.py", "stageflow_actors.runtime.node.pool"),
        ("stageflow_actors/runtime/node/pool.py", "stageflow_actors.runtime.worker.actor"),
        ("stageflow_actors/runtime/worker/actor.py", "stageflow_actors.runtime.client.session"),
        ("stageflow_actors/runtime/node_handle.py", "stageflow_actors.runtime.runtime"),
        ("stageflow_actors/runtime/messaging/manifest.py", "stageflow_actors.runtime.node.supervisor"),
        ("stageflow_actors/runtime/zygote/protocol.py", "stageflow_actors.runtime.messaging.manifest"),
        ("stageflow_actors/runtime/ipc/slots.py", "stageflow_actors.runtime.zygote.handle"),
        ("stageflow_actors/runtime/system/processes.py", "stageflow_actors.runtime.ipc.slots"),
    ],
    "above-brokers": [("brokers/stageflow_brokers/memory.py", "stageflow_actors.errors")],
    "pure": [
        ("stageflow_actors/core/envelope.py", "zmq"),
        ("stageflow_actors/definition/stage.py", "subprocess"),
        ("stageflow_actors/history/writer.py", "stageflow_brokers.api"),
    ],
    "composition-root": [
        ("stageflow_actors/runtime/node/supervisor.py", "stageflow_brokers.zeromq.client"),
        ("stageflow_actors/runtime/client/client.py", "stageflow_brokers.journal.journal"),
    ],
    "sans-io": [
        ("brokers/stageflow_brokers/core/queue.py", "time"),
        ("brokers/stageflow_brokers/core/leases.py", "stageflow_brokers.journal.format"),
    ],
    "decisions": [("stageflow_actors/core/routing.py", "random")],
    "journal-bytes": [("brokers/stageflow_brokers/journal/format.py", "stageflow_brokers.core.records")],
    "port-types": [("brokers/stageflow_brokers/types.py", "stageflow_brokers.core.wire")],
    "broker-admin": [("brokers/stageflow_brokers/core/admin.py", "stageflow_brokers.core.machine")],
}
"""What is planted, by the id of the contract that forbids it: (file, module that it then imports)."""

CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
}


def dotted(file: str) -> str:
    return file.removeprefix("brokers/").removesuffix(".py").replace("/", ".")


def lint(tree: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """Check one contract in a copy of the packages."""
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'brokers'}", "COLUMNS": "400"}
    command = [sys.executable, "-c", LINT, "--no-logo", "--no-cache", "--contract", contract]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=100, check=False)


def test_each_contract_is_shown_to_bite() -> None:
    assert set(PLANTED) == set(CONTRACTS)


@pytest.mark.parametrize("contract", list(PLANTED))
@pytest.mark.parametrize("only_for_types", [False, True], ids=["at run time", "for types"])
def test_a_contract_names_each_import_that_it_forbids(contract: str, only_for_types: bool, tmp_path: Path) -> None:
    for folder in ("stageflow_actors", "brokers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, module in PLANTED[contract]:
        line = f"import {module}\n"
        if only_for_types:
            line = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}"
        with (tmp_path / file).open("a") as source:
            source.write(f"\n{line}")
    run = lint(tmp_path, contract)
    assert run.returncode == 1, run.stdout + run.stderr
    for file, module in PLANTED[contract]:
        shown = run.stdout.replace("\n", " ")
        assert f"{dotted(file)} -> {module}" in shown, (file, module, run.stdout)
