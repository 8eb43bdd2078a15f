"""`ServiceScope`: makes the services of one worker, and closes them in reverse order at its end.

A generator function and a function of `contextlib.contextmanager` are entered and left, async ones on the event loop of
the handlers. Of anything else `close` or `aclose` is called if there is one. A value is passed on as it is. The
in-process test runner uses this too. It must not decide which services a worker needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager
from types import AsyncGeneratorType, GeneratorType, ModuleType
from typing import Any

from stageflow_actors.definition.handler import HandlerSpec
from stageflow_actors.definition.services import ServiceSource, select_services
from stageflow_actors.errors import StageFlowError

__all__ = ["ServiceScope", "services_on_loop"]

logger = logging.getLogger("stageflow_actors.worker")

Closer = Callable[[], Any]


class ServiceScope:
    """The services that have been made and not closed. `loop` returns the event loop of the handlers.

    All methods run in the main thread. The loop may run in another one. `on_step` is called before a service is made.
    `failed`: the name of the service that could not be made.
    """

    def __init__(
        self, loop: Callable[[], asyncio.AbstractEventLoop], on_step: Callable[[str], None] = lambda step: None
    ) -> None:
        self._loop = loop
        self._on_step = on_step
        self._made: dict[str, Any] = {}
        self._closers: list[tuple[str, Closer, bool]] = []
        self._known: set[int] = set()
        # A context of their own: a message must not see a context variable that a factory sets.
        self._context = contextvars.Context()
        self._jobs: asyncio.Queue[tuple[Coroutine[Any, Any, Any], asyncio.Future[Any]]] | None = None
        self._task: asyncio.Task[None] | None = None
        self.failed = ""

    def make(self, sources: Mapping[str, ServiceSource], on_loop: Collection[str] = ()) -> dict[str, Any]:
        """Return the services by name. `sources` names each one behind those that its factory takes.

        Factories of services in `on_loop` are called, and their services closed, while the loop runs. Raises each
        exception of a factory.
        """
        self._context = contextvars.copy_context()  # here, so that it holds what the initializer has set
        for name, source in sources.items():
            if source.is_value:
                self._made[name] = source.given
                self._known.add(id(source.given))
                continue
            self._on_step(f"the making of service {name!r}")
            try:
                self._make(name, source, name in on_loop)
            except BaseException as error:
                self.failed = name
                error.add_note(f"(raised while service {name!r} was made)")
                raise
        return dict(self._made)

    def close(self, on_step: Callable[[str], None] = lambda step: None) -> None:
        """Close the services, the last one first. An exception is logged, and the others are closed. Idempotent."""
        while self._closers:
            name, closer, within = self._closers.pop()
            on_step(f"the close of service {name!r}")
            try:
                self._close(closer, within)
            except BaseException as error:
                logger.warning("service %r could not be closed: %r", name, error, exc_info=error)
        self._made.clear()
        if self._task is not None:
            self._wait_for(self._end_task(self._task))
            self._task = None

    def _make(self, name: str, source: ServiceSource, within: bool) -> None:
        if within:
            service, closer = self._run_in_task(self._open_within(source))
        else:
            opened = self._context.run(self._open, source)
            service, closer = opened if isinstance(opened, tuple) else self._run_in_task(opened)
        self._made[name] = service
        self._known.add(id(service))
        if closer is not None:
            self._closers.append((name, closer, within))

    def _open(self, source: ServiceSource) -> tuple[Any, Closer | None] | Coroutine[Any, Any, Any]:
        """Return the service and the function that closes it, or a coroutine that returns both."""
        result = source.call(self._made)
        if isinstance(result, GeneratorType) and result.gi_code.co_name != "<genexpr>":
            result = contextlib.contextmanager(functools.partial(_same, result))()
        elif isinstance(result, AsyncGeneratorType) and result.ag_code.co_name != "<genexpr>":
            result = contextlib.asynccontextmanager(functools.partial(_same, result))()
        if isinstance(result, _GeneratorContextManager):
            return result.__enter__(), functools.partial(result.__exit__, None, None, None)
        if isinstance(result, _AsyncGeneratorContextManager):
            return _enter(result)
        if inspect.iscoroutine(result):
            return self._await_service(result)
        return result, self._closer_of(result)

    async def _await_service(self, work: Coroutine[Any, Any, Any]) -> tuple[Any, Closer | None]:
        service = await work
        return service, self._closer_of(service)

    def _closer_of(self, service: Any) -> Closer | None:
        """Return the method that closes a service, unless it is a value or another service, which has its own."""
        return None if id(service) in self._known else _closer_of(service)

    async def _open_within(self, source: ServiceSource) -> tuple[Any, Closer | None]:
        opened: Any = self._open(source)
        return opened if isinstance(opened, tuple) else await opened

    def _close(self, closer: Closer, within: bool) -> None:
        if within:
            self._run_in_task(_close_within(closer))
            return
        result = self._context.run(closer)
        if inspect.isawaitable(result):
            self._run_in_task(_await(result))

    def _run_in_task(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run `work` on the loop and return its result.

        One task runs all of them: an async context manager must be left in the task that entered it.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._wait_for(self._submit(work))
        work.close()
        raise StageFlowError(
            "testing.run was called inside a running event loop, and the service needs an event loop of its own: call "
            "it in a thread, as in `await asyncio.to_thread(run, workflow, context)`"
        )

    def _wait_for(self, work: Coroutine[Any, Any, Any]) -> Any:
        loop = self._loop()
        if loop.is_running():
            return asyncio.run_coroutine_threadsafe(work, loop).result()
        return loop.run_until_complete(work)

    async def _submit(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._task is None:
            self._jobs = asyncio.Queue()
            self._task = asyncio.get_running_loop().create_task(self._serve(self._jobs), context=self._context)
        assert self._jobs is not None
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put_nowait((work, done))
        return await done

    async def _end_task(self, task: asyncio.Task[None]) -> None:
        task.cancel()
        await asyncio.wait([task])

    async def _serve(self, jobs: asyncio.Queue[tuple[Coroutine[Any, Any, Any], asyncio.Future[Any]]]) -> None:
        while True:
            work, done = await jobs.get()
            try:
                result = await work
            except (SystemExit, KeyboardInterrupt) as error:
                done.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            except BaseException as error:  # noqa: BLE001 - the caller of `make` or `close` handles it
                done.set_exception(error)
            else:
                done.set_result(result)


def services_on_loop(specs: Collection[HandlerSpec], sources: Mapping[str, ServiceSource]) -> frozenset[str]:
    """Return the services of the handlers that are declared async, with those that their factories take."""
    names = [name for spec in specs if _is_declared_async(spec) for name in spec.services_among(sources)]
    return frozenset(select_services([name for name in names if name in sources], sources))


def _is_declared_async(spec: HandlerSpec) -> bool:
    """Return True if the handler, or a function that its decorators wrap, is an `async def`."""
    function: Any = spec.function
    while function is not None:
        if inspect.iscoroutinefunction(function):
            return True
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif not inspect.isroutine(function) and not inspect.isclass(function):
            function = getattr(type(function), "__call__", None)  # noqa: B004 - the method is inspected
        else:
            function = None
    return spec.is_async


def _same(result: Any) -> Any:
    return result


async def _enter(manager: Any) -> tuple[Any, Closer]:
    return await manager.__aenter__(), functools.partial(manager.__aexit__, None, None, None)


async def _await(work: Any) -> Any:
    return await work


async def _close_within(closer: Closer) -> None:
    result = closer()
    if inspect.isawaitable(result):
        await result


def _closer_of(service: Any) -> Closer | None:
    """Return the method that closes a service, if it has one that can be called without arguments."""
    if isinstance(service, (type, ModuleType)) or any(service is one for one in (sys.stdin, sys.stdout, sys.stderr)):
        return None
    for name in ("close", "aclose"):
        try:
            method = getattr(service, name, None)
        except Exception:  # noqa: BLE001 - a proxy of a user
            continue
        if callable(method) and _takes_nothing(method):
            return method  # type: ignore[no-any-return]
    return None


def _takes_nothing(method: Any) -> bool:
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:
        return True  # some builtins have no readable signature
    return True
