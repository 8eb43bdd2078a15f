"""What users import: a name that goes, or one that appears unannounced, is noticed here."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stageflow_actors
import stageflow_actors.errors
import stageflow_actors.history.errors
import stageflow_actors.testing
import stageflow_brokers
import stageflow_brokers.errors
from stageflow_actors import events, testing
from stageflow_actors.definition.http import HttpOptions
from stageflow_actors.definition.stage import CommonOptions, HttpStageOptions, StageOptions
from stageflow_brokers import api

STAGEFLOW = """
    Breaker BrokerUnavailable Client Compensation CompensationResult Config Instance InstanceConflict InstanceNotFound
    InstanceParked InvalidContext JournalCorrupt JournalLocked PayloadTooLarge QueueFull QueueInfo Replace Retry
    RetryPolicy Runtime Stage StageCall StageContext StageError StageFlowError StageResult StageStatus StageTimeout
    TimelineEntry WorkerDied Workflow WorkflowDefinitionError WorkflowFailed WorkflowResult WorkflowStatus
""".split()

BROKERS_API = """
    ACK ATTEMPT_FAILED ATTEMPT_SUCCEEDED Ack Arrival Broker BrokerAdmin BrokerError BrokerUnavailable DEAD_LETTER
    DeliveryExtra DeliveryItem FLAG_CHECK FLAG_CLOSE_GROUP FLAG_START FLAG_WATCH GatherOpen JournalCorrupt JournalLocked
    Listener MAX_LISTED_GROUPS Move PUSH_ONLY PayloadTooLarge ProtocolError PublishAnswer PublishItem QueueFull
    QueueOptions RETRY Refused SettleItem StorageFull TERMINAL Target
