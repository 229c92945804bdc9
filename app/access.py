"""Refuse requests that a page of another site makes through the user's browser."""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return a host name as an IP address, or None if it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP address belongs to this machine."""
    address = address_of(host)
    return host == "localhost" if address is None else address.is_loopback


class OwnPagesOnly:
    """ASGI middleware that answers 403 if the header `Host` or `Origin` is not of this application.

    A site can let its own name point to this machine (DNS rebinding); the browser then sends that name as `Host`. A
    form or script of another site is recognized by its `Origin`.
    """

    def __init__(self, app: ASGIApp, bound: str, allowed: Iterable[str] = (), shared: bool = False) -> None:
        """Take the address to which the server is bound, and the names by which a proxy calls it.

        `shared`: also accept the name of a public link.
        """
        self.app, self.shared = app, shared
        self.allowed = {name.lower() for name in allowed}
        self.names = {"localhost", "127.0.0.1", "::1", bound.lower(), *self.allowed}
        address = address_of(bound)
        self.is_open = address is not None and address.is_unspecified
        if self.is_open:
            self.names |= {(name := socket.gethostname().lower()), f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request of an own page on to the application, and refuse others."""
        problem = self.problem(Headers(scope=scope)) if scope["type"] in ("http", "websocket") else ""
        await (PlainTextResponse(problem, 403) if problem else self.app)(scope, receive, send)

    def problem(self, headers: Headers) -> str:
        """Return why a request with these headers is refused; an empty string if the request is accepted."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        _, name = parts_of(f"//{host}")
        if not self.knows(name):
            return f"The host {name[:100]!r} is not this page's: behind a proxy, start it with --allow-host NAME.\n"
        if origin is None:
            return ""
        place, name = parts_of(origin)
        if place == host or name in self.allowed:
            return ""
        return f"A page of {origin[:100]!r} may not send requests to this one.\n"

    def knows(self, name: str) -> bool:
        """Return whether this application is called by this host name or IP address."""
        by_address = self.is_open and address_of(name) is not None
        return by_address or name in self.names or (self.shared and name.endswith(".gradio.live"))


def parts_of(url: str) -> tuple[str, str]:
    """Return the host:port and the host of a URL, both in lower case; two empty strings for an invalid URL."""
    try:
        parts = urlsplit(url.lower())
        return parts.netloc, parts.hostname or ""
    except ValueError:
        return "", ""
