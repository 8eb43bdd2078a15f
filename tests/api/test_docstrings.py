"""`help()` is enough: each public name describes its parameters, its result and its errors, and each example runs.

Docstrings have Google-style sections (`Args:`, `Attributes:`, `Returns:`, `Raises:`, `Example:` …). `BAD` shows that
the checks can fail: docstrings with one fault each.
"""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import enum
import importlib
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import stageflow_actors
import stageflow_actors.errors
import stageflow_actors.events
import stageflow_actors.testing

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["stageflow_actors", "stageflow_actors.events", "stageflow_actors.testing", "stageflow_brokers.api"]

MADE_BY_STAGEFLOW = frozenset({"Client", "Instance", "StageCall", "StageContext", "WorkflowResult"})
"""Classes whose constructor users do not call: their docstring describes no parameters."""

MIN_DOCSTRING_EXAMPLES = 25
MIN_EXAMPLES = 40
MAX_FIRST_LINE = 79

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")
NAMED = ("Args", "Attributes", "Raises")
"""Sections whose entries have the form `name: description`."""


class Doc:
    """A docstring, divided into its sections."""

    def __init__(self, text: str) -> None:
        self.text = inspect.cleandoc(text)
        lines = self.text.splitlines() or [""]
        self.first = lines[0]
        self.body: list[str] = []
        self.sections: dict[str, list[str]] = {}
        self.faults: list[str] = []
        current = self.body
        for line in lines:
            heading = re.fullmatch(r"([A-Z][a-z]+):", line)
            if heading is None:
                if line and not line.startswith(" ") and current is not self.body:
                    self.faults.append(f"text after a section is not indented: {line!r}")
                current.append(line)
                continue
            name = heading.group(1)
            if name not in SECTIONS:
                self.faults.append(f"there is no section {name!r}, only {', '.join(SECTIONS)}")
            if name in self.sections:
                self.faults.append(f"section {name!r} stands twice")
            current = self.sections.setdefault(name, [])

    def entries(self, section: str) -> dict[str, str]:
        """Return the entries `name: description` of a section, without stars and types in brackets."""
        found: dict[str, str] = {}
        name = ""
        for line in textwrap.dedent("\n".join(self.sections.get(section, []))).splitlines():
            if not line.strip():
                continue
            if line.startswith(" "):
                found[name] = f"{found.get(name, '')} {line.strip()}"
                continue
            entry = re.fullmatch(r"\*{0,2}([A-Za-z_][\w.]*)(?: \([^)]*\))?:\s*(.*)", line)
            if entry is None:
                self.faults.append(f"{section} has a line that is no entry 'name: description': {line!r}")
                continue
            name = entry.group(1)
            found[name] = entry.group(2)
        return found


