"""The groups that a batch names, and those that a damaged batch may name."""

from __future__ import annotations

import random

import msgspec
import pytest

from stageflow_brokers.core import records, wire
from stageflow_brokers.journal.format import Batch, Record
from stageflow_brokers.offline.groups import groups_in, possible_groups_in
from stageflow_brokers.types import PublishItem, Target

NAMES = [f"order-{number}" for number in range(200)]


def published() -> bytes:
    items = [PublishItem(0, number, name, 1) for number, name in enumerate(NAMES)]
    return msgspec.msgpack.encode(wire.PublishFrame(1, 2, [Target("q", "label")], items))


def batch_of(kind: int, header: bytes, blob: bytes = b"") -> Batch:
    return Batch(1, 1, 0.0, [Record(kind, 1, 1, header, blob)], [])


def test_a_flipped_bit_hides_no_other_name() -> None:
    header, body = published(), bytes(sum(range(200)))
    whole = batch_of(records.PUBLISH_FRAME, header, body)
    assert list(groups_in(whole)) == list(possible_groups_in(whole)) == NAMES
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(header)
        damaged[chance.randrange(len(header))] ^= 1 << chance.randrange(8)
        found = possible_groups_in(batch_of(records.PUBLISH_FRAME, bytes(damaged), body))
        assert len(found.keys() & set(NAMES)) >= len(NAMES) - 1


def test_what_is_cut_short_names_what_is_left() -> None:
    header = published()
    assert list(possible_groups_in(batch_of(records.PUBLISH_FRAME, header[: len(header) // 2])))[:90] == NAMES[:90]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (records.SETTLE_FRAME, wire.SettleFrame(1, 1, [Target("q", "l")], [(1, 2, 0, 9, "moved")], [])),
        (records.SETTLE_FRAME, wire.SettleFrame(1, 1, [], [], [(1, 2, 0, "acked")])),
        (records.COPY, records.MessageState(1, "q", "copied", 1, "label", 0, 1.0)),
        (records.GROUP, records.GroupState("known", 1, None, True, "", None)),
    ],
)
def test_each_kind_of_record_gives_its_name_when_its_end_is_lost(kind: int, value: object) -> None:
    header = msgspec.msgpack.encode(value)
    (name,) = possible_groups_in(batch_of(kind, header, bytes(9)))
    end = header.index(name.encode()) + len(name)
    assert name in ("moved", "acked", "copied", "known")
    assert list(possible_groups_in(batch_of(kind, header[:end]))) == [name]


@pytest.mark.parametrize("seed", range(50))
def test_noise_raises_nothing(seed: int) -> None:
    chance = random.Random(seed)
    for kind in (*records.NAMES, 99):
        possible_groups_in(batch_of(kind, chance.randbytes(chance.randint(0, 300)), chance.randbytes(20)))
