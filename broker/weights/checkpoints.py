"""Which checkpoints a policy's trainers saved: a checkpoint's files are believed by its manifest, and that by its digest here."""

from __future__ import annotations

from lachesis.broker.run_view import RunView


class CheckpointDigests:
    """The hashes `checkpoints:<policy>` of one run: SHA-256 of a manifest, in hex → the step that was saved.

    A step may have several: one who was stopped while it saved, and wakes, saves what another has saved meanwhile.
    """

    def __init__(self, view: RunView) -> None:
        self._view = view

    async def known(self, policy: str) -> dict[str, int]:
        found = await self._view.redis.hgetall(self._view.keys.checkpoints(policy))
        return {digest.decode(errors="replace"): int(step) for digest, step in found.items() if step.isdigit()}

    async def add(self, policy: str, digest: str, step: int) -> None:
        """Also when Redis is full: a checkpoint is what frees it."""
        await self._view.scripts.set_fields(keys=[self._view.keys.checkpoints(policy)], args=[digest, step])

    async def remove(self, policy: str, *, step: int = -1, before: int = 0) -> None:
        """Forget what is of `step`, or of one before `before`."""
        doomed = [digest for digest, of in (await self.known(policy)).items() if of == step or of < before]
        if doomed:
            await self._view.redis.hdel(self._view.keys.checkpoints(policy), *doomed)
