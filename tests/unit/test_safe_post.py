"""Webhooks are posted to public addresses only, and exactly to the address that was checked."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from producer.webhooks import safe_post
from producer.webhooks.safe_post import TargetRefused, check_target, post


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",  # noqa: S104
        "2130706433",
        "0x7f.1",
        "224.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "[fd00::1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_private_addresses_are_refused_in_every_notation(host: str) -> None:
    with pytest.raises(TargetRefused):
        check_target(f"https://{host}/hook", private=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://93.184.215.14/",
        "ftp://93.184.215.14/",
        "https:///hook",
        "https://[::1",
        "https://93.184.215.14:port/",
        "https://93.184.215.14/a b",
        "https://93.184.215.14/\r\nHost: other",
        "file:///etc/passwd",
        "https://no-such-host.invalid/",
        "",
    ],
)
def test_other_schemes_and_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(TargetRefused):
        check_target(url, private=False)


def test_public_addresses_are_allowed() -> None:
    check_target("https://93.184.215.14/hook?token=1", private=False)
    check_target("https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]:8443/", private=False)


def test_a_name_that_resolves_to_a_private_address_later_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One resolution serves the check and the connection: a hostile name server can't answer differently in between."""
    answers = iter(["93.184.215.14", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (next(answers), 443))])

    check_target("https://rebinding.example/", private=False)
    with pytest.raises(TargetRefused):
        post("https://rebinding.example/", b"", {}, private=False)


@contextlib.contextmanager
def slow_receiver(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Yield the port of a server that runs `answer` on its first connection, in a thread that must end by itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    answer(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)  # ends `accept` if the client gave up before it connected
        thread.join(20)
    assert not thread.is_alive()


def drip_handshake(connection: socket.socket) -> None:
    """Announce a TLS record of 16 KB and send it byte by byte."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while not threading.Event().wait(0.05):
        connection.sendall(b"x")


def drip_answer(connection: socket.socket) -> None:
    """Send an endless status line byte by byte until the client closes."""
    connection.settimeout(0.05)
    while True:
        connection.sendall(b"H")
        with contextlib.suppress(TimeoutError):
            if not connection.recv(65536):
                return


def test_a_tls_handshake_that_comes_byte_by_byte_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_post, "TIMEOUT_S", 2.0)

    with slow_receiver(drip_handshake) as port, pytest.raises(OSError):
        post(f"https://127.0.0.1:{port}/", b"{}", {}, private=True)


def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_post, "TIMEOUT_S", 2.0)

    with slow_receiver(drip_answer) as port, pytest.raises((OSError, http.client.HTTPException)):
        post(f"http://127.0.0.1:{port}/", b"{}", {}, private=True)
