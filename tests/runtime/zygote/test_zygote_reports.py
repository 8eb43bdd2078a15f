"""The reports of a zygote to a node that reads them late."""

from __future__ import annotations

import os
import select
import socket
from contextlib import closing

from stageflow_actors.runtime.zygote.main import ZygoteServer
from stageflow_actors.runtime.zygote.protocol import EXITED, ZygoteConfig


def test_a_zygote_whose_reports_have_waited_for_room_sleeps_again_when_all_are_sent() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    node = os.pidfd_open(os.getpid())
    config = ZygoteConfig(theirs.fileno(), os.getpid(), "none:none", [], None, [])
    server = ZygoteServer(config, node)
    theirs.detach()  # the server has it
    with closing(ours), closing(server._socket):
        sent = 0
        while not server._reports:
            server._report(EXITED, f"worker {sent}", 1, 0)
            sent += 1
        server._report(EXITED, "the last one", 1, 0)
        assert server._poller.poll(0) == [], "there is no room, and nothing to do"
        heard = 0
        while heard < sent + 1:
            ours.recv(1 << 16)
            heard += 1
            if server._poller.poll(0):
                assert server._poller.poll(0) == [(server._socket.fileno(), select.POLLOUT)]
                server._flush()
        assert not server._reports
        assert server._poller.poll(0) == [], "it would wake again and again, with nothing to send"
    os.close(node)