class Entry:
    """One public object whose docstring is checked."""

    def __init__(self, name: str, value: Any, owner: type[Any] | None = None) -> None:
        self.name = name
        self.value = value
        self.owner = owner
        plain = getattr(value, "__func__", value)
        self.doc = Doc(inspect.getdoc(plain) or "")

    def faults(self) -> list[str]:
        """Return what the docstring lacks or says wrongly; empty if it is complete."""
        doc = self.doc
        if not doc.text:
            return ["there is no docstring"]
        found = []
        if len(doc.first) > MAX_FIRST_LINE:
            found.append(f"the first line has {len(doc.first)} characters, more than {MAX_FIRST_LINE}")
        if not doc.first.endswith("."):
            found.append(f"the first line does not end with a period: {doc.first!r}")
        found += [f"section {name} is empty" for name, lines in doc.sections.items() if not any(map(str.strip, lines))]
        if inspect.isclass(self.value):
            found += self._class_faults(self.value)
        elif not isinstance(self.value, property) and not inspect.ismodule(self.value):
            found += self._function_faults(getattr(self.value, "__func__", self.value))
        for section in NAMED:
            bare = [name for name, text in doc.entries(section).items() if not text]
            found += [f"{name} under {section} is not described" for name in bare]
        found += [f"Raises names {name}, no exception" for name in doc.entries("Raises") if not _is_error(name)]
        found += self._example_faults()
        return found + doc.faults

    def _class_faults(self, kind: type[Any]) -> list[str]:
        given, held = set(self.doc.entries("Args")), set(self.doc.entries("Attributes"))
        if issubclass(kind, enum.Enum):
            return _difference("member", set(kind.__members__), held, "Attributes")
        if issubclass(kind, msgspec.Struct):
            return _difference("field", set(kind.__struct_fields__), given | held, "Args or Attributes")
        if dataclasses.is_dataclass(kind):
            fields = {field.name for field in dataclasses.fields(kind)}
            return _difference("field", fields, given | held, "Args or Attributes")
        unknown = [name for name in held if not _has(kind, name)]
        found = [f"Attributes names {name}, which {kind.__name__} does not have" for name in unknown]
        if _is_protocol(kind) or kind.__name__ in MADE_BY_STAGEFLOW:
            return found + [f"Args names {name}, and users do not call the constructor" for name in given]
        init = kind.__init__
        if not _is_ours(init):
            return found + [f"Args names {name}, and there is no constructor of its own" for name in given]
        return found + _difference("parameter", set(parameters_of(init)), given, "Args")

    def _function_faults(self, function: Callable[..., Any]) -> list[str]:
        described = set(self.doc.entries("Args"))
        found = _difference("parameter", set(parameters_of(function)), described - options_of(function), "Args")
        returned = inspect.signature(function).return_annotation
        returns = returned not in (None, "None", "NoReturn", "Never", inspect.Signature.empty)
        result = "Returns" in self.doc.sections or "Yields" in self.doc.sections
        if returns and not result and returned != "Future[None]":
            found.append(f"returns {returned} and has no section Returns")
        if result and not returns:
            found.append("has a section Returns, and returns nothing")
        return found

    def _example_faults(self) -> list[str]:
        found = []
        elsewhere = [self.doc.body, *(lines for name, lines in self.doc.sections.items() if name != "Example")]
        if any(">>>" in line for lines in elsewhere for line in lines):
            found.append("an example stands outside of the section Example")
        if "Example" in self.doc.sections:
            steps = self.steps()
            if not any(step.want or step.source.startswith("assert ") for step in steps):
                found.append("the example compares nothing: let it print a result or assert one")
        return found

    def steps(self) -> list[doctest.Example]:
        """Return the statements of the example, each with the output that is expected."""
        text = textwrap.dedent("\n".join(self.doc.sections.get("Example", [])))
        return doctest.DocTestParser().get_examples(text, self.name)

    def run_example(self) -> str:
        """Run the example and return what doctest reports of failures; empty if all is as written."""
        test = doctest.DocTest(self.steps(), {"__name__": "__main__"}, self.name, None, None, self.doc.text)
        report: list[str] = []
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=report.append)
        return "".join(report)


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that a caller may give."""
    found = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in found if not name.startswith("_")]


def options_of(function: Callable[..., Any]) -> set[str]:
    """Return the keys of the typed dict that `**options: Unpack[Options]` names; a docstring may describe them."""
    found: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        named = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
        if parameter.kind is parameter.VAR_KEYWORD and named is not None:
            found |= set(vars(sys.modules[function.__module__])[named.group(1)].__annotations__)
    return found


def _difference(what: str, real: set[str], described: set[str], section: str) -> list[str]:
    missing = [f"{what} {name} is not described under {section}" for name in sorted(real - described)]
    return missing + [f"{section} names {name}, and there is no such {what}" for name in sorted(described - real)]


def _is_ours(function: Any) -> bool:
    module = getattr(function, "__module__", "") or ""
    return module.partition(".")[0] in ("stageflow_actors", "stageflow_brokers", __name__.partition(".")[0])


def _is_protocol(kind: type[Any]) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _has(kind: type[Any], name: str) -> bool:
    ours = [base for base in kind.__mro__ if _is_ours(base)]
    return hasattr(kind, name) or any(
        name in inspect.get_annotations(base) or f"self.{name}" in inspect.getsource(base) for base in ours
    )


def _is_error(name: str) -> bool:
    found: Any = getattr(builtins, name, None) or getattr(stageflow_actors.errors, name, None)
    for module in ("stageflow_brokers.errors", "stageflow_brokers.errors", "msgspec"):
        if found is None and module in sys.modules:
            found = getattr(sys.modules[module], name.removeprefix("msgspec."), None)
    return isinstance(found, type) and issubclass(found, BaseException)


def members_of(kind: type[Any]) -> Iterator[tuple[str, Any]]:
    """Return the public methods and properties of a class, those of our own base classes included."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if not _is_ours(base):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen or isinstance(value, type):
                continue
            if isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value):
                seen.add(name)
                yield name, value


