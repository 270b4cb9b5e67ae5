"""Whom we post to: public addresses, and exactly the one that was checked."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest

from producer.webhooks import safe_post as outgoing
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
def test_private_addresses_are_refused_in_every_disguise(host: str) -> None:
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
def test_what_is_no_plain_https_url_is_refused(url: str) -> None:
    with pytest.raises(TargetRefused):
        check_target(url, private=False)


def test_public_addresses_are_allowed() -> None:
    check_target("https://93.184.215.14/hook?token=1", private=False)
    check_target("https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]:8443/", private=False)


def test_a_name_that_leads_elsewhere_later_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resolved once for checking and connecting: the answer of a hostile name server can't change in between."""
    answers = iter(["93.184.215.14", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (next(answers), 443))])

    check_target("https://rebinding.example/", private=False)
    with pytest.raises(TargetRefused):
        post("https://rebinding.example/", b"", {}, private=False)


def test_a_receiver_that_drips_its_handshake_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of TLS that is announced with 16 KB, and comes byte by byte."""
    monkeypatch.setattr(outgoing, "TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def drip() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"\x16\x03\x03\x40\x00")
                    while not threading.Event().wait(0.05):
                        connection.sendall(b"x")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises(OSError):
            post(f"https://127.0.0.1:{port}/", b"{}", {}, private=True)
        server.shutdown(socket.SHUT_RDWR)  # nobody came, where the time was up before
        thread.join(20)

    assert not thread.is_alive()


def test_a_receiver_that_never_answers_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "TIMEOUT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def drip() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(0.05)
                    while True:
                        connection.sendall(b"H")
                        with contextlib.suppress(TimeoutError):
                            if not connection.recv(65536):
                                return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        with pytest.raises((OSError, outgoing.http.client.HTTPException)):
            post(f"http://127.0.0.1:{port}/", b"{}", {}, private=True)
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)

    assert not thread.is_alive()
