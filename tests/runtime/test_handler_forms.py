"""Each form of a handler works in real workers, from a module and from a script, as it does in a unit test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import handler_forms
import pytest

from stageflow_actors.testing import run

FIXTURES = Path(handler_forms.__file__).parent


def expected() -> list[Any]:
    stages: dict[str, Any] = {name: ["compensated", data, None] for name, (_, data) in handler_forms.FORMS.items()}
    undone = ("constructed", "constructed-object", *(name for name in stages if name.startswith("undone-by-")))
    for name in stages.keys() - set(undone):
        stages[name][0] = "completed"
    stages["fails"] = ["failed", None, "ValueError: after all forms"]
    return ["compensated", "ValueError: after all forms", stages, handler_forms.UNDONE]


def test_the_table_has_many_forms() -> None:
    assert len(handler_forms.FORMS) >= 40


def test_each_form_works_in_a_unit_test() -> None:
    result = run(handler_forms.workflow(), {"name": "Ada"}, services=handler_forms.SERVICES)
    stages = {stage.stage_id: [stage.status.value, stage.data, stage.error] for stage in result.stages}
    assert [result.status.value, result.error, stages, result.context["undone"]] == expected()


NOTEBOOK = """import sys
code = open("program.py").read().replace('if __name__ == "__main__":', "if False:")
exec(compile(code, "/tmp/ipykernel_1/17.py", "exec"), globals())
exec(compile("main('data')", "/tmp/ipykernel_1/18.py", "exec"), globals())
"""
"""The program as cells of a notebook, which have no file."""


@pytest.mark.parametrize(
    "command", [["-c", "import handler_forms; handler_forms.main('data')"], ["script"], ["notebook"]]
)
def test_each_form_works_in_workers(command: list[str], tmp_path: Path) -> None:
    if command in (["script"], ["notebook"]):
        (tmp_path / "program.py").write_text(Path(handler_forms.__file__).read_text("utf-8"))
        command = ["program.py", "data"] if command == ["script"] else ["-c", NOTEBOOK]
    else:
        command = ["-c", f"import sys; sys.path.insert(0, {str(FIXTURES)!r}); {command[1]}"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    status, error, stages, undone = json.loads(done.stdout)
    assert stages == expected()[2]
    assert [status, error, undone] == [expected()[0], expected()[1], expected()[3]]
