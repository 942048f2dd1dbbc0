"""`/runs/<run>/…`: any number of runs behind one address. The bare paths are the shim's own run.

A trainer that can't set headers names itself in the same way, `…/trainers/<name>/…`, before any route.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

KEPT = 256  # runs whose parts are kept between requests; those of others are made again, which loses only their counts

TRAINER = "lachesis.trainer"  # key of the scope: the name in the path

_PREFIXED = re.compile(r"((?:/runs/(?P<run>[^/]+))?(?:/trainers/(?P<trainer>[^/]+))?)(?P<rest>/.*)?")


@dataclass
class _Served:
    app: ASGIApp
    requests: int = 0  # under way


class Runs:
    """Dispatches requests to the parts of their run, which are made, by `make(run)`, when it is first asked for.

    What `make` raises for an impossible name becomes the answer.
    """

    def __init__(self, make: Callable[[str], ASGIApp], own: str, *, kept: int = KEPT) -> None:
        self._make, self._own, self._kept = make, own, kept
        self._served: dict[str, _Served] = {own: _Served(make(own))}  # least recently used first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._own
        if (found := _PREFIXED.fullmatch(scope["path"])) and (prefix := found[1]):
            run = found["run"] or run
            path = scope["path"] if found["rest"] else f"{prefix}/"
            scope = {**scope, "root_path": prefix, "path": path, TRAINER: found["trainer"]}
        served = self._look_up(run)
        served.requests += 1
        try:
            await served.app(scope, receive, send)
        finally:
            served.requests -= 1

    def _look_up(self, run: str) -> _Served:
        served = self._served.pop(run, None) or _Served(self._make(run))
        self._served[run] = served
        if len(self._served) > self._kept:
            idle = (name for name, other in self._served.items() if not other.requests and name not in (self._own, run))
            if (oldest := next(idle, None)) is not None:
                del self._served[oldest]
        return served