""".split()

OURS = ("stageflow_actors", "stageflow_brokers")

FROZEN = Path(__file__).with_name("public_api.txt")
"""One line for each public name, with its signature. After an intended change run this file as a program."""

OPTIONS = (CommonOptions, HttpOptions, HttpStageOptions, StageOptions)
"""The keyword arguments behind `**options`."""

MADE_BY_STAGEFLOW = {"Client", "Instance", "StageCall", "StageContext", "WorkflowResult"}
"""Classes whose constructor users do not call."""


@pytest.mark.parametrize(("module", "names"), [(stageflow_actors, STAGEFLOW), (api, BROKERS_API)])
def test_the_public_names_are_these(module: ModuleType, names: list[str]) -> None:
    assert sorted(module.__all__) == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []


def signature_of(function: Any) -> str:
    """Return the names, kinds and defaults of the parameters, and the annotation of the result."""
    signature = inspect.signature(function)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is parameter.VAR_KEYWORD]
    bare = [each if each in named else each.replace(annotation=each.empty) for each in signature.parameters.values()]
    shown = str(signature.replace(parameters=bare, return_annotation=signature.empty))
    result = signature.return_annotation
    return shown if result is signature.empty else f"{shown} -> {result}"


def lines_of(name: str, kind: type[Any]) -> Iterator[str]:
    """Return one line for a class, and one for each of its public methods and properties."""
    if issubclass(kind, enum.Enum):
        yield f"{name}: {', '.join(kind.__members__)}"
    elif kind.__name__ in MADE_BY_STAGEFLOW or getattr(kind, "_is_protocol", False):
        yield name
    elif issubclass(kind, Exception) and kind.__init__ is Exception.__init__:
        yield f"{name}(message)"
    else:
        yield name + signature_of(kind)
    ours = [base for base in reversed(kind.__mro__) if base.__module__.partition(".")[0] in OURS]
    members = {member: value for base in ours for member, value in vars(base).items() if not member.startswith("_")}
    for member, value in sorted(members.items()):
        if isinstance(value, property):
            yield f"{name}.{member}: {inspect.get_annotations(value.fget)['return']}"  # type: ignore[arg-type]
        elif isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(value):
            yield f"{name}.{member}{signature_of(getattr(value, '__func__', value))}"


def public_api() -> str:
    """Return every public name with its signature, one a line."""
    found: list[str] = []
    for prefix, module in (("", stageflow_actors), ("events.", events), ("testing.", testing), ("port.", api)):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if inspect.isclass(value):
                found += lines_of(prefix + name, value)
            elif inspect.isfunction(value):
                found.append(prefix + name + signature_of(value))
            else:
                found.append(f"{prefix}{name} = {value!r}")
    found += [f"{kind.__name__}: {', '.join(sorted(kind.__annotations__))}" for kind in OPTIONS]
    return "\n".join(found) + "\n"


def test_names_parameters_defaults_and_results_are_frozen() -> None:
    assert public_api() == FROZEN.read_text("utf-8"), f"an intended change? then: python {Path(__file__).name}"


def test_a_changed_default_is_noticed() -> None:
    def wait(seconds: float = 1.0, *, quiet: bool = False) -> None: ...

    def hold(seconds: float = 2.0, *, quiet: bool = False) -> None: ...

    assert signature_of(wait) == "(seconds=1.0, *, quiet=False) -> None"
    assert signature_of(wait) != signature_of(hold)


def public_objects() -> list[tuple[str, Any]]:
    """Each public class and function, and the public methods and properties of the classes."""
    found: list[tuple[str, Any]] = [("stageflow_actors.testing.run", stageflow_actors.testing.run)]
    for module in (stageflow_actors, api):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.isclass(value):
                continue
            found.append((f"{module.__name__}.{name}", value))
            for member, kept in vars(value).items():
                if member.startswith("_") or isinstance(kept, type):
                    continue
                if isinstance(kept, (property, classmethod, staticmethod)) or inspect.isfunction(kept):
                    found.append((f"{module.__name__}.{name}.{member}", kept))
    return found


@pytest.mark.parametrize(("name", "value"), public_objects(), ids=[name for name, _ in public_objects()])
def test_every_public_object_has_a_docstring(name: str, value: Any) -> None:
    doc = inspect.getdoc(getattr(value, "__func__", value)) or ""
    generated = inspect.isclass(value) and dataclasses.is_dataclass(value) and doc.startswith(f"{value.__name__}(")
    assert doc
    assert not generated
    if inspect.isclass(value):
        assert "__doc__" in vars(value)
        assert vars(value)["__doc__"]


@pytest.mark.parametrize("package", [stageflow_actors, stageflow_brokers], ids=lambda package: package.__name__)
def test_every_module_has_a_docstring(package: ModuleType) -> None:
    names = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    assert len(names) > 10
    silent = [name for name in names if not (importlib.import_module(name).__doc__ or "").strip()]
    assert silent == []


def error_classes() -> list[type[Exception]]:
    """Each error class of both packages, subclasses in whatever module included."""
    for package in (stageflow_actors, stageflow_brokers):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)
    kinds: dict[type[Exception], None] = {}
    todo: list[type[Exception]] = [stageflow_actors.errors.StageFlowError, stageflow_brokers.errors.BrokerError]
    while todo:
        kind = todo.pop()
        kinds[kind] = None
        todo.extend(kind.__subclasses__())
    return [kind for kind in kinds if kind.__module__.partition(".")[0] in ("stageflow_actors", "stageflow_brokers")]


def an_example_of(kind: type[Exception]) -> Exception:
    """An error made with something for each parameter that must be given."""
    if kind.__name__ == "WorkflowFailed":
        return kind(stageflow_actors.testing.run(_failing(), {}))
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    values: dict[str, Any] = {}
    positional: list[Any] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.append("what happened")
        elif parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
            continue
        else:
            value: Any = 7 if "int" in str(parameter.annotation) else "what"
            if parameter.kind is parameter.KEYWORD_ONLY:
                values[parameter.name] = value
            else:
                positional.append(value)
    return kind(*positional, **values)


def _failing() -> stageflow_actors.Workflow[dict[str, Any]]:
    return stageflow_actors.Workflow("flow").add_stage(_fail)


def _fail(context: dict[str, Any]) -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_error_survives_pickling_with_its_message_and_fields(kind: type[Exception]) -> None:
    error = an_example_of(kind)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_there_are_errors_of_both_packages_to_look_at() -> None:
    found = {kind.__name__ for kind in error_classes()}
    assert set(stageflow_actors.errors.__all__) <= found
    assert {"ProtocolError", "Refused", "BrokerError", "HistoryMissing"} <= found


if __name__ == "__main__":
    FROZEN.write_text(public_api(), "utf-8")
