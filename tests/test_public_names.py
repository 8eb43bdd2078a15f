"""What users import: a name that goes, or one that appears unannounced, is noticed here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from types import ModuleType
from typing import Any

import pytest

import brokers
import brokers.errors
import stageflow_actors
import stageflow_actors.errors
import stageflow_actors.history.errors
import stageflow_actors.testing
from brokers import api

STAGEFLOW = """
    Breaker BrokerUnavailable Client Compensation CompensationResult Config Instance InstanceConflict InstanceNotFound
    InstanceParked InvalidContext JournalCorrupt JournalLocked PayloadTooLarge QueueFull QueueInfo Replace Retry
    RetryPolicy Runtime Stage StageCall StageContext StageError StageFlowError StageResult StageStatus StageTimeout
    TimelineEntry WorkerDied Workflow WorkflowDefinitionError WorkflowFailed WorkflowResult WorkflowStatus
""".split()

BROKERS_API = """
    AGAIN ATTEMPT_FAILED ATTEMPT_WORKED CHECK DEAD DONE LEAVE PUSH_ONLY START TERMINAL WATCH Ack Arrival Broker
    BrokerAdmin BrokerError BrokerUnavailable DeliveryExtra DeliveryItem GatherOpen JournalCorrupt JournalLocked
    Listener MOST_LISTED Move PayloadTooLarge ProtocolError
    PublishAnswer PublishItem QueueFull QueueOptions Refused SettleItem StorageFull Target
""".split()

SIGNATURES = {
    "Workflow.add_stage": "self, handler, **options",
    "Runtime": "self, *workflows, data_dir, services, interceptors, config",
    "Runtime.start": "self",
    "Runtime.stop": "self, drain, grace",
    "Runtime.register": "self, workflow",
    "Runtime.scale": "self, workflow, stage, actors",
    "Client.submit": "self, workflow, context, instance_id, priority",
    "Client.submit_many": "self, workflow, contexts, instance_ids",
    "Client.execute": "self, workflow, context, timeout, instance_id, priority",
    "Client.map": "self, workflow, contexts, key, progress, retry_failed",
    "Client.map_unordered": "self, workflow, contexts, key, progress, retry_failed",
    "Client.as_completed": "self, instances, timeout",
    "Client.drain": "self, timeout",
    "Client.instance": "self, instance_id",
    "Client.instances": "self, status, workflow, limit",
    "Client.queues": "self, prefix",
    "Client.on_event": "self, callback",
    "Client.scale": "self, workflow, stage, actors",
    "Client.close": "self",
    "Runtime.connect": "data_dir",
    "Instance.history": "self",
    "Instance.result": "self, timeout",
    "StageContext.step": "self, name, function, *args",
    "Breaker": "self, failures, reset",
    "Compensation": "self, function, timeout, retry, actors",
    "Retry.exponential": "max_attempts, initial, maximum, factor, jitter, retry_on, abort_on, random",
    "Retry.linear": "max_attempts, initial, maximum, retry_on, abort_on",
    "Retry.fixed": "max_attempts, delay, retry_on, abort_on",
    "testing.run": "workflow, context, services, signals, endpoints, interceptors",
}
"""Names of parameters in their order, which keyword arguments of users depend on."""


@pytest.mark.parametrize(("module", "names"), [(stageflow_actors, STAGEFLOW), (api, BROKERS_API)])
def test_the_public_names_are_these(module: ModuleType, names: list[str]) -> None:
    assert sorted(module.__all__) == sorted(names)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_parameters_keep_their_names_and_order(name: str) -> None:
    found: Any = stageflow_actors
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found.__init__ if inspect.isclass(found) else found)
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    shown = ", ".join(stars.get(p.kind.name, "") + p.name for p in signature.parameters.values())
    assert shown == SIGNATURES[name]


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
def test_every_public_object_says_what_it_is(name: str, value: Any) -> None:
    doc = inspect.getdoc(getattr(value, "__func__", value)) or ""
    generated = inspect.isclass(value) and dataclasses.is_dataclass(value) and doc.startswith(f"{value.__name__}(")
    assert doc
    assert not generated
    if inspect.isclass(value):
        assert "__doc__" in vars(value)
        assert vars(value)["__doc__"]


@pytest.mark.parametrize("package", [stageflow_actors, brokers], ids=lambda package: package.__name__)
def test_every_module_says_what_it_is(package: ModuleType) -> None:
    names = [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    assert len(names) > 10
    silent = [name for name in names if not (importlib.import_module(name).__doc__ or "").strip()]
    assert silent == []


def error_classes() -> list[type[Exception]]:
    """Each error class of both packages, subclasses in whatever module included."""
    for package in (stageflow_actors, brokers):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(found.name)
    kinds: dict[type[Exception], None] = {}
    todo: list[type[Exception]] = [stageflow_actors.errors.StageFlowError, brokers.errors.BrokerError]
    while todo:
        kind = todo.pop()
        kinds[kind] = None
        todo.extend(kind.__subclasses__())
    return [kind for kind in kinds if kind.__module__.partition(".")[0] in ("stageflow_actors", "brokers")]


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
