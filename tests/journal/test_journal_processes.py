"""The journal and real processes: its lock, and its state after a SIGKILL."""

import signal
import subprocess
import sys
from typing import Any

import pytest

from stageflow_brokers.errors import JournalLocked
from stageflow_brokers.journal.verify import verify

WRITER = """
import sys
from pathlib import Path
from stageflow_brokers.journal.journal import Journal
from stageflow_brokers.journal.format import Record

journal = Journal.open(Path(sys.argv[1]), replay=lambda batch: None, segment_bytes=1 << 20)
number = journal.last_batch
while True:
    number += 1
    journal.commit([Record(1, number, 0, b"h", b"%d " % number * 500)] * 3, 0.0)
    print(number, flush=True)
    while len(journal.segments()) > 3:
        journal.drop_oldest()
"""


def test_a_killed_writer_leaves_everything_it_acknowledged_and_no_lock(real: Any) -> None:
    last = 0
    for stop_after in (1, 40, 700):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(real.directory)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(stop_after):
                last = int(writer.stdout.readline())
            with pytest.raises(JournalLocked) as caught:
                real.open()
            assert caught.value.pid == writer.pid
            assert verify(real.directory) == []
            writer.send_signal(signal.SIGKILL)
            for line in writer.stdout:
                last = int(line)
        with real.open(segment_bytes=1 << 20) as journal:
            assert last <= journal.last_batch <= last + 1
            numbers = [number for number, _, _ in real.replayed]
            assert numbers == list(range(numbers[0], journal.last_batch + 1))
            for number, _, kept in real.replayed:
                assert kept[0][1:3] == (number, 0)
                assert kept[0][4] == b"%d " % number * 500
