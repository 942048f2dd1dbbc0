"""Sums that do not depend on the order of their terms, so that it does not show who added what to them, and when.

Floating-point addition rounds, and what it rounds depends on what came before. Here each term is first split into two
parts on fixed grids, of which so many can be added without rounding that a step never gets there: a coarse one of
2**-20, whose sum is exact below 2**33 in magnitude, and what that leaves on a grid of 2**-62, exact for 2**11 terms. Only
the total is rounded, once (pre-rounded summation; Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

COARSE, FINE = 2.0**20, 2.0**62


class ReproducibleSum:
    """Sums of flat tensors of `size` elements: `parts` may be added elementwise to those of others, in any order."""

    def __init__(self, size: int) -> None:
        self.parts = torch.zeros(2, size, dtype=torch.float64)

    def add(self, terms: Tensor, *, start: int = 0) -> None:
        """Add to the elements from `start` on. What is not finite makes its element's total not finite."""
        values = terms.detach().reshape(-1).to("cpu", torch.float64)
        coarse = torch.round(values * COARSE) / COARSE
        fine = torch.round((values - coarse) * FINE) / FINE
        here = slice(start, start + len(values))
        self.parts[0, here] += coarse
        self.parts[1, here] += fine


def total(parts: Tensor) -> Tensor:
    """float64 (size,) of an ReproducibleSum's parts."""
    return parts[0] + parts[1]
