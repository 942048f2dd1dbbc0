"""Text that no Unicode text is, in the fields of every small record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from trajectories import ENV, TRAINER

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("text", ["\ud800", "a\udfffz"])
@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/register", TRAINER, ("wandb_group", "wandb_project", "checkpoint_dir")),
        ("/register-env", ENV, ("desired_name",)),
    ],
)
async def test_a_lone_surrogate_is_a_422_that_names_its_field(
    registered: httpx.AsyncClient, path: str, body: dict[str, Any], fields: Sequence[str], text: str
) -> None:
    for field in fields:
        response = await registered.post(path, content=json.dumps({**body, field: text}))
        assert response.status_code == 422
        [detail] = response.json()["detail"]
        assert detail["loc"] == ["body", field]
        assert detail["msg"].endswith("must be Unicode text without lone surrogates")
