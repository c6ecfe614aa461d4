import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from cluster import hub as hub_module
from cluster.framing import Connection, Ticket, dial, frame
from cluster.hub import Hub


class Recorder:
    """A handler that echoes, and notes what happened."""

    def __init__(self):
        self.hub = None
        self.peers = []
        self.messages = []
        self.ends = []
        self.changed = threading.Condition()

    def joined(self, peer):
        if peer.hello == "refuse me":
            raise ValueError("refused")
        with self.changed:
            self.peers.append(peer)
            self.changed.notify_all()

    def received(self, peer, payload):
        if payload == b"break":
            raise ValueError("a bad message")
        with self.changed:
            self.messages.append((peer.hello, payload))
            self.changed.notify_all()
        peer.send(payload)

    def gone(self, peer, reason):
        with self.changed:
            self.ends.append((peer.hello, reason))
            self.changed.notify_all()

    def wait(self, condition, timeout_s=60):
        with self.changed:
            assert self.changed.wait_for(condition, timeout_s)


@pytest.fixture
def make_hub():
    hubs = []

    def make(**options):
        recorder = Recorder()
        hub = Hub(recorder, **options)
        hubs.append(hub)
        return hub, recorder

    yield make
    for hub in hubs:
        hub.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_echo_in_order_and_end(make_hub, kind):
    hub, recorder = make_hub()
    ticket = hub.listen_unix() if kind == "unix" else hub.listen_tcp("127.0.0.1")
    hub.start()
    connection = Connection(dial(ticket, "me"))
    payloads = [b"", b"one", os.urandom(3 << 20), b"three"]
    for payload in payloads:
        connection.send(payload)
    assert [connection.receive() for _ in payloads] == payloads
    connection.close()
    recorder.wait(lambda: recorder.ends)
    assert recorder.ends == [("me", "end of stream")]


def test_the_socket_is_private_and_gone_after_close(make_hub):
    hub, _ = make_hub()
    path = Path(hub.listen_unix().address.removeprefix("unix:"))
    hub.start()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    hub.close()
    assert not path.parent.exists()


@pytest.mark.parametrize("first", [b"x" * 32 + b"\xa2me", b"", b"short", b"y" * 5000])
def test_strangers_are_refused(make_hub, first):
    hub, recorder = make_hub()
    ticket = hub.listen_unix()
    hub.start()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(ticket.address.removeprefix("unix:"))
    sock.sendall(frame(first))
    assert Connection(sock).receive() is None
    assert recorder.peers == []
    assert recorder.ends == []
    sock.close()


def test_a_silent_stranger_is_dropped(make_hub, monkeypatch):
    monkeypatch.setattr(hub_module, "HELLO_TIMEOUT_S", 0.05)
    hub, _ = make_hub()
    ticket = hub.listen_unix()
    hub.start()
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(ticket.address.removeprefix("unix:"))
    assert sock.recv(1) == b""
    sock.close()


def test_a_refused_hello_and_a_bad_message_end_only_their_own_peer(make_hub):
    hub, recorder = make_hub()
    ticket = hub.listen_unix()
    hub.start()
    good, refused, bad = (Connection(dial(ticket, name)) for name in ("good", "refuse me", "bad"))
    assert refused.receive() is None
    bad.send(b"break")
    assert bad.receive() is None
    good.send(b"still here")
    assert good.receive() == b"still here"
    assert recorder.ends == [("bad", "message refused: a bad message")]


def test_a_slow_reader_is_dropped_and_never_blocks_the_sender(make_hub):
    hub, recorder = make_hub(max_unsent_bytes=1 << 20)
    ticket = hub.listen_unix()
    hub.start()
    slow, quick = Connection(dial(ticket, "slow")), Connection(dial(ticket, "quick"))
    recorder.wait(lambda: len(recorder.peers) == 2)
    peer = next(p for p in recorder.peers if p.hello == "slow")
    sent = 0
    while peer.send(b"z" * 65536):
        sent += 1
        assert peer.unsent_bytes <= 1 << 20
        assert sent < 1000
    recorder.wait(lambda: recorder.ends)
    assert recorder.ends[0][0] == "slow"
    assert "too slowly" in recorder.ends[0][1]
    assert not peer.send(b"late")
    quick.send(b"fine")
    assert quick.receive() == b"fine"
    slow.close()


def test_what_is_queued_arrives_when_the_reader_wakes(make_hub):
    hub, recorder = make_hub(max_unsent_bytes=64 << 20)
    ticket = hub.listen_unix()
    hub.start()
    reader = Connection(dial(ticket, "late"))
    recorder.wait(lambda: recorder.peers)
    payloads = [bytes([i]) * (1 << 20) for i in range(16)]
    assert all(recorder.peers[0].send(payload) for payload in payloads)
    assert recorder.peers[0].unsent_bytes > 0
    assert [reader.receive() for _ in payloads] == payloads


def test_close_tells_of_every_peer_once(make_hub):
    hub, recorder = make_hub()
    ticket = hub.listen_unix()
    hub.start()
    connections = [Connection(dial(ticket, i)) for i in range(5)]
    recorder.wait(lambda: len(recorder.peers) == 5)
    recorder.peers[2].close("given up")
    recorder.wait(lambda: recorder.ends)
    hub.close()
    hub.close()
    assert sorted(recorder.ends) == [(0, "closed"), (1, "closed"), (2, "given up"), (3, "closed"), (4, "closed")]
    assert [connection.receive() for connection in connections] == [None] * 5


def test_no_such_address():
    with pytest.raises(ValueError, match="not an address"):
        dial(Ticket("http:somewhere", b""), 0)
    with pytest.raises(OSError, match=r"."):
        dial(Ticket("unix:/nonexistent/socket", b""), 0)
