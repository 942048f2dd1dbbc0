"""How fast replicas are beside each other, and what follows for how many groups one claims.

A replica must not keep the others waiting when a step's groups run out: of all that it has claimed, no more than the last
group may be left to compute then. With `busy` groups before it, and `left` that nobody has, it claims k only if the
others still find some when it comes to the last of the k: (busy + k - 1) · others ≤ left - k.
"""

from __future__ import annotations

from math import inf

MICRO = 1e-6


class Pace:
    """Of one replica; kept from step to step."""

    def __init__(self) -> None:
        self.speed = 0.0  # groups a second, 0: not known
        self.others = inf  # groups that they compute while this one computes one; inf as long as that is not known
        self._replicas = 1

    def met(self, replicas: int) -> None:
        """So many are connected, this one included. Who came is not known yet, nor what is left of a step in work."""
        self._replicas, self.others = replicas, inf if replicas > 1 else 0.0

    def computed(self, groups: int, seconds: float) -> None:
        """What this replica has computed of a step so far."""
        self.speed = groups / max(seconds, MICRO)

    @property
    def word(self) -> tuple[int, int]:
        """For the others, who `hear` the sum of all: groups in a million seconds; and 1, or 0 if not known."""
        return int(self.speed / MICRO), int(self.speed > 0)

    def hear(self, speeds: int, known: int) -> None:
        """Those whose speed is not known are taken to be like the rest."""
        if self.speed and known:
            self.others = max(0.0, speeds * MICRO * self._replicas / known / self.speed - 1)

    def count(self, left: float, busy: int, together_s: float) -> int:
        """How many groups to claim at once; several only if they are computed in less than `together_s`."""
        if self.others == inf:
            return 1
        share = (left - self.meanwhile(busy)) / (1 + self.others)  # all are ready at once if each takes its own
        fitting = share + min(0.5, self.others / (1 + self.others))
        return max(1, int(min(fitting, together_s * self.speed)))

    def allows(self, left: float, mine: int) -> bool:
        """Whether to claim more while it computes `mine`: so even the slowest has no more than one to finish at the end."""
        return left - self.meanwhile(mine) >= 1

    def meanwhile(self, mine: int) -> float:
        """Groups that others compute while this one computes `mine`."""
        return mine * self.others if mine else 0.0
