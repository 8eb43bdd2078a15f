"""A module that starts a Runtime when it is imported is refused in one sentence; a script needs no guard."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stageflow_actors import Runtime, Workflow, WorkflowDefinitionError
from stageflow_actors.runtime.system.start_guard import importing_for

STAGES = """
from stageflow_actors import Runtime, Workflow
flow = Workflow("flow")
@flow.stage
def pay(order): return 1
with Runtime(flow, data_dir="data") as runtime:
    print(runtime.execute(flow, {}, timeout=30).status)
"""

ADVICE = "put the code that starts the Runtime under `if __name__ == '__main__':`"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["stages", "shop"])
def test_a_module_that_workers_import_may_not_start_a_runtime_at_its_import(tmp_path: Path, module: str) -> None:
    if module == "shop":
        (tmp_path / "shop").mkdir()
        (tmp_path / "shop" / "stages.py").write_text("def pay(order): return 1\n")
        code = STAGES.replace("@flow.stage\ndef pay(order): return 1", "from shop.stages import pay\nflow.stage(pay)")
        (tmp_path / "shop" / "__init__.py").write_text(code)
        file = "__init__.py"
    else:
        (tmp_path / "stages.py").write_text(STAGES)
        file = "stages.py"
    (tmp_path / "main.py").write_text(f"import {module}\n")
    done = run(tmp_path, "main.py")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"module {module} ({file}, line 6) starts a Runtime when it is imported" in last
    assert last.endswith(ADVICE)
    assert not (tmp_path / "data").exists()


def test_the_command_line_refuses_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    (tmp_path / "in.jsonl").write_text("{}\n")
    done = run(
        tmp_path,
        "-c",
        "from stageflow_actors.cli.main import main; raise SystemExit(main())",
        "run",
        "stages.py:flow",
        "--input",
        "in.jsonl",
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "stages cannot be imported: module stages (stages.py, line 6) starts a Runtime" in done.stderr
    assert ADVICE in done.stderr


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    assert run(tmp_path, "stages.py").stdout == "completed\n"


def test_a_worker_that_imports_a_module_starts_no_runtime(tmp_path: Path) -> None:
    runtime = Runtime(Workflow("flow").add_stage(print), data_dir=tmp_path / "data")
    with importing_for("a worker"), pytest.raises(WorkflowDefinitionError, match="and a worker imports it for"):
        runtime.start()
    assert not (tmp_path / "data").exists()
