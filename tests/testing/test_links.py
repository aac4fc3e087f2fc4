"""Links between processes, each kind of failure alone, before a listener that answers what it receives."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Generator

import pytest

from mercato.testing.links import Link, Links
from mercato.testing.waiting import BOUND_SECONDS, wait_until

SILENCE_SECONDS = 0.2
"""An answer would come in less than a millisecond."""


class Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.received: list[bytes] = []
        self.lost = 0


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Listener)
        try:
            while data := self.request.recv(1024):
                self.server.received.append(data)
                self.request.sendall(data)
        except ConnectionError:
            self.server.lost += 1


@pytest.fixture
def listener() -> Generator[Listener]:
    with Listener() as listener:
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        yield listener
        listener.shutdown()
        thread.join()


@pytest.fixture
def links() -> Generator[Links]:
    with Links() as links:
        yield links


@pytest.fixture
def link(links: Links, listener: Listener) -> Link:
    host, port = listener.server_address[:2]
    return links.make("caller > listener", (str(host), port))


def connected(link: Link) -> socket.socket:
    host, _, port = link.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=BOUND_SECONDS)


def answered(end: socket.socket, data: bytes) -> bytes:
    end.sendall(data)
    return end.recv(1024)


def once(link: Link) -> bytes:
    with connected(link) as end:
        return answered(end, b"b") or end.recv(1024)


def receives_nothing(end: socket.socket) -> bool:
    end.settimeout(SILENCE_SECONDS)
    try:
        end.recv(1024)
    except TimeoutError:
        return True
    finally:
        end.settimeout(BOUND_SECONDS)
    return False


def test_an_open_link_carries_both_ways(link: Link):
    with connected(link) as end:
        assert answered(end, b"a") == b"a"


def test_a_cut_link_resets_what_is_open_and_what_comes(links: Links, link: Link, listener: Listener):
    with connected(link) as end:
        assert answered(end, b"a") == b"a"
        links.do("cut", [link])
        with pytest.raises(ConnectionResetError):
            end.recv(1024)
    wait_until(lambda: listener.lost == 1)
    with pytest.raises(ConnectionError):
        once(link)
    links.heal()
    with connected(link) as end:
        assert answered(end, b"c") == b"c"


def test_a_silent_link_keeps_everything_until_it_heals(links: Links, link: Link, listener: Listener):
    with connected(link) as old:
        assert answered(old, b"a") == b"a"
        links.do("silence", [link])
        with connected(link) as new:
            old.sendall(b"b")
            new.sendall(b"c")
            assert receives_nothing(old)
            assert receives_nothing(new)
            assert listener.received == [b"a"]
            links.heal()
            assert {old.recv(1024), new.recv(1024)} == {b"b", b"c"}


def test_answers_get_lost_after_the_request_was_received(links: Links, link: Link, listener: Listener):
    with connected(link) as end:
        assert answered(end, b"a") == b"a"
        links.do("silence", [link], "back")
        end.sendall(b"b")
        wait_until(lambda: listener.received == [b"a", b"b"])
        assert receives_nothing(end)
        links.do("cut", [link])
        with pytest.raises(ConnectionResetError):
            end.recv(1024)


def test_the_caller_of_a_halved_connection_receives_nothing(links: Links, link: Link, listener: Listener):
    with connected(link) as old:
        assert answered(old, b"a") == b"a"
        links.do("halve", [link])
        wait_until(lambda: listener.lost == 1)
        with contextlib.suppress(ConnectionError):
            old.sendall(b"b")
        assert receives_nothing(old)
        with connected(link) as new:
            assert answered(new, b"c") == b"c"
    assert listener.received == [b"a", b"c"]


def test_a_slow_link_is_late_and_loses_nothing(links: Links, link: Link):
    with connected(link) as end:
        links.do("slow", [link], SILENCE_SECONDS * 2)
        end.sendall(b"a")
        assert receives_nothing(end)
        assert end.recv(1024) == b"a"
