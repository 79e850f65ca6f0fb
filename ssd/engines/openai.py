"""OpenAI-compatible servers (`vllm serve`) as an engine: any number of them, any of which may fail and come back."""

import json
import math
import os
import resource
from collections.abc import Sequence
from typing import Any

import openai

from ssd import adapters, models
from ssd.engines import (
    TRUNCATE_FIRST,
    Decoding,
    Request,
    in_vllm,
    max_model_len,
    refuse_penalty_before_truncation,
    truncates_first,
)
from ssd.engines.pool import PROBE_TIMEOUT_S, Busy, Place, Pool, Unavailable
from ssd.records import Sample

CONCURRENCY = 1000  # a server; the client library's bound on connections, and more than vLLM runs at once
# Drawn from one token at the highest temperature that a server takes: without truncation, chance would draw others.
LIKELIEST = Decoding(top_k=1, temperature=2.0, temperature_last=True, max_tokens=32)
SERVE_TRUNCATE_FIRST = "--logits-processors ssd.engines.vllm:TruncateFirst"


class OpenAIEngine(Pool):
    """Completions of token ids, by the client library, which tries broken requests twice more by itself.

    A server must serve `model` under the same path or hub id, or under its digest (`--served-model-name`).
    """

    num_gpus = math.nan

    def __init__(self, model: str, requests: Sequence[Request], urls: str):
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls.split(",")):
            raise ValueError(
                f"engine=openai:{urls} does not name its servers: engine=openai:http://host:8000/v1,http://other:8000/v1"
            )
        refuse_penalty_before_truncation(requests, "openai")
        adapters.refuse(model, "openai")
        length = max_model_len(requests, models.context_length(model))
        tokenizer = models.load_tokenizer(model)
        truncate_first = truncates_first(requests)
        places = [_Server(url, model, length, tokenizer) for url in urls.split(",")]
        super().__init__(places, CONCURRENCY, truncate_first)
        _allow_open_files(CONCURRENCY * len(self.places))
        for server in self.places:
            try:
                self.runner.run(server.check(requests[0], truncate_first))
            except Unavailable as error:
                raise ValueError(f"{server.name} does not answer ({error}); start it, or leave it out") from error


class _Server(Place):
    def __init__(self, url: str, model: str, max_model_len: int, tokenizer):
        super().__init__(url)
        self.model = model
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        # A completion may take an hour and sends nothing before its end: `ready` finds out who is gone.
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=openai.Timeout(None, connect=10.0),
        )

    async def check(self, request: Request, truncate_first: bool) -> None:
        """ValueError where the server cannot do what will be asked of it."""
        await self.ready()
        await self._choice(request, Decoding(temperature=0, max_tokens=1))
        if truncate_first:
            choice = await self._choice(request, LIKELIEST, logprobs=1, ignore_eos=True)
            likeliest = [max(top.values()) for top in choice["logprobs"]["top_logprobs"]]
            if choice["logprobs"]["token_logprobs"] != likeliest:
                raise ValueError(
                    f"{self.name} does not truncate before it tempers (temperature_last, or a temperature above 2); "
                    "serve the model with "
                    f"{SERVE_TRUNCATE_FIRST} where this package is installed, or use engine=vllm"
                )

    async def ready(self) -> None:
        client = self.client.with_options(max_retries=0, timeout=PROBE_TIMEOUT_S)
        cards = {card.id: card for card in (await self._answer(client.models.list())).data}
        if self.model not in cards:
            digest = models.digest(self.model)
            if digest not in cards:
                raise ValueError(
                    f"{self.name} serves {', '.join(cards)}, not {self.model}; give the served path as model, or serve "
                    f"the model with --served-model-name {digest}"
                )
            self.model = digest
        room = getattr(cards[self.model], "max_model_len", None) or math.inf
        if room < self.max_model_len:
            raise ValueError(
                f"{self.name} has room for {room} tokens, and the longest request needs {self.max_model_len}; serve "
                f"the model with --max-model-len {self.max_model_len}"
            )

    async def close(self) -> None:
        await self.client.close()

    async def complete(self, request: Request) -> Sample:
        decoding = request.decoding
        choice = await self._choice(request, decoding)
        token_ids, finish_reason = choice["token_ids"], choice["finish_reason"]
        if finish_reason not in ("stop", "length"):
            raise Unavailable(f"it ended a completion with {finish_reason!r}")
        if finish_reason == "length" and len(token_ids) < decoding.max_tokens:
            raise ValueError(
                f"{self.name} cuts completions off at {len(token_ids)} tokens, before max_tokens="
                f"{decoding.max_tokens}; serve the model without --override-generation-config"
            )
        return Sample(
            problem_id=request.problem_id,
            sample_index=request.sample_index,
            prompt_token_ids=list(request.prompt_token_ids),
            token_ids=token_ids,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=finish_reason,
            cumulative_logprob=sum(choice["logprobs"]["token_logprobs"]),
        )

    async def _choice(self, request: Request, decoding: Decoding, logprobs: int = 0, **more: Any) -> dict:
        # Every setting is given: what is not, a server takes from the model's generation_config.json.
        asked, first = in_vllm(decoding)
        if first:
            asked["vllm_xargs"] = {TRUNCATE_FIRST: first}
        response = await self._answer(
            self.client.completions.with_raw_response.create(
                model=self.model,
                prompt=list(request.prompt_token_ids),
                temperature=asked.pop("temperature"),
                presence_penalty=asked.pop("presence_penalty"),
                frequency_penalty=0.0,
                max_tokens=decoding.max_tokens,
                stop=list(decoding.stop) or None,
                seed=request.seed,
                logprobs=logprobs,  # 0: the drawn token's own, under the untouched model
                extra_body=asked | {"return_token_ids": True} | more,
            )
        )
        choice = json.loads(response.content)["choices"][0]  # the library would make an object of each token
        if choice.get("token_ids") is None or not choice.get("logprobs"):
            raise ValueError(f"{self.name} returns no token ids or no log-probabilities; it must be a vLLM >= 0.10.2")
        return choice

    async def _answer(self, call):
        try:
            return await call
        except openai.RateLimitError as error:
            raise Busy(_line(error)) from error
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            raise Unavailable(_line(error)) from error
        except openai.APIStatusError as error:
            raise ValueError(f"{self.name} refuses a request: {_line(error)}") from error


def _line(error: openai.APIError) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())[:500]


def _allow_open_files(number: int) -> None:
    """Raise the soft limit of open files, often 1,024, by one for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
