"""One HTTP POST to an address that somebody gave us. Private addresses are refused, and what was checked is what is
connected to: the name is resolved once, and its address used, so that no second answer can lead elsewhere."""

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
"""For all of it, so that a receiver that answers byte by byte holds nobody up."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TargetRefused(CutfleetError):
    """The URL is none that we post to."""

    code = "webhook_refused"


def check_target(url: str, *, private: bool) -> None:
    """Raises `TargetRefused` for a URL that is not http(s), does not resolve, or leads to a private address or has no
    TLS without `private`."""
    _resolve(_split(url, private), private)


def post(url: str, body: bytes, headers: Mapping[str, str], *, private: bool) -> int:
    """Returns the status; redirects are not followed. Raises `TargetRefused` as `check_target`, and `OSError` or
    `http.client.HTTPException` when there is no answer."""
    target = _split(url, private)
    connection = _Pinned(target, _resolve(target, private), deadline=time.monotonic() + TIMEOUT_S)
    watchdog = threading.Timer(TIMEOUT_S, connection.abort)
    watchdog.start()
    try:
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        connection.request("POST", path, body, dict(headers))
        return connection.getresponse().status
    finally:
        watchdog.cancel()
        connection.close()


class _Pinned(http.client.HTTPConnection):
    """Connects to one of `addresses`; the certificate must be of the URL's host."""

    def __init__(self, target: SplitResult, addresses: list[Address], *, deadline: float) -> None:
        """`deadline`: monotonic, for the connection to be made."""
        self._tls = ssl.create_default_context() if target.scheme == "https" else None
        self.default_port = http.client.HTTPS_PORT if self._tls else http.client.HTTP_PORT
        super().__init__(str(target.hostname), target.port or self.default_port, timeout=TIMEOUT_S)
        self._addresses = addresses
        self._deadline = deadline

    def connect(self) -> None:
        for left, address in zip(range(len(self._addresses))[::-1], self._addresses, strict=True):
            try:
                self.sock = socket.create_connection((str(address), self.port), self._left_s())
                break
            except OSError:
                if not left:
                    raise
        if self._tls is not None:  # the handshake by itself: `abort` can reach the socket meanwhile
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self.sock.settimeout(self._left_s())
            self.sock.do_handshake()
        self.sock.settimeout(self._left_s())

    def _left_s(self) -> float:
        """Raises `TimeoutError` when there is no time left."""
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"the connection was not made within {TIMEOUT_S:g} s")
        return left_s

    def abort(self) -> None:
        """Ends whatever the connection waits for, once there is one."""
        sock = self.sock  # `close` may be taking it away
        if sock is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)


def _split(url: str, private: bool) -> SplitResult:
    try:
        target = urlsplit(url)
        _ = target.port
    except ValueError as exc:
        raise TargetRefused(f"The webhook's URL is malformed: {exc}.") from exc
    schemes = ("https", "http") if private else ("https",)
    if target.scheme not in schemes or not target.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise TargetRefused(
            f"A webhook's URL is {' or '.join(f'{scheme}://HOST/...' for scheme in schemes)}, in plain ASCII; http:// "
            "needs CUTFLEET_WEBHOOK_PRIVATE."
        )
    return target


def _resolve(target: SplitResult, private: bool) -> list[Address]:
    """The addresses of the host. Every one of them must be public, unless `private`."""
    try:
        found = socket.getaddrinfo(target.hostname, target.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise TargetRefused(f"The webhook's host {target.hostname!r} does not resolve: {exc}.") from exc
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        if not private and not _is_public(address):
            raise TargetRefused(
                f"The webhook's host {target.hostname!r} has the private address {address}: "
                "allow such with CUTFLEET_WEBHOOK_PRIVATE, or name another."
            )
    return addresses


def _is_public(address: Address) -> bool:
    """What hides an IPv4 address in it is none of ours to unwrap: it is refused, but for the mapped form."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64:
            return False
    return address.is_global and not address.is_multicast
