"""Records of weights: published versions, their manifests, checkpoints, and the servers and pools that serve them."""

from __future__ import annotations

from msgspec import Struct


class WeightsEntry(Struct, frozen=True):
    """One published version (stream `weights:<policy>`, id `<version>-1`)."""

    version: int
    step: int
    uri: str
    manifest_sha256: str
    bytes: int
    dtype: str
    parent: int


class TensorInfo(Struct, frozen=True):
    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: F32, BF16, …


class FileInfo(Struct, frozen=True):
    bytes: int
    sha256: str


class Delta(Struct, frozen=True):
    """How one file of a version follows from the file of the same name of its base."""

    width: int  # bytes of an element
    base_sha256: str
    file: FileInfo  # the encoded difference
    whole: FileInfo  # the file that it gives


class Base(Struct, frozen=True):
    """The version that a version's deltas are to."""

    version: int
    uri: str
    manifest_sha256: str
    deltas: dict[str, Delta]  # by file; `<file>.delta` lies in its place


class Manifest(Struct, frozen=True):
    """What a published version consists of; `manifest.json` beside the files."""

    version: int
    step: int
    files: dict[str, FileInfo]
    tensors: dict[str, TensorInfo]
    base: Base | None = None  # None: all files lie there whole


class CheckpointManifest(Struct, frozen=True):
    """What a checkpoint consists of; `lachesis.json` beside the files."""

    step: int
    files: dict[str, FileInfo]


class ServerStatus(Struct, frozen=True):
    """Heartbeat of one inference server, kept by its agent (hash `pools`)."""

    server: str
    pool: str
    url: str
    state: str  # starting | ready | updating | draining | failed
    version: int  # served now; -1 before the first
    loading: int  # a version being read from the store now, -1 if none: the collector leaves it alone
    heartbeat: float
    updates: int = 0
    last_update_s: float = 0.0
    last_error: str = ""
    vocab_size: int = 0  # token ids are below it; 0 before the first model is loaded
    rule: str = "newest"  # its part of the pool's rule: newest | pin | canary | rest
    checksum: str = ""  # SGLang's, of the weights it serves; equal where the weights are
    prefix_key: str = ""  # of these weights, where cached prefixes of others stay in its cache; no load gets it again


class PoolRule(Struct, frozen=True):
    """Which version the servers of a pool serve (stream `rule:<pool>`; the newest entry is the rule)."""

    mode: str  # newest | pin | canary
    version: int = -1  # pin: everybody's; canary: that of a share of the servers
    rest: int = -1  # canary: everybody else's
    share: float = 0.0  # canary: of the pool's live servers
