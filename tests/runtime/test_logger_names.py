"""The product's loggers and the loggers of user code never share a parent below the root."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

import stageflow_actors

OURS = ("stageflow_actors.", "stageflow_brokers.")


def product_loggers() -> set[str]:
    """The names that the product's modules pass to `getLogger` as literals."""
    found = set()
    for file in Path(stageflow_actors.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "logging.getLogger":
                continue
            if isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return found


def test_every_logger_of_the_product_is_below_its_package() -> None:
    names = product_loggers()
    assert len(names) >= 8
    assert [name for name in names if not name.startswith(OURS)] == []


@pytest.mark.parametrize("workflow", ["pool", "worker", "node", "supervisor", "events", "testing"])
def test_a_workflow_of_any_name_shares_no_logger_with_the_product(workflow: str) -> None:
    ancestors = set()
    logger: logging.Logger | None = logging.getLogger(f"stageflow.{workflow}.stage")
    while logger is not None and logger is not logging.root:
        ancestors.add(logger.name)
        logger = logger.parent
    ours = product_loggers()
    assert not ancestors & ours
    assert not [name for name in ours if any(name.startswith(f"{own}.") for own in ancestors)]
