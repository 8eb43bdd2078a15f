"""Warnings about dropped log records and lines: what they name, and how often they come."""

from __future__ import annotations

import logging
import socket

import msgspec
import pytest

from stageflow_actors.runtime.client import drop_report
from stageflow_actors.runtime.client.drop_report import DropReport
from stageflow_actors.runtime.ipc.output_frames import LOGS, FrameReader
from stageflow_actors.runtime.node.program_channel import MAX_BACKLOG_BYTES, ProgramChannel
from stageflow_brokers.log_sender import DROPPED, FRAME_LENGTH_BYTES, encode_record, frame

RECORD = {"name": "shop.stock", "stage_id": "pick", "workflow_id": "orders"}


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(drop_report, "time", made)
    return made


def test_a_report_names_logger_stage_count_and_what_to_do() -> None:
    drops = DropReport()
    drops.count_records(7, RECORD)
    ((count, text),) = drops.take()
    assert count == 7
    assert text.startswith(
        "7 log records (the latest of logger 'shop.stock' in stage 'pick' of workflow 'orders') were dropped, because"
    )
    assert text.endswith("log less in stages, raise the level of the logger, or use a faster handler")
    assert drops.is_empty


def test_a_record_of_no_stage_is_named_by_its_logger_alone() -> None:
    drops = DropReport()
    drops.count_records(1, {"name": "urllib3"})
    ((_, text),) = drops.take()
    assert "(the latest of logger 'urllib3') were" in text


def test_the_first_report_comes_at_once_and_the_next_ones_at_growing_intervals_with_the_total(clock: Clock) -> None:
    drops = DropReport()
    reported = []
    for _ in range(6_000):
        drops.count_records(1, RECORD)
        reported += [(clock.now - 100, count, text) for count, text in drops.take()]
        clock.now += 0.125
    assert [at for at, _, _ in reported] == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511]
    assert "since the start" not in reported[0][2]
    assert f"were dropped ({1 + reported[1][1]} since the start)" in reported[1][2]


def test_the_end_of_the_cluster_is_reported_without_a_wait(clock: Clock) -> None:
    drops = DropReport()
    drops.count_lines(3)
    assert [count for count, _ in drops.take()] == [3]
    drops.count_lines(4)
    assert not list(drops.take())
    drops.make_due()
    ((count, text),) = drops.take()
    assert (count, "4 lines of handlers' output were dropped (7 since the start)" in text) == (4, True)


def test_a_node_names_the_last_record_that_it_drops_for_a_program_that_does_not_read() -> None:
    ours, theirs = socket.socketpair()
    channel = ProgramChannel(theirs)
    record = logging.makeLogRecord({**RECORD, "msg": "x" * 100_000})
    for _ in range(MAX_BACKLOG_BYTES // 100_000 + 20):
        channel.send(LOGS, frame(encode_record(record)), 1)
    frames, found = FrameReader(), []
    while channel.has_backlog:
        found += list(frames.feed(ours.recv(1 << 20)))
        channel.flush()
    ours.setblocking(False)
    found += list(frames.feed(ours.recv(1 << 24)))
    reports = [msgspec.msgpack.decode(data[FRAME_LENGTH_BYTES:]) for kind, data in found if kind == LOGS]
    (report,) = [each for each in reports if DROPPED in each]
    assert report.pop(DROPPED) > 0
    assert report == RECORD
    channel.close()
    ours.close()
