"""The files of a model in Hugging Face's layout that tell whether a folder holds a tokenizer: one of them is enough."""

from __future__ import annotations

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SERVED_TOKENIZER_FILES = (*TOKENIZER_FILES, "tekken.json")  # which SGLang reads, and verl does not
