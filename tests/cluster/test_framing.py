import itertools
import os
import socket
import threading

import pytest

from cluster.framing import HEADER, Connection, FrameBuffer, FrameError, frame


def frames_of(stream, cuts, limit=1 << 20):
    buffer, out = FrameBuffer(limit), []
    for start, end in itertools.pairwise([0, *cuts, len(stream)]):
        buffer.feed(stream[start:end])
        while (payload := buffer.take()) is not None:
            out.append(payload)
    return out


def test_frames_survive_every_cut():
    payloads = [b"", b"a", b"bc" * 5, b"", os.urandom(17)]
    stream = b"".join(map(frame, payloads))
    assert frames_of(stream, range(1, len(stream))) == payloads
    for first in range(len(stream)):
        for second in range(first, len(stream), 3):
            assert frames_of(stream, [first, second]) == payloads


def test_an_impossible_length_is_refused_before_its_bytes_come():
    buffer = FrameBuffer(100)
    buffer.feed(frame(b"x" * 100))
    assert buffer.take() == b"x" * 100
    buffer.feed(HEADER.pack(101))
    with pytest.raises(FrameError, match="101"):
        buffer.take()


def test_connection_carries_large_messages_both_ways_and_ends_with_none():
    left, right = map(Connection, socket.socketpair())
    sizes = [0, 1, 4096, 8 << 20, 3]

    def echo():
        while (payload := right.receive()) is not None:
            right.send(payload)
        right.close()

    thread = threading.Thread(target=echo)
    thread.start()
    for size in sizes:
        payload = os.urandom(size)
        left.send(payload)
        assert left.receive() == payload
    left.close()
    assert left.receive() is None
    thread.join(60)
    assert not thread.is_alive()
    with pytest.raises(OSError, match=r"."):
        left.send(b"late")


def test_receive_waits_for_as_long_as_it_is_told():
    left, right = map(Connection, socket.socketpair())
    for timeout_s in (0, 0.01):
        with pytest.raises(TimeoutError):
            left.receive(timeout_s)
    right.send(b"one")
    right.send(b"two")
    assert [left.receive(60), left.receive(0)] == [b"one", b"two"]
    # What has begun to come is waited for.
    whole = frame(b"three" * 1000)
    right._sock.sendall(whole[:7])
    thread = threading.Timer(0.05, right._sock.sendall, [whole[7:]])
    thread.start()
    assert left.receive(0) == b"three" * 1000
    thread.join(60)
    right.close()
    assert left.receive(0) is None
    left.close()
    assert left.receive(0) is None
