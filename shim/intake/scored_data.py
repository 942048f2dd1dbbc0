"""`POST /scored_data` and `/scored_data_list`. The answer comes when the groups are stored."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from lachesis.broker import Broker, InvalidGroup
from lachesis.broker.records.groups import DUPLICATE_WINDOW_S
from lachesis.shim.errors import Malformed, refusal
from lachesis.shim.http.answers import Buffered, Duplicate, ListReceived, Received, ValidationError, answer
from lachesis.shim.intake.backpressure import Backpressure, Deadline
from lachesis.shim.intake.intake import Intake, Refused
from lachesis.shim.intake.post import Post, read_post

RECEIVED = answer(Received("received")).body


class ScoredDataRoutes:
    """Reads posts, and says what became of their groups; those that can't be trained are kept for triage."""

    def __init__(
        self,
        broker: Broker,
        intake: Intake,
        backpressure: Backpressure,
        max_body_bytes: int,
        window_s: int = DUPLICATE_WINDOW_S,
        max_runs: int = 0,
    ) -> None:
        self._broker, self._intake, self._backpressure = broker, intake, backpressure
        self._max_body_bytes, self._window_s, self._max_runs = max_body_bytes, window_s, max_runs

    async def scored_data(self, request: Request) -> Response:
        post, deadline = await self._read(request)
        try:
            accepted = await self._intake.accept(post, deadline)
        except InvalidGroup as error:
            await self._intake.keep_refused(post.gid, post.body, error)
            raise
        if accepted.duplicate:
            return answer(Duplicate("duplicate", self._repeated(post)))
        if accepted.waiting is not None:
            return answer(Buffered("buffered", accepted.waiting))
        return Response(RECEIVED, media_type="application/json")

    async def scored_data_list(self, request: Request) -> Response:
        post, deadline = await self._read(request)
        refused, odd, count, duplicates = [], [], 0, 0
        async for outcome in self._intake.accept_list(post, deadline):
            if isinstance(outcome, Refused):
                await self._intake.keep_refused(*outcome)
                refused.append(refusal(outcome.error, (count,)))
            else:
                duplicates += outcome.duplicate
                if outcome.waiting is not None:
                    odd.append(outcome.waiting)
            count += 1
        if refused and len(refused) == count:
            raise Malformed(refused)
        received = ListReceived("duplicate" if count and duplicates == count else "received", count)
        if odd:
            received.buffered, received.last_buffer_size = len(odd), odd[-1]
        if refused:
            received.refused, received.detail = len(refused), [ValidationError(**each) for each in refused]
        if duplicates:
            received.duplicates = duplicates
        return answer(received)

    async def _read(self, request: Request) -> tuple[Post, Deadline]:
        """A post, whose body is not read before there is room."""
        deadline = self._backpressure.deadline()
        await self._broker.enlist(self._max_runs)
        deadline = await self._backpressure.until_room(deadline)
        return await read_post(request, self._max_body_bytes), deadline

    def _repeated(self, post: Post) -> str:
        what = "this body" if post.key is None else f"the Idempotency-Key {post.key!r}"
        return (
            f"not stored again: {what} was accepted within the last {self._window_s} s (duplicate_window_s), or its group is "
            "not trained yet; to have equal groups trained, give each post an Idempotency-Key of its own"
        )
