"""A small inference server for tests: SGLang's /generate and OpenAI's completions, answered by transformers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoTokenizer, Qwen2ForCausalLM


class TinyModel:
    """Samples from a model folder; every step recomputes the whole sequence, which is short."""

    def __init__(self, folder: Path) -> None:
        self.model = Qwen2ForCausalLM.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.authorizations: set[str | None] = set()

    @torch.no_grad()
    def sample(self, prompt: list[int], count: int, temperature: float) -> list[list[tuple[float, int]]]:
        """`count` answers to a prompt, each a list of (log-prob, token id) that ends with EOS or has four tokens."""
        answers = []
        for _ in range(count):
            answer: list[tuple[float, int]] = []
            while not answer or (len(answer) < 4 and answer[-1][1] != self.tokenizer.eos_token_id):
                ids = torch.tensor([prompt + [token for _, token in answer]])
                logprobs = torch.log_softmax(self.model(ids).logits[0, -1], -1)
                token = int(logprobs.argmax() if temperature == 0 else torch.multinomial(logprobs.exp(), 1))
                answer.append((float(logprobs[token]), token))
            answers.append(answer)
        return answers

    def text(self, answer: list[tuple[float, int]]) -> str:
        return str(self.tokenizer.decode([token for _, token in answer], skip_special_tokens=True))

    async def generate(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.calls.append(("generate", body))
        self.authorizations.add(request.headers.get("authorization"))
        sampling = body["sampling_params"]
        answers = self.sample(body["input_ids"], sampling.get("n", 1), sampling["temperature"])
        results = [
            {
                "text": self.text(answer),
                "output_ids": [token for _, token in answer],
                "meta_info": {
                    "finish_reason": {"type": "stop" if answer[-1][1] == self.tokenizer.eos_token_id else "length"},
                    "output_token_logprobs": [[logprob, token, None] for logprob, token in answer],
                    "weight_version": "0",
                },
            }
            for answer in answers
        ]
        return JSONResponse(results if len(results) > 1 else results[0])

    async def completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.calls.append(("completions", body))
        self.authorizations.add(request.headers.get("authorization"))
        prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
        choices = [
            {"index": index, "text": self.answer(prompt, body), "finish_reason": "stop", "logprobs": None}
            for index, prompt in enumerate(prompts)
        ]
        return JSONResponse(self.envelope("text_completion", choices[::-1]))  # in no promised order

    async def chat_completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.calls.append(("chat/completions", body))
        prompt = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        message = {"role": "assistant", "content": self.answer(prompt, body)}
        return JSONResponse(
            self.envelope("chat.completion", [{"index": 0, "message": message, "finish_reason": "stop"}])
        )

    def answer(self, prompt: str, body: dict[str, Any]) -> str:
        return self.text(self.sample(self.tokenizer.encode(prompt), 1, body["temperature"])[0])

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": "1", "created": 1, "model": "tiny", "object": kind, "choices": choices}


@contextmanager
def serving(model: TinyModel) -> Iterator[str]:
    """The address of a server of `model`, which lives in a thread."""
    app = Starlette(
        routes=[
            Route("/generate", model.generate, methods=["POST"]),
            Route("/v1/completions", model.completions, methods=["POST"]),
            Route("/v1/chat/completions", model.chat_completions, methods=["POST"]),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
    started = threading.Event()
    startup = server.startup

    async def startup_and_tell(*arguments: Any, **keywords: Any) -> None:
        await startup(*arguments, **keywords)
        started.set()

    server.startup = startup_and_tell  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(20)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
