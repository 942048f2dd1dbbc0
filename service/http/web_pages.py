"""A web page may not call: neither on an open run nor, with what its browser remembers, on a closed one.

A page of any site can have its visitor's browser send requests to addresses that only the visitor reaches, 127.0.0.1
above all, and by rebinding its own name to such an address (DNS rebinding) it can read the answers too. Browsers say
who makes a request, in headers that no page can set: `Origin`, `Sec-Fetch-Site` and, of a rebound name, `Host`. Programs
send neither of the first two.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lachesis.service.http.settings import CallerSettings

_WATCHED = frozenset((b"host", b"origin", b"sec-fetch-site", b"referer", b"accept", b"user-agent"))
_READS = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(?:\[(?P<address>[^\]]*)\]|(?P<name>[^:@\[\]\s]*))(?::\d*)?", re.ASCII)
_KEPT = 512  # bytes of watched headers whose verdict is remembered
_SHOWN = 100  # characters of a header that are repeated to its sender

Refuse = Callable[[int, str], ASGIApp]  # makes the answer


def guarded(settings: CallerSettings, refuse: Refuse, *, changing: tuple[str, ...] = ()) -> list[Middleware]:
    """The outermost middleware of a server; CORS only where a page may call. `changing`: as for WebPages."""
    pages = Middleware(WebPages, settings, refuse, changing)
    if not settings.allow_origin:
        return [pages]
    methods = ["GET", "POST", "PUT"]
    return [
        pages,
        Middleware(CORSMiddleware, allow_origins=settings.allow_origin, allow_methods=methods, allow_headers=["*"]),
    ]


class WebPages:
    """ASGI middleware that refuses what a page of another origin makes a browser send.

    Of what changes something, a POST or a GET whose path has one of the ends `changing`, it refuses whatever a browser
    sends without naming the page, too: old browsers do, all do to plain HTTP beyond this machine, and a site can
    redirect to such a GET whoever typed its own address.
    """

    def __init__(self, app: ASGIApp, settings: CallerSettings, refuse: Refuse, changing: tuple[str, ...]) -> None:
        self._app, self._refuse, self._changing = app, refuse, changing
        self._origins = frozenset(settings.allow_origin)
        self._names = [*settings.allowed_host, "localhost", "*.localhost", settings.host.lower(), _own_name()]
        self._is_ours = lru_cache(1024)(self._names_us)
        self._judged = lru_cache(1024)(self._judge)  # clients send the same headers with each call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._refuse(*refusal) if refusal else self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason."""
        method, changes = scope["method"], scope["path"].endswith(self._changing)
        watched = tuple([header for header in scope["headers"] if header[0] in _WATCHED])
        judge = self._judged if sum([len(value) for _, value in watched]) <= _KEPT else self._judge
        refusal = judge(watched, method, changes)
        if refusal and not refusal[1]:
            rule = "a browser may not make this request, whoever asked it to: use curl or another program"
            return 403, f"{method} {_shown(scope['path'])}: {rule}"
        return refusal

    def _judge(self, watched: Sequence[tuple[bytes, bytes]], method: str, changes: bool) -> tuple[int, str] | None:
        """The same; without a reason where a browser sent it that names no page."""
        said: dict[bytes, list[str]] = {}
        for name, value in watched:
            said.setdefault(name, []).append(value.decode("latin-1"))
        hosts, origins, sites = said.get(b"host", []), said.get(b"origin", []), said.get(b"sec-fetch-site", [])
        for host in hosts:
            if not self._is_ours(host):
                return 421, f"Host = {_shown(host)}: not a name of this server; --allowed-host NAME adds one"
        for origin in origins:
            if not self._may_call(origin.lower(), hosts):
                return 403, f"Origin = {_shown(origin)}: its pages may not call; --allow-origin ORIGIN lets them"
        if origins:
            return None
        for site in sites:
            if site not in ("same-origin", "none"):
                return 403, f"Sec-Fetch-Site = {_shown(site)}: pages of other origins may not call (--allow-origin)"
        reads = method in _READS
        if (reads and changes and "none" in sites) or (
            not sites and (changes or not reads) and _is_browsers(said, reads)
        ):
            return 403, ""
        return None

    def _may_call(self, origin: str, hosts: Sequence[str]) -> bool:
        """Whether pages of that origin may: it is allowed, or ours."""
        return origin in self._origins or any(
            origin in (f"http://{host}", f"https://{host}") for host in map(str.lower, hosts)
        )

    def _names_us(self, host: str) -> bool:
        """Whether a header `Host` is one of our names, or an IP address: no page can have one of its own choice there."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found["name"] or "").lower().removesuffix(".")
        if not name or _is_address(name):
            return found["address"] is None or _is_address(found["address"])
        return any(
            known in ("*", name) or (known.startswith("*.") and name.endswith(known[1:])) for known in self._names
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_name() -> str:
    return socket.gethostname().lower()


def _is_browsers(said: Mapping[bytes, Sequence[str]], reads: bool) -> bool:
    """Whether a browser sent it, though it tells of no page. A page can't have its browser leave `User-Agent` out."""
    agents, accepted = said.get(b"user-agent", ()), said.get(b"accept", ()) if reads else ()
    return (
        b"referer" in said
        or any(agent.startswith(("Mozilla/", "Opera/")) for agent in agents)
        or any(kind in accept.lower() for accept in accepted for kind in ("text/html", "image/"))
    )


def _shown(text: str) -> str:
    """Beginning of a header, without what may stand before an @: a token."""
    return repr(text.rpartition("@")[2][:_SHOWN])
