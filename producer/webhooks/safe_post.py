"""One HTTP POST to a URL from a user. Private addresses are refused. The host is resolved once and the connection uses
the addresses that were checked, so a second DNS answer can't redirect it."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from jobs.errors import CutfleetError

TIMEOUT_S = 15.0
"""For the whole request: a receiver that answers byte by byte must not block a delivery for longer."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TargetRefused(CutfleetError):
    """The URL is malformed, private or without TLS."""

    code = "webhook_refused"


def check_target(url: str, *, private: bool) -> None:
    """Raises `TargetRefused` for a URL that is not http(s) or does not resolve. `private`: allow private addresses and
    URLs without TLS."""
    _resolve(_split(url, private), private)


def post(url: str, body: bytes, headers: Mapping[str, str], *, private: bool) -> int:
    """Return the HTTP status; follows no redirect. Raises `TargetRefused` as `check_target` does, and `OSError` or
    `http.client.HTTPException` when there is no answer."""
    target = _split(url, private)
    connection = _PinnedConnection(target, _resolve(target, private), deadline=time.monotonic() + TIMEOUT_S)
    watchdog = threading.Timer(TIMEOUT_S, connection.abort)
    watchdog.start()
    try:
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        connection.request("POST", path, body, dict(headers))
        return connection.getresponse().status
    finally:
        watchdog.cancel()
        connection.close()


class _PinnedConnection(http.client.HTTPConnection):
    """Connects to one of `addresses`; the certificate must match the URL's host."""

    def __init__(self, target: SplitResult, addresses: list[Address], *, deadline: float) -> None:
        """`deadline`: monotonic seconds; limits connecting."""
        self._tls = ssl.create_default_context() if target.scheme == "https" else None
        self.default_port = http.client.HTTPS_PORT if self._tls else http.client.HTTP_PORT
        super().__init__(str(target.hostname), target.port or self.default_port, timeout=TIMEOUT_S)
        self._addresses = addresses
        self._deadline = deadline

    def connect(self) -> None:
        self.sock = self._connect_to_any()
        if self._tls is not None:  # a separate handshake: `abort` can reach the socket meanwhile
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.settimeout(self._left_s())
            self.sock.do_handshake()
        self.sock.settimeout(self._left_s())

    def _connect_to_any(self) -> socket.socket:
        *others, last = self._addresses
        for address in others:
            with contextlib.suppress(OSError):
                return socket.create_connection((str(address), self.port), self._left_s())
        return socket.create_connection((str(last), self.port), self._left_s())

    def _left_s(self) -> float:
        """Raises `TimeoutError` after the deadline."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no connection within {TIMEOUT_S:g} s")
        return left_s

    def abort(self) -> None:
        """End what the connection waits for. Safe to call from another thread."""
        sock = self.sock  # `close` may remove it meanwhile
        if sock is not None:
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)


def _split(url: str, private: bool) -> SplitResult:
    try:
        target = urlsplit(url)
        _ = target.port
    except ValueError as exc:
        raise TargetRefused(f"The webhook's URL is malformed: {exc}.") from exc
    schemes = ("https", "http") if private else ("https",)
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if target.scheme not in schemes or not target.hostname or not is_plain:
        forms = " or ".join(f"{scheme}://HOST/..." for scheme in schemes)
        raise TargetRefused(f"A webhook's URL must be {forms}, in plain ASCII; http:// needs CUTFLEET_WEBHOOK_PRIVATE.")
    return target


def _resolve(target: SplitResult, private: bool) -> list[Address]:
    """Return the host's addresses. Raises `TargetRefused` unless all of them are public or `private` is set."""
    try:
        answers = socket.getaddrinfo(target.hostname, target.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise TargetRefused(f"The webhook's host {target.hostname!r} does not resolve: {exc}.") from exc
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in answers]
    for address in addresses:
        if not private and not _is_public(address):
            raise TargetRefused(
                f"The webhook's host {target.hostname!r} has the private address {address}: choose another host, or "
                "allow private addresses with CUTFLEET_WEBHOOK_PRIVATE."
            )
    return addresses


def _is_public(address: Address) -> bool:
    """IPv6 forms that embed an IPv4 address count as private, except mapped ones, which are unwrapped."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast
