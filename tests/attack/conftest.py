"""What attacks share with the tests of the rooms that they attack."""

from __future__ import annotations

import sys
from pathlib import Path

for _room in ("shim", "inference"):
    sys.path.append(str(Path(__file__).parents[1] / _room))
