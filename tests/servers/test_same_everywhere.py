"""What the broker promises of scripts, queue, versions and audit, on every server: its own tests, run again."""

from __future__ import annotations

import pytest
from test_audit import *  # noqa: F403
from test_concurrency import *  # type: ignore[assignment]  # noqa: F403
from test_queue_model import *  # type: ignore[assignment]  # noqa: F403
from test_scripts import *  # type: ignore[assignment]  # noqa: F403
from test_weights import *  # noqa: F403

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # type: ignore[assignment]
