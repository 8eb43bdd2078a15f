"""Starts sent again after a broker was killed: a finished instance is not run a second time."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from stageflow_actors import Client, Workflow, WorkflowResult
from stageflow_actors.core.envelope import EMPTY_TRAIL, Outcome, decode_envelope, encode
from stageflow_actors.history.rows import HistoryRow
from stageflow_brokers.api import FLAG_CHECK, PublishAnswer
from stageflow_brokers.client.query_admin import QueryAdmin

flow = Workflow("flow").add_stage(lambda context: None, id="only")


class ForgetfulBroker:
    """Answers the first start as a broker does that took it, was killed, and has let the instance go since."""

    def __init__(self, history: dict[str, HistoryRow], ended: bool) -> None:
        self.starts: list[tuple[str, bool]] = []
        self.admin = QueryAdmin(self._query)
        self.history = history
        self.ended = ended

    def publish(
        self,
        targets: Any,
        items: Any,
        bodies: Any,
        *,
        atomic: bool = False,
        on_numbered: Any = None,
        on_wait: Any = None,
    ) -> Future[PublishAnswer]:
        if on_numbered is not None:
            on_numbered()
        refused = []
        for index, (item, body) in enumerate(zip(items, bodies, strict=True)):
            id, flags = item[2], item[4]
            self.starts.append((id, bool(flags & FLAG_CHECK)))
            if len([start for start in self.starts if start[0] == id]) == 1:
                refused.append((index, "look-again", id))
                if self.ended:
                    self.history[id] = _row(id, body)
        answered: Future[PublishAnswer] = Future()
        answered.set_result(PublishAnswer(7, refused))
        return answered

    def _query(self, name: str, *args: Any) -> Future[Any]:
        """Nothing is live any more."""
        assert name == "lookup"
        answered: Future[Any] = Future()
        answered.set_result({"epoch": 0, "left_seq": 7, "groups": {}})
        return answered


class History:
    """The rows that a reader would find."""

    def __init__(self, rows: dict[str, HistoryRow]) -> None:
        self.rows = rows

    def get_many(self, ids: list[str]) -> dict[str, HistoryRow]:
        return {id: self.rows[id] for id in ids if id in self.rows}


def _row(id: str, body: bytes) -> HistoryRow:
    given = decode_envelope(body)
    outcome = encode(Outcome("flow", 1, "completed", given.context, EMPTY_TRAIL, 1.0, 2.0))
    return HistoryRow(id, 1, "flow", 1, "completed", 1.0, 2.0, None, None, given.digest, outcome)


def client(*, ended: bool) -> tuple[Any, ForgetfulBroker]:
    rows: dict[str, HistoryRow] = {}
    made: Any = Client()
    made._session.connection = broker = ForgetfulBroker(rows, ended)
    made._session._reader = History(rows)
    return made, broker


@pytest.mark.parametrize("instance_id", [None, "chosen"])
def test_a_start_that_ended_before_its_answer_came_is_found_in_the_history(instance_id: str | None) -> None:
    program, broker = client(ended=True)
    instance = program.submit(flow, {"n": 1}, instance_id=instance_id)
    assert instance.result(timeout=0).context == {"n": 1}
    assert len(broker.starts) == 1
    assert not program._session.waiters.by_id, "nothing is waited for any more"


@pytest.mark.parametrize("instance_id", [None, "chosen"])
def test_a_start_that_is_not_in_the_history_is_sent_again_with_the_check_on(instance_id: str | None) -> None:
    program, broker = client(ended=False)
    instance = program.submit(flow, {"n": 1}, instance_id=instance_id)
    assert [id for id, _ in broker.starts] == [instance.id] * 2
    assert broker.starts[1][1], "the second time nothing may slip in between"


@pytest.mark.parametrize("key", [None, lambda context: f"k{context['n']}"])
def test_map_finds_what_ended_before_its_answer_came(key: Any) -> None:
    program, broker = client(ended=True)
    results: list[WorkflowResult[Any]] = list(program.map(flow, [{"n": n} for n in range(250)], key=key))
    assert [r.context["n"] for r in results] == list(range(250))
    assert len(broker.starts) == 250
    assert not program._session.waiters.by_id


def test_an_iterator_that_is_dropped_before_its_starts_are_sent_again_is_not_waited_for() -> None:
    program, _ = client(ended=False)
    results = program.map(flow, iter([{"n": 1}]))
    results._pull()
    assert program._session.waiters.by_id
    del results
    program.drain(timeout=0)


class SilentBroker(ForgetfulBroker):
    """Takes starts and never answers."""

    def publish(self, *args: Any, **options: Any) -> Future[PublishAnswer]:
        return Future()


class FullBroker(ForgetfulBroker):
    """Has no room for as long as a caller waits for it."""

    def publish(self, *args: Any, on_wait: Any, **options: Any) -> Future[PublishAnswer]:
        while True:
            on_wait()


@pytest.mark.parametrize("kind", [SilentBroker, FullBroker])
def test_the_start_is_part_of_the_time_that_execute_may_take(kind: type[ForgetfulBroker]) -> None:
    program, _ = client(ended=False)
    program._session.connection = kind({}, ended=False)
    with pytest.raises(TimeoutError, match=r"'chosen' was not confirmed within 0\.1 s; it may go on"):
        program.execute(flow, {"n": 1}, instance_id="chosen", timeout=0.1)
    assert not program._session.waiters.by_id


def test_of_what_was_found_in_the_history_execute_gives_the_result_without_waiting() -> None:
    program, _ = client(ended=True)
    assert program.execute(flow, {"n": 1}, instance_id="chosen", timeout=20).context == {"n": 1}
