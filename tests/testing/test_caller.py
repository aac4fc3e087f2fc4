"""The client of tests of processes: what it does with a connection that the shop has closed."""

from __future__ import annotations

import socket
import threading

from mercato.testing.caller import Caller

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def test_a_connection_that_was_closed_while_idle_is_not_used_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        is_closed = threading.Semaphore(0)

        def answer_once_a_connection() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(ANSWER)
                is_closed.release()

        answering = threading.Thread(target=answer_once_a_connection)
        answering.start()
        with Caller(f"http://127.0.0.1:{server.getsockname()[1]}") as caller:
            assert caller.get("/first").text == "ok"
            is_closed.acquire()
            assert caller.get("/second").text == "ok"
        answering.join()
