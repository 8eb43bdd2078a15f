"""Services as a program provides them: values, and factories that may take other services.

`inspect_services` finds out what each factory takes, and `select_services` which services some handlers need, in the
order in which a worker makes them. This module calls no factory.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from stageflow_actors.definition.callables import name_of
from stageflow_actors.definition.parameters import POSITIONAL, VARIADIC, constructor_parameters, parameters_of
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["ServiceSource", "check_services", "inspect_services", "select_services"]


@dataclass(frozen=True, slots=True)
class ServiceSource:
    """A value, or a factory and the names of the services that it takes.

    `ahead` are those of its parameters that cannot be passed by keyword, `named` the others.
    """

    given: Any
    is_value: bool = False
    ahead: tuple[str, ...] = ()
    named: tuple[str, ...] = ()

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the services that the factory takes."""
        return (*self.ahead, *self.named)

    def call(self, services: Mapping[str, Any]) -> Any:
        """Call the factory with the services that it takes."""
        return self.given(*(services[name] for name in self.ahead), **{name: services[name] for name in self.named})


def inspect_services(given: Mapping[str, Any]) -> dict[str, ServiceSource]:
    """Return the source of each service by its name.

    Raises `WorkflowDefinitionError` if they are no mapping, a name is no string, or a factory takes the `StageContext`.
    """
    if not isinstance(given, Mapping):
        raise WorkflowDefinitionError(
            f'services are factories or values by name, as in services={{"bank": Bank}}, not {given!r}'
        )
    for name in given:
        if not isinstance(name, str):
            raise WorkflowDefinitionError(f"a service is named by a string, the name of a parameter, not by {name!r}")
    return {name: _inspect(name, each) for name, each in given.items()}


def check_services(sources: Mapping[str, ServiceSource]) -> None:
    """Raise `WorkflowDefinitionError` if a factory takes a service that is not provided, or that needs it itself."""
    select_services(sources, sources)


def select_services(names: Iterable[str], sources: Mapping[str, ServiceSource]) -> dict[str, ServiceSource]:
    """Return the services `names` and those that their factories take, each one behind those that it takes.

    Raises `WorkflowDefinitionError` as `check_services` does.
    """
    found: dict[str, ServiceSource] = {}
    for name in names:
        _add(name, sources, found, [])
    return found


def _add(name: str, sources: Mapping[str, ServiceSource], found: dict[str, ServiceSource], chain: list[str]) -> None:
    if name in found:
        return
    if name in chain:
        circle = [*chain[chain.index(name) :], name]
        words = ", ".join(f"{one!r} takes {other!r}" for one, other in itertools.pairwise(circle))
        raise WorkflowDefinitionError(
            f"service {name!r} needs itself: {words}. Give one of these parameters a default, or make both services in "
            "one factory"
        )
    source = sources.get(name)
    if source is None:
        factory = sources[chain[-1]].given
        raise WorkflowDefinitionError(
            f"service {chain[-1]!r}, {name_of(factory)}, has the parameter {name!r}, and no service of that name is "
            f"provided: add {name!r} to the services, or give the parameter a default"
        )
    chain.append(name)
    for other in source.takes:
        _add(other, sources, found, chain)
    chain.pop()
    found[name] = source


def _inspect(name: str, given: Any) -> ServiceSource:
    if not callable(given):
        return ServiceSource(given, is_value=True)
    parameters = constructor_parameters(given) if inspect.isclass(given) else parameters_of(given, 0)
    if parameters is None:
        return ServiceSource(given)  # some builtins have no readable signature
    taken = [p for p in parameters if p.kind not in VARIADIC and p.default is p.empty]
    if any(p.name == "ctx" and p.kind not in VARIADIC for p in parameters):
        raise WorkflowDefinitionError(
            f"service {name!r}, {name_of(given)}, asks for ctx, and only handlers receive a StageContext: a service is "
            "made once in each worker. Its parameters without a default are other services"
        )
    ahead = tuple(p.name for p in taken if p.kind is inspect.Parameter.POSITIONAL_ONLY and p.kind in POSITIONAL)
    return ServiceSource(given, False, ahead, tuple(p.name for p in taken if p.name not in ahead))
