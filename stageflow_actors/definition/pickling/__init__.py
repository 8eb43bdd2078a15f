"""Pickling of definitions, from the program to its child processes. Based on cloudpickle.

`dumps` and `loads` make code work in a worker as after an import of its module, although the source of `__main__` is
never run again there. Only a child process loads the bytes, and only those that its parent dumped: never bytes from a
socket or a file.

=================  ==============================================================================
`code_pickler`     what is sent by value, by name, or not at all
`definitions`      the functions and classes of a script that no stage refers to
`field_types`      annotations of context types that are strings
`importable`       what a child process finds by an import
`namespaces`       the modules of a worker that cannot be imported, `__main__` above all
`rebuild`          the functions that a worker calls to rebuild objects
`script_module`    `__main__` in interpreters that multiprocessing starts in a worker
`struct_classes`   msgspec Structs by value
`unsendable`       names the object that cannot be sent
=================  ==============================================================================
"""

from __future__ import annotations

import io
import pickle
from typing import Any

from stageflow_actors.definition.pickling.code_pickler import CodePickler
from stageflow_actors.definition.pickling.definitions import Script
from stageflow_actors.definition.pickling.field_types import export_types, import_types, reachable_types
from stageflow_actors.definition.pickling.importable import ReferenceIndex
from stageflow_actors.definition.pickling.namespaces import RUN_ID, add_definitions, publish_definitions
from stageflow_actors.definition.pickling.unsendable import Unsendable, find_unsendable, is_of_runtime
from stageflow_actors.errors import WorkflowDefinitionError

__all__ = ["Script", "dumps", "export_types", "import_types", "loads", "reachable_types"]

MAX_REFERENCES = 50
"""Most objects that are sent by reference because they cannot be sent by value."""


def dumps(
    value: Any, contexts: tuple[type[Any], ...] = (), *, what: str = "the definition", script: Script | None = None
) -> bytes:
    """Return `value` as bytes for `loads` in a child process.

    Args:
        value: The code.
        contexts: The context types in it.
        what: Name of the code in errors, as "stage 'x' of workflow 'y'".
        script: Other definitions of the program's script, for which workers may look by name.

    Raises:
        WorkflowDefinitionError: If something cannot be sent; the message names it.
    """
    types = [(kind, export_types(kind)) for kind in contexts if kind is not dict]
    references: dict[int, tuple[str, str, str]] = {}
    extra = script or Script()
    index = extra.index
    while True:
        try:
            data = _dump((value, types), references, index)
            break
        except WorkflowDefinitionError:
            raise
        except Exception as error:
            found = find_unsendable((value, types), lambda part: _error_of(part, references, index))
            new = _references_on(found, index) if found is not None and len(references) < MAX_REFERENCES else {}
            if new:  # the worker finds it in the module that it was imported from
                references.update(new)
                continue
            reason = found.describe() if found is not None else f"it cannot be sent to worker processes: {error}"
            refusal = WorkflowDefinitionError(f"{what}: {reason}")
            if _is_of_user(error):
                raise refusal from error
            raise refusal from None
    return pickle.dumps((RUN_ID, extra.main, extra.definitions, data))


def _is_of_user(error: Exception) -> bool:
    """Return True if code of the user raised the error, such as a `__reduce__`; its traceback says where."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else str(last.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] not in ("", "stageflow_actors", "cloudpickle")


def loads(data: bytes) -> Any:
    """Return the value that the parent passed to `dumps`."""
    run_id, main, definitions, code = pickle.loads(data)
    if run_id != RUN_ID and definitions:
        add_definitions("__main__", definitions)
        publish_definitions(main, definitions)
    _, (value, contexts) = pickle.loads(code)
    for kind, types in contexts:
        import_types(kind, types)
    return value


def _dump(value: Any, references: dict[int, tuple[str, str, str]], index: ReferenceIndex) -> bytes:
    buffer = io.BytesIO()
    pickler = CodePickler(buffer, references, index)
    try:
        pickler.dump((pickler.namespace("__main__"), value))  # the namespace exists before anything looks into it
    finally:
        pickler.release()
    return buffer.getvalue()


def _error_of(part: Any, references: dict[int, tuple[str, str, str]], index: ReferenceIndex) -> Exception | None:
    try:
        _dump(part, references, index)
    except Exception as error:  # noqa: BLE001 - objects of the user may raise anything
        return error
    return None


def _references_on(found: Unsendable, index: ReferenceIndex) -> dict[int, tuple[str, str, str]]:
    """Return the outermost object on the way to an unsendable one that a worker finds in an importable module."""
    for holder in found.holders:
        if is_of_runtime(holder):
            return {}
        reference = index.find(holder)
        if reference is not None and not isinstance(holder, (type, dict, list, tuple, set)):
            return {id(holder): reference}
    return {}
