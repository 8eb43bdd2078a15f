"""The map for contributors is true: each path that it names exists, and each name is defined in the file before it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((ROOT / ".github").glob("*.md"))
PATH = re.compile(r"`((?:stageflow_actors|brokers|tests|examples|scripts)/[\w./-]*)`")
NAMES = re.compile(r"`((?:stageflow_actors|brokers)/[\w./]+\.py)`(?:,\s+| \()((?:`\w+`(?:,\s+)?)+)")

RULES = 14
GLOSSARY = """
    workflow stage instance context envelope queue delivery lease settle actor compensation pool gather group epoch node
    zygote broker coordinator journal history step
""".split()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_path_exists(document: Path) -> None:
    missing = [path for path in PATH.findall(document.read_text("utf-8")) if not (ROOT / path).exists()]
    assert missing == []


def test_each_name_is_defined_in_the_file_that_it_is_said_of() -> None:
    text = (ROOT / ".github/ARCHITECTURE.md").read_text("utf-8")
    named = [(file, name) for file, names in NAMES.findall(text) for name in re.findall(r"`(\w+)`", names)]
    assert len(named) >= 20
    absent = [
        (file, name)
        for file, name in named
        if not re.search(rf"^\s*(?:class|def|async def) {name}\b|^{name}\b", (ROOT / file).read_text("utf-8"), re.M)
    ]
    assert absent == []


def test_the_rules_and_the_glossary_are_complete() -> None:
    text = (ROOT / ".github/ARCHITECTURE.md").read_text("utf-8")
    rules = text.partition("## The rules")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", rules, re.M)] == list(range(1, RULES + 1))
    words = re.findall(r"^\| ([a-z ]+) \|", text.partition("## Glossary")[2], re.M)
    assert [word for word in GLOSSARY if word not in words] == []


def test_ten_typical_changes_have_a_place() -> None:
    text = (ROOT / ".github/ARCHITECTURE.md").read_text("utf-8")
    table = text.partition("## Where do I change")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| (?!to …|---)", table, re.M)) >= 10
