"""What the trainer's tests share: a tiny model, rollout groups out of nowhere, and real trainer processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from lachesis.broker import Broker
from lachesis.broker.records.blobs import from_blob, to_blob
from lachesis.broker.records.entries import gid_of
from lachesis.broker.records.groups import Group, ScoredGroup
from lachesis.broker.records.packing import pack

VOCABULARY = 250
PATIENCE_S = 240.0  # for whatever a busy machine is slow with


def make_tiny_model(
    folder: Path, *, hidden: int = 32, tied: bool = False, vocab_size: int = 320, spread: float = 0.2
) -> Path:
    """A two-layer Qwen2 with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=spread,  # far from uniform, so that errors of position or mask show
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def scored_group(rng: random.Random, *, sequences: int = 4, turns: int = 1) -> ScoredGroup:
    """One prompt, `sequences` answers of 2 to 6 tokens in each of `turns`, a tool's 3 tokens between turns."""

    def words(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    prompt = words(rng.randint(2, 6))
    rows, masks, scores, log_probs = [], [], [], []
    for _ in range(sequences):
        tokens, trained = list(prompt), [False] * len(prompt)
        for turn in range(turns):
            if turn:
                tokens, trained = tokens + words(3), trained + [False] * 3
            answer = words(rng.randint(2, 6))
            tokens, trained = tokens + answer, trained + [True] * len(answer)
        rows.append(tokens)
        masks.append([token if yes else -100 for token, yes in zip(tokens, trained, strict=True)])
        scores.append(float(rng.randrange(5)))
        log_probs.append([rng.uniform(-6.5, -4.5) if yes else 1.0 for yes in trained])
    return ScoredGroup(tokens=rows, masks=masks, scores=scores, inference_logprobs=log_probs)


def stored(group: ScoredGroup, *, v_min: int = 0) -> Group:
    """The group as a trainer reads it from Redis."""
    return from_blob(to_blob(pack(group), gid_of(repr(group).encode()), v_min=v_min, v_max=v_min))


async def fill(broker: Broker, *, groups: int, first: int = 0) -> None:
    """Queue `groups` groups of four sequences; the n-th one is always the same."""
    for number in range(first, first + groups):
        group = scored_group(random.Random(number))
        assert await broker.queue.put(f"{number:08d}", group, v_min=0, v_max=0) == "stored"


def until(condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    """Wait until it holds, however long a busy machine takes."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def is_stopped(process: ForkServerProcess) -> bool:
    """Whether it waits for SIGCONT."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Start the process that trainers are forked from. It has imported verl, which saves each of them ten seconds."""
    context.set_forkserver_preload(["trainer_preload"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def start_trainer(
    url: str,
    run: str,
    state_dir: Path,
    overrides: Sequence[str],
    *,
    crash_at: str = "",
    log: Path | None = None,
    dry_run: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> ForkServerProcess:
    """A trainer as a process of its own, with its own state folder and log."""
    settings = {"redis_url": url, "run": run, "state_dir": state_dir, "overrides": list(overrides), "dry_run": dry_run}
    given = {**environment, "LACHESIS_CRASH_AT": crash_at}
    process = context.Process(target=_train, args=(settings, given, log or state_dir / "trainer.log"))
    process.start()
    return process


def _train(settings: dict[str, Any], environment: dict[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    from lachesis.trainer.main import run as run_trainer
    from lachesis.trainer.settings import TrainerSettings

    raise SystemExit(run_trainer(TrainerSettings(**settings)))
