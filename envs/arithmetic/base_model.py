"""The model the arithmetic demo starts from: made here, in seconds, from a seed.

Two layers of Qwen2's architecture over bytes, taught by a short supervised warm-up: first by right answers, which show
it the format and what to look at, then by labels that are mostly a plausible mistake. So it samples right answers about
a third of the time and prefers the mistake; telling right from wrong is left to reinforcement learning. `python -m lachesis.envs.arithmetic.base_model --out DIR --seed N`, or `lachesis base-model`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from lachesis.broker.errors import ConfigurationError
from lachesis.envs.arithmetic.tasks import Arithmetic, wrong_answer
from lachesis.service.settings import make_folder

PAD, EOS = 0, 1
SPECIALS = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
VOCAB = 320  # 256 bytes and the special tokens, rounded up
POSITIONS = 128  # tokens of a sequence
WARM_UP_STEPS = 320
WARM_UP_BATCH = 128
WARM_UP_LR = 3e-3
CLEAN = 0.7  # share of the steps before any label is wrong
NOISE = 0.65  # share of labels after them that are the plausible mistake
SHOW_EVERY = 40


def ensure_base_model(
    folder: Path | str, seed: int, on_progress: Callable[[str], None] = lambda text: None, *, steps: int = WARM_UP_STEPS
) -> Path:
    """The folder with model and tokenizer, made unless it exists; whole or absent, and made once if many ask at a time."""
    folder = Path(folder).absolute()
    make_folder("--out", folder.parent)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            if not (folder / "config.json").is_file():
                raise ConfigurationError(f"--out = {str(folder)!r}: is there, and is no model; give another folder")
            return folder
        temporary = folder.parent / f".tmp-{folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        make_tokenizer().save_pretrained(temporary)
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # else the order of sums, and with it the weights, would depend on the machine
        try:
            make_model(seed, on_progress, steps=steps).save_pretrained(temporary)
        finally:
            torch.set_num_threads(threads)
        os.replace(temporary, folder)
    return folder


def make_tokenizer() -> Any:
    """Byte-level, without merges: whatever version of transformers loads it, a text has one encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[PAD],
        eos_token=SPECIALS[EOS],
        additional_special_tokens=SPECIALS[2:],
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int, on_progress: Callable[[str], None], *, steps: int) -> Any:
    """The warmed-up model: float32, about 0.8 million parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(f"warm-up {seed}")
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / max(1, steps)))
    )
    problems = Arithmetic().training(seed)
    for step in range(1, steps + 1):
        batch = list(islice(problems, WARM_UP_BATCH))
        noise = NOISE if step > CLEAN * steps else 0.0
        labels = [wrong_answer(problem) if rng.random() < noise else problem.answer for problem in batch]
        prompts = [tokenizer.encode(problem.prompt) for problem in batch]
        answers = [[*tokenizer.encode(label), EOS] for label in labels]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((len(batch), longest), PAD)
        targets = torch.full((len(batch), longest), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            targets[row, len(prompt) : end] = torch.tensor(answer)
        loss = model(ids, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % SHOW_EVERY == 0 or step == steps:
            on_progress(f"warm-up step {step}/{steps}  loss {loss.item():.3f}")
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, EOS
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder to make; one that exists is left as it is")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    folder = ensure_base_model(chosen.out, chosen.seed, lambda text: print(text, flush=True))
    print(json.dumps({"folder": str(folder), "seed": chosen.seed}))


if __name__ == "__main__":
    main()
