"""A function that a notebook cell defines again replaces the earlier one; a duplicate in a module is a mistake."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from stageflow_actors import Workflow, WorkflowDefinitionError
from stageflow_actors.testing import run


class Notebook:
    def __init__(self, form: str) -> None:
        self.form, self.count = form, 0
        self.names: dict[str, Any] = {"__name__": "__main__", "Workflow": Workflow}
        self.cell("flow = Workflow('flow')")

    def cell(self, code: str, again: bool = False) -> None:
        self.count += not again
        exec(compile(code, self.form.format(self.count), "exec"), self.names)

    @property
    def flow(self) -> Workflow[Any]:
        return self.names["flow"]  # type: ignore[no-any-return]


FORMS = [
    "/tmp/ipykernel_71/{}.py",
    "<ipython-input-{}-abc>",
    "<stdin>",
    "<python-input-{}>",
    "/tmp/__marimo__cell_{}.py",
]


@pytest.fixture(params=FORMS)
def notebook(request: pytest.FixtureRequest) -> Notebook:
    return Notebook(request.param)


PAY = "@flow.stage\ndef pay(order): return {}\n"
REFUND = "@pay.compensation\ndef refund(order): order['undone'] = {}\n"


def test_a_stage_defined_again_replaces_the_first_in_its_place(
    notebook: Notebook, caplog: pytest.LogCaptureFixture
) -> None:
    notebook.cell(PAY.format(1))
    notebook.cell("@flow.stage\ndef ship(order): return 'shipped'")
    for value in (2, 3):
        notebook.cell(PAY.format(value))
    assert [(stage.stage_id, stage.data) for stage in run(notebook.flow, {}).stages] == [
        ("pay", 3),
        ("ship", "shipped"),
    ]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["stage 'pay' of workflow 'flow' is defined again: this definition replaces the earlier one"]


def test_the_same_cell_may_be_run_again(notebook: Notebook) -> None:
    notebook.cell(PAY.format(1))
    notebook.cell(PAY.format(1), again=True)
    assert len(notebook.flow.stages) == 1


def test_the_options_of_the_later_definition_hold(notebook: Notebook) -> None:
    notebook.cell(PAY.format(1))
    notebook.cell("@flow.stage(timeout=5)\ndef pay(order): return 1")
    assert notebook.flow.stages[0].timeout == 5


def test_a_compensation_stays_and_is_replaced_by_its_next_definition(notebook: Notebook) -> None:
    notebook.cell(PAY.format(1))
    notebook.cell(REFUND.format(1))
    notebook.cell("flow.add_stage(lambda order: 1 / 0, id='fail')")
    notebook.cell(PAY.format(2))
    assert run(notebook.flow, {}).context == {"undone": 1}
    notebook.cell(REFUND.format(2))
    assert run(notebook.flow, {}).context == {"undone": 2}
    notebook.cell(REFUND.format(3))
    assert run(notebook.flow, {}).context == {"undone": 3}
    notebook.cell(PAY.format(3) + REFUND.format(4))
    assert run(notebook.flow, {}).context == {"undone": 4}


@pytest.mark.parametrize(
    "code",
    [
        "@flow.stage(id='pay')\ndef other(order): pass",
        "flow.add_delay('pay', 1)",
        "flow.add_parallel('both', [pay, lambda order: 1])",
        "flow.add_stage(pay)",
    ],
)
def test_anything_else_of_a_taken_id_is_refused(code: str) -> None:
    notebook = Notebook(FORMS[0])
    notebook.cell(PAY.format(1))
    with pytest.raises(WorkflowDefinitionError, match=r"already has a stage .pay.|has a lambda"):
        notebook.cell(code)


def test_a_cell_that_defines_a_name_twice_is_refused() -> None:
    notebook = Notebook(FORMS[0])
    with pytest.raises(WorkflowDefinitionError, match="already has a stage 'pay'"):
        notebook.cell(PAY.format(1) + PAY.format(2))


def test_a_module_that_defines_a_name_twice_is_refused() -> None:
    names: dict[str, Any] = {"Workflow": Workflow}
    exec(compile("flow = Workflow('flow')\n" + PAY.format(1), "orders.py", "exec"), names)
    with pytest.raises(WorkflowDefinitionError, match="already has a stage 'pay'"):
        exec(compile(PAY.format(2), "orders.py", "exec"), names)


def test_a_class_defined_again_replaces_the_first(notebook: Notebook) -> None:
    for value in (1, 2):
        notebook.cell(f"class Pay:\n  def execute(self, order): return {value}\nflow.add_stage(Pay)")
    assert [stage.data for stage in run(notebook.flow, {}).stages] == [2]
