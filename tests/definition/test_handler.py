"""The accepted forms of handlers, and how they are called."""

from __future__ import annotations

import abc
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from stageflow_actors.definition.handler import default_id, inspect_handler
from stageflow_actors.errors import WorkflowDefinitionError

CONTEXT, CTX = {"c": 1}, "the StageContext"


class Charge:
    def execute(self, order: Any, ctx: Any) -> Any:
        return ("execute", order, ctx)

    def compensate(self, order: Any) -> Any:
        return ("compensate", order)


class HTTPCall2Go:
    def __init__(self, retries: int = 3, *, client: Any) -> None:
        self.client = client

    def execute(self, order: Any, *, log: Any) -> Any:
        return (self.client, order, log)

    def compensate(self, order: Any) -> Any:
        return ("undone with", self.client)


class Abstract(abc.ABC):
    @abc.abstractmethod
    def execute(self, order: Any) -> Any: ...


class Callme:
    def __call__(self, order: Any) -> Any:
        return ("called", order)


def bare(order: Any) -> Any:
    return ("bare", order)


async def asynchronous(order: Any) -> Any:
    return ("async", order)


class AsyncExecute:
    async def execute(self, order: Any) -> Any:
        return order


@pytest.mark.parametrize(
    ("handler", "services", "returned"),
    [
        (bare, {}, ("bare", CONTEXT)),
        (lambda order, ctx: (order, ctx), {}, (CONTEXT, CTX)),
        (lambda order, *, ctx: (order, ctx), {}, (CONTEXT, CTX)),
        (lambda order, extra=5, ctx=None: (order, extra, ctx), {}, (CONTEXT, 5, CTX)),
        (lambda order, *, db: (order, db), {"db": "D", "other": "O"}, (CONTEXT, "D")),
        (lambda order, ctx, *, db, mail: (order, ctx, db, mail), {"db": "D", "mail": "M"}, (CONTEXT, CTX, "D", "M")),
        (lambda order, *, ctx, db, limit=3: (order, ctx, db, limit), {"db": "D"}, (CONTEXT, CTX, "D", 3)),
        (lambda *everything: everything, {}, (CONTEXT,)),
        (lambda order, **rest: (order, rest), {}, (CONTEXT, {})),
        (functools.partial(lambda order, *, db, ctx: (order, db, ctx), db="bound"), {}, (CONTEXT, "bound", CTX)),
        (Charge(), {}, ("execute", CONTEXT, CTX)),
        (Charge().compensate, {}, ("compensate", CONTEXT)),
        (Callme(), {}, ("called", CONTEXT)),
        (HTTPCall2Go, {"client": "C", "log": "L"}, ("C", CONTEXT, "L")),
        (len, {}, 1),
        (dict.copy, {}, CONTEXT),
    ],
)
def test_a_handler_is_given_what_its_signature_asks_for(handler: Any, services: Any, returned: Any) -> None:
    assert inspect_handler(handler, "stage 's'").bind(services)(CONTEXT, CTX) == returned


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def by_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any, *, tracer: Any, **kwargs: Any) -> Any:
        return (tracer, function(order, **kwargs))

    return wrapper


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any, *args: Any) -> Any:
        return function(order, *args)

    return wrapper


def with_its_own_bank(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any) -> Any:
        return function(order, bank="its own")

    return wrapper


