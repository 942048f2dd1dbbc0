"""Hugging Face's log-probs of what a server generated, to compare with those the server gave."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

BATCH = 256  # sequences


class Reference:
    """Models by version, loaded from the folder that `folder_of` names."""

    def __init__(self, folder_of: Callable[[int], Path]) -> None:
        self._folder_of = folder_of
        self._models: dict[int, Any] = {}

    def difference(self, calls: Iterable[tuple[dict[str, Any], int, Any]]) -> tuple[int, float]:
        """(tokens compared, largest |Δ log-prob|), each token under the version that the server says made it."""
        rows: dict[tuple[int, int, int], list[tuple[list[int], list[float], int, int]]] = defaultdict(list)
        for body, _, answer in calls:
            meta, prompt = answer["meta_info"], body["input_ids"]
            given = [token[0] for token in meta["output_token_logprobs"]]
            tokens = prompt + answer["output_ids"]
            for span in meta["weight_versions"]:
                key = (int(span["version"]), len(tokens), len(prompt))
                rows[key].append((tokens, given, span["start"], span["end"]))
        compared, largest = 0, 0.0
        for (version, _, prompt_length), found in rows.items():
            for begin in range(0, len(found), BATCH):
                batch = found[begin : begin + BATCH]
                ours = self.log_probs(version, torch.tensor([tokens for tokens, *_ in batch]))[:, prompt_length - 1 :]
                for row, (_, given, start, end) in zip(ours, batch, strict=True):
                    delta = (row[start:end] - torch.tensor(given[start:end])).abs()
                    assert bool(torch.isfinite(delta).all())
                    compared += end - start
                    largest = max(largest, float(delta.max()) if end > start else 0.0)
        return compared, largest

    def log_probs(self, version: int, tokens_B_T: torch.Tensor) -> torch.Tensor:
        """(B, T-1): of each token but the first, given those before it."""
        if version not in self._models:
            self._models[version] = AutoModelForCausalLM.from_pretrained(self._folder_of(version), dtype=torch.float32)
        with torch.no_grad():
            logits = self._models[version](tokens_B_T).logits[:, :-1]
        return torch.log_softmax(logits, -1).gather(-1, tokens_B_T[:, 1:, None])[..., 0]