def public_entries() -> list[Entry]:
    """Return every public module, class, function, method and property, each once."""
    found: dict[str, Entry] = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        found[module_name] = Entry(module_name, module)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                found[f"{module_name}.{name}"] = Entry(f"{module_name}.{name}", value)
                for member, kept in members_of(value):
                    found[f"{module_name}.{name}.{member}"] = Entry(f"{module_name}.{name}.{member}", kept, value)
            elif inspect.isfunction(value):
                found[f"{module_name}.{name}"] = Entry(f"{module_name}.{name}", value)
    return list(found.values())


ENTRIES = public_entries()
EXAMPLES = list({entry.doc.text: entry for entry in reversed(ENTRIES) if "Example" in entry.doc.sections}.values())
"""Each once: `Runtime` inherits the methods of `Client`."""


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_docstring_describes_each_parameter_the_result_and_the_errors(entry: Entry) -> None:
    assert entry.faults() == []


@pytest.mark.parametrize("entry", EXAMPLES, ids=lambda entry: entry.name)
def test_an_example_runs_and_prints_the_result_that_it_shows(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert entry.run_example() == ""


def test_at_least_twenty_five_examples_stand_in_docstrings() -> None:
    assert len(EXAMPLES) >= MIN_DOCSTRING_EXAMPLES


def test_at_least_forty_examples_are_run_and_compared() -> None:
    # A block of Python and the text that it prints, as `tests/examples` runs and compares them.
    block = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
    prose = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
    compared = sum(len(block.findall(path.read_text("utf-8"))) for path in prose)
    assert len(EXAMPLES) + compared >= MIN_EXAMPLES


def _good(size: int, *names: str, **options: Any) -> int:
    """Return the number of names that fit.

    Args:
        size: How many fit, from 1.
        *names: What is counted.
        **options: Ignored.

    Returns:
        The number.

    Raises:
        ValueError: If `size` is 0.

    Example:
        >>> 1 + 1
        2
    """
    raise NotImplementedError


BAD: dict[str, tuple[Callable[[str], str], str]] = {
    "no docstring": (lambda text: "", "no docstring"),
    "long first line": (lambda text: text.replace("the number", "the number " + "x" * 60, 1), "first line has"),
    "no period": (lambda text: text.replace("fit.", "fit", 1), "period"),
    "parameter missing": (lambda text: text.replace("size: How many fit, from 1.\n", "\n"), "parameter size is not"),
    "star missing": (lambda text: text.replace("*names: What is counted.\n", "\n"), "parameter names is not"),
    "parameter unknown": (lambda text: text.replace("size:", "seize:"), "names seize"),
    "parameter bare": (lambda text: text.replace("How many fit, from 1.", ""), "size under Args is not described"),
    "no Returns": (lambda text: text.replace("Returns:\n        The number.\n", ""), "no section Returns"),
    "unknown error": (lambda text: text.replace("ValueError", "ValeuError"), "ValeuError, no exception"),
    "unknown section": (lambda text: text.replace("Raises:", "Throws:"), "no section 'Throws'"),
    "example elsewhere": (lambda text: text.replace("Example:\n", ""), "outside of the section Example"),
    "example compares nothing": (lambda text: text.replace(">>> 1 + 1\n        2", ">>> a = 1"), "compares nothing"),
}


def test_a_complete_docstring_has_no_fault() -> None:
    assert Entry("_good", _good).faults() == []
    assert Entry("_good", _good).run_example() == ""


@pytest.mark.parametrize("fault", BAD)
def test_a_docstring_with_a_fault_is_noticed(fault: str) -> None:
    break_it, expected = BAD[fault]

    def bad(size: int, *names: str, **options: Any) -> int:
        raise NotImplementedError

    assert _good.__doc__
    bad.__doc__ = break_it(_good.__doc__)
    assert bad.__doc__ != _good.__doc__
    found = Entry("bad", bad).faults()
    assert any(expected in each for each in found), found


def test_an_example_that_prints_something_else_is_noticed() -> None:
    entry = Entry("_good", _good)
    entry.doc.sections["Example"] = ["    >>> 1 + 1", "    3"]
    assert "Expected:\n    3\nGot:\n    2" in entry.run_example()


def test_a_class_with_an_undescribed_field_is_noticed() -> None:
    class Record(msgspec.Struct):
        """One record."""

        size: int

    assert Entry("Record", Record).faults() == ["field size is not described under Args or Attributes"]


def test_a_result_without_a_name_in_its_annotation_counts_as_nothing() -> None:
    def nothing() -> None:
        """Do nothing."""

    assert Entry("nothing", nothing).faults() == []
    assert typing.get_type_hints(nothing) == {"return": type(None)}
