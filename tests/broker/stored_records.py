"""One example of every record that is kept, and the bytes that a release writes for it: `stored_records.json`.

The file is committed and stays as it is: what a release has written must stay readable. To write it anew for a release
that keeps another kind of record, run `PYTHONPATH=src python tests/broker/stored_records.py`. It uses the same code that
the product writes with, `to_entry` for the entries of streams, `msgspec.json` for fields of hashes, `to_blob` for groups.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from lachesis.broker.records.blobs import to_blob
from lachesis.broker.records.entries import to_entry
from lachesis.broker.records.groups import DeadEntry, GroupEntry, Lineage, ScoredGroup
from lachesis.broker.records.packing import pack
from lachesis.broker.records.registrations import ArchiverStatus, EnvConfig, EnvRecord, TokenRecord, TrainerConfig
from lachesis.broker.records.steps import BatchEntry, LedgerEntry
from lachesis.broker.records.versions import (
    Base,
    Delta,
    FileInfo,
    Manifest,
    PoolRule,
    ServerStatus,
    TensorInfo,
    WeightsEntry,
)
from lachesis.broker.run.lineage import to_record

FILE = Path(__file__).with_suffix(".json")

ENTRIES: tuple[Struct, ...] = (  # of streams
    GroupEntry(
        gid="1f", env="0", n=2, tok=6, score_mean=0.5, score_std=0.25, v_min=3, v_max=4, bytes=231, codec="mp2z"
    ),
    BatchEntry(7, ("1f", "2e"), 4, 12, 3, 4, 1790000000.25, 462),
    LedgerEntry(7, ("1f", "2e"), 4, 12, 6, 7, 3, 3, "left", 0.5, 0.125, 1.5, 1790000001.5),
    DeadEntry("1f", "stale", 2, "its oldest tokens are of version 1"),
    WeightsEntry(7, 7, "file:///w/7", "ab" * 32, 1024, "BF16", 6),
    PoolRule("canary", 7, 6, 0.25),
)
ENV = EnvConfig(512, "sums", 1.5, 8, 0.25)
FIELDS: tuple[Struct, ...] = (  # of hashes, and files
    TrainerConfig("group", "project", 64, 2048, "/checkpoints", 10, 3, 1000),
    ENV,
    EnvRecord(0, "sums_0", ENV, True, 1790000000.5),
    ServerStatus("s:1", "main", "http://s:1", "ready", 7, -1, 1790000000.5, 3, 0.25, "", 32000, "newest", "c0", "p1"),
    ArchiverStatus("host:12", "file:///a", "main", 4096, 1790000000.5),
    TokenRecord("ci", "trainer", "cd" * 32, 1790000000.5),
    Manifest(
        7,
        7,
        {"m.safetensors": FileInfo(10, "ef" * 32)},
        {"w": TensorInfo("m.safetensors", (2, 3), "BF16")},
        Base(
            6, "file:///w/6", "ab" * 32, {"m.safetensors": Delta(2, "01" * 32, FileInfo(5, "02"), FileInfo(10, "03"))}
        ),
    ),
)
LINEAGE = Lineage(3, 4, ((3, 0, 2), (4, 2, 3)), np.array([-0.5, -0.25, -1], "<f4").tobytes())
GROUP = ScoredGroup(
    tokens=[[1, 2, 2**40], [1, 3]],
    masks=[[-100, 2, 2**40], [-100, 3]],
    scores=[1.0, 0.25],
    advantages=[[0.5, 0.5, 0.5], [-0.5, -0.5]],
    inference_logprobs=[[1.0, -0.5, -0.1], [1.0, -0.25]],
    messages=[[{"role": "user", "content": "1+1?"}], []],
    env_id=3,
)
VERSIONS = [((3, 1, 2), (4, 2, 3)), ((4, 1, 2),)]


def blob() -> bytes:
    return to_blob(pack(GROUP), "1f", v_min=3, v_max=4, versions=list(VERSIONS))


def written() -> dict[str, Any]:
    """By kind of record, what this code writes."""
    entries = {type(record).__name__: to_entry(record) for record in ENTRIES}
    fields = {type(record).__name__: msgspec.json.encode(record).decode() for record in FIELDS}
    binary = {"Lineage": to_record(LINEAGE), "Group": blob()}
    return {
        "entries": entries,
        "fields": fields,
        "binary": {name: base64.b64encode(value).decode() for name, value in binary.items()},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(written(), indent=1) + "\n")