def with_ctx(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(order: Any, ctx: Any) -> Any:
        return (ctx, function(order))

    return wrapper


class Pays:
    def __init__(self, bank: Any, /, mail: Any = "no mail", *, limit: int = 3) -> None:
        self.parts = (bank, mail, limit)

    @logged
    def execute(self, order: Any, ctx: Any, audit: Any) -> Any:
        return (*self.parts, order, ctx, audit)


class PaysTwice(Pays):
    def __init__(self, *args: Any, times: int, **kwargs: Any) -> None:
        super().__init__("inner", **kwargs)
        self.parts = (*self.parts, times)


@dataclass
class Packs:
    bank: Any
    boxes: int = 2

    def execute(self, order: Any) -> Any:
        return (self.bank, self.boxes)


@functools.lru_cache
def cached(order: Any, bank: Any = "default") -> Any:
    return bank


BANK, AUDIT, TRACER = "the bank", "the audit", "the tracer"
PROVIDED = {"bank": BANK, "audit": AUDIT, "tracer": TRACER, "limit": 9, "times": 2}


@pytest.mark.parametrize(
    ("handler", "returned"),
    [
        (lambda order, bank: bank, BANK),
        (lambda order, bank=None: bank, BANK),
        (lambda order, *, bank=None: bank, BANK),
        (lambda order, missing=5: missing, 5),
        (lambda order, bank, ctx: (bank, ctx), (BANK, CTX)),
        (lambda order, ctx, bank, /: (ctx, bank), (CTX, BANK)),
        (lambda order, missing=1, bank=2, /: (missing, bank), (1, BANK)),
        (lambda order, *bank, **audit: (bank, audit), ((), {})),
        (logged(lambda order, ctx, bank, *, audit: (ctx, bank, audit)), (CTX, BANK, AUDIT)),
        (logged(logged(lambda order, *, bank: bank)), BANK),
        (by_keyword(lambda order, ctx, bank: (ctx, bank)), (TRACER, (CTX, BANK))),
        (by_position(lambda order, ctx, bank: (ctx, bank)), (CTX, BANK)),
        (by_position(lambda order, bank="default": bank), BANK),
        (by_position(lambda order, *, bank="default": bank), "default"),
        (with_its_own_bank(lambda order, *, bank: bank), "its own"),
        (with_ctx(lambda order: order), (CTX, CONTEXT)),
        (functools.partial(logged(lambda order, *, bank, audit: (bank, audit)), bank="bound"), ("bound", AUDIT)),
        (functools.partial(lambda prefix, order, bank: (prefix, bank), "first"), ("first", BANK)),
        (Pays, (BANK, "no mail", 9, CONTEXT, CTX, AUDIT)),
        (PaysTwice, ("inner", "no mail", 9, 2, CONTEXT, CTX, AUDIT)),
        (Packs, (BANK, 2)),
        (Packs("own"), ("own", 2)),
        (Pays("own").execute, ("own", "no mail", 3, CONTEXT, CTX, AUDIT)),
    ],
)
def test_every_other_parameter_is_a_service_by_its_name_wherever_it_stands(handler: Any, returned: Any) -> None:
    spec = inspect_handler(handler, "stage 's'")
    taken = {name: PROVIDED[name] for name in spec.services_among(PROVIDED)}
    assert spec.bind(taken)(CONTEXT, CTX) == returned


def test_a_service_with_a_default_is_taken_only_where_it_is_provided() -> None:
    spec = inspect_handler(lambda order, bank, audit=None: None, "stage 's'")
    assert spec.services == ("bank",)
    assert spec.services_among({"bank", "other"}) == {"bank"}
    assert spec.services_among({"bank", "audit"}) == {"bank", "audit"}
    assert inspect_handler(cached, "stage 's'").services_among({"bank"}) == {"bank"}


def test_a_plain_function_of_context_and_ctx_is_bound_to_itself() -> None:
    def handler(order: Any, ctx: Any) -> None: ...

    assert inspect_handler(handler, "stage 's'").bind({}) is handler


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (lambda: None, "stage 's' takes no context: its first parameter must be the workflow's context"),
        (lambda *, db: None, "stage 's' takes no context"),
        (lambda ctx: None, "stage 's' takes no context: its first parameter is `ctx`"),
        (5, "stage 's' has 5 as its handler"),
        (type("Empty", (), {}), r"stage 's' has the class Empty, which has no execute\(context\) method"),
        (type("Bad", (), {"execute": lambda self: None})(), "execute of stage 's' takes no context"),
        (
            type("Undo", (), {"execute": lambda self, o: None, "compensate": lambda self: None})(),
            "compensate of stage 's' takes no context",
        ),
        (
            Abstract,
            "stage 's' has the abstract class Abstract, which cannot be constructed: it does not define execute",
        ),
    ],
)
def test_a_handler_that_cannot_be_called_is_refused_with_the_fix(handler: Any, message: str) -> None:
    with pytest.raises(WorkflowDefinitionError, match=message):
        inspect_handler(handler, "stage 's'")


def test_a_generator_is_refused_because_calling_it_runs_nothing() -> None:
    def handler(order: Any) -> Any:
        yield order

    with pytest.raises(WorkflowDefinitionError, match="stage 's' is a generator"):
        inspect_handler(handler, "stage 's'")


def test_async_handlers_are_distinguished() -> None:
    assert inspect_handler(asynchronous, "s").is_async
    assert inspect_handler(functools.partial(asynchronous), "s").is_async
    assert inspect_handler(AsyncExecute(), "s").is_async
    assert inspect_handler(AsyncExecute, "s").is_async
    assert not inspect_handler(bare, "s").is_async
    coroutine = inspect_handler(asynchronous, "s").bind({})(CONTEXT, CTX)
    assert inspect.iscoroutine(coroutine)
    coroutine.close()


def test_an_object_brings_its_own_compensation() -> None:
    call = inspect_handler(Charge(), "stage 's'")
    assert call.kind == "object"
    assert call.compensate is not None
    assert call.compensate.bind({})(CONTEXT, CTX) == ("compensate", CONTEXT)
    assert inspect_handler(Callme(), "stage 's'").compensate is None


def test_a_class_brings_its_own_compensation_and_is_constructed_for_it() -> None:
    call = inspect_handler(HTTPCall2Go, "stage 's'")
    assert call.kind == "class"
    assert call.compensate is not None
    assert call.compensate.bind({"client": "C"})(CONTEXT, CTX) == ("undone with", "C")
    assert call.all_services == {"client", "log"}


def test_binding_without_a_service_names_it() -> None:
    with pytest.raises(WorkflowDefinitionError, match="the service 'db' is not provided"):
        inspect_handler(lambda order, *, db: None, "stage 's'").bind({})


def reserve_inventory(order: Any) -> None: ...


def _private(order: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (reserve_inventory, "reserve-inventory"),
        (_private, "private"),
        (Charge, "charge"),
        (HTTPCall2Go, "http-call2-go"),
        (Charge(), "charge"),
        (functools.partial(reserve_inventory), "reserve-inventory"),
        (Charge().execute, "execute"),
        (lambda order: None, ""),
        (len, "len"),
    ],
)
def test_the_default_id_is_made_of_the_name(handler: Any, expected: str) -> None:
    assert default_id(handler) == expected
