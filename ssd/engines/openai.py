"""OpenAI-compatible servers (`vllm serve`) as an engine: any number of them, any of which may fail and come back."""

import asyncio
import contextlib
import json
import math
import os
import resource
import uuid
from collections.abc import Sequence
from typing import Any

import openai

from ssd import adapters, models
from ssd.decoding import Decoding
from ssd.engines import pool
from ssd.engines.pool import Busy, Place, Pool, Unavailable
from ssd.engines.request import Request, max_model_len
from ssd.engines.vllm_decoding import TRUNCATE_FIRST, in_vllm, refuse_penalty_before_truncation, truncates_first
from ssd.records import Sample

CONCURRENCY = 1000  # a server; the client library's bound on connections, and more than vLLM runs at once
# Drawn from one token at the highest temperature that a server takes: without truncation, chance would draw others.
LIKELIEST = Decoding(top_k=1, temperature=2.0, temperature_last=True, max_tokens=32)
CHECKS = 3  # of a server before it is held not to be there
TRANSIENT = (408, 409)  # statuses below 500 that may pass
SERVE_TRUNCATE_FIRST = "--logits-processors ssd.engines.truncate_first:TruncateFirst"


class OpenAIEngine(Pool):
    """Completions of token ids, each checked against what was asked; what is not as asked is asked for again.

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
        limit_s = pool.deadline_s(requests) / 2
        for server in self.places:
            self.runner.run(server.check(requests[0], truncate_first, limit_s))


class BadReply(Unavailable):
    """A server's reply is not what was asked of it."""


class _Server(Place):
    def __init__(self, url: str, model: str, max_model_len: int, tokenizer):
        super().__init__(url)
        self.model = model
        self.max_model_len = max_model_len
        self.tokenizer = tokenizer
        self.end_ids = models.end_ids(model)
        self.num_tokens = max(models.load_config(model).get_text_config().vocab_size, len(tokenizer))
        self.echoes_ids = False  # `check` finds out
        # A completion may take an hour and sends nothing before its end: `ready` finds out who is gone, and the pool
        # gives up what is too long in coming.
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=openai.Timeout(None, connect=10.0),
            max_retries=0,  # the pool tries again, and elsewhere
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def check(self, request: Request, truncate_first: bool, limit_s: float) -> None:
        """ValueError where the server does not answer within `limit_s`, or cannot do what will be asked of it."""
        error: Exception = Unavailable(f"nothing within {limit_s:g} s")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for _ in range(CHECKS):
                    try:
                        return await self._check(request, truncate_first)
                    except Unavailable as unavailable:
                        error = unavailable
                    await asyncio.sleep(pool.MIN_BACKOFF_S)
        raise ValueError(f"{self.name} does not answer ({error}); start it, or leave it out") from error

    async def _check(self, request: Request, truncate_first: bool) -> None:
        await self.ready()
        greedy = Decoding(temperature=0, max_tokens=1)
        reply, request_id = await self._completion(request, greedy)
        choice = _choice_of(reply)
        if any(not choice.get(name) for name in ("token_ids", "prompt_token_ids", "logprobs")):
            raise ValueError(f"{self.name} returns no token ids or no log-probabilities; it must be a vLLM >= 0.10.2")
        self.echoes_ids = str(reply.get("id")).endswith(request_id)
        self._checked(choice, request, greedy)
        if truncate_first:
            reply, _ = await self._completion(request, LIKELIEST, logprobs=1, ignore_eos=True)
            choice = _choice_of(reply)
            _, logprobs = self._checked(choice, request, LIKELIEST)
            if logprobs != [max(top.values()) for top in choice["logprobs"]["top_logprobs"]]:
                raise ValueError(
                    f"{self.name} does not truncate before it tempers (temperature_last, or a temperature above 2); "
                    "serve the model with "
                    f"{SERVE_TRUNCATE_FIRST} where this package is installed, or use engine=vllm"
                )

    async def ready(self) -> None:
        reply = await self._reply(self.client.models.with_raw_response.list(timeout=pool.PROBE_TIMEOUT_S))
        cards = reply.get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) and card.get("id") for card in cards):
            raise BadReply("it lists no models")
        cards = {str(card["id"]): card for card in cards}
        if self.model not in cards:
            digest = models.digest(self.model)
            if digest not in cards:
                raise ValueError(
                    f"{self.name} serves {', '.join(cards)}, not {self.model}; give the served path as model, or serve "
                    f"the model with --served-model-name {digest}"
                )
            self.model = digest
        room = cards[self.model].get("max_model_len") or math.inf
        if not isinstance(room, int | float):
            raise BadReply(f"it gives {str(room)[:80]!r} as max_model_len")
        if room < self.max_model_len:
            raise ValueError(
                f"{self.name} has room for {room} tokens, and the longest request needs {self.max_model_len}; serve "
                f"the model with --max-model-len {self.max_model_len}"
            )

    async def close(self) -> None:
        await self.client.close()

    async def complete(self, request: Request) -> Sample:
        reply, request_id = await self._completion(request, request.decoding)
        choice = _choice_of(reply)
        if self.echoes_ids and not str(reply.get("id")).endswith(request_id):
            raise BadReply(f"it answers request {str(reply.get('id'))[:80]!r}, and was asked {request_id!r}")
        token_ids, logprobs = self._checked(choice, request, request.decoding)
        return Sample(
            problem_id=request.problem_id,
            sample_index=request.sample_index,
            prompt_token_ids=list(request.prompt_token_ids),
            token_ids=token_ids,
            text=self.tokenizer.decode(token_ids, skip_special_tokens=True),
            finish_reason=choice["finish_reason"],
            cumulative_logprob=sum(logprobs),
        )

    async def _completion(
        self, request: Request, decoding: Decoding, logprobs: int = 0, **more: Any
    ) -> tuple[dict, str]:
        """The server's reply, and the id that it was asked under."""
        # Every setting is given: what is not, a server takes from the model's generation_config.json.
        asked, first = in_vllm(decoding)
        if first:
            asked["vllm_xargs"] = {TRUNCATE_FIRST: first}
        request_id = uuid.uuid4().hex
        reply = await self._reply(
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
                extra_headers={"X-Request-Id": request_id},  # vLLM answers under this id
            )
        )
        return reply, request_id

    async def _reply(self, call) -> dict:
        """The JSON object that the server answers."""
        try:
            response = await call
        except openai.RateLimitError as error:
            raise Busy(_line(error)) from error
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            raise Unavailable(_line(error)) from error
        except openai.APIStatusError as error:
            if error.status_code in TRANSIENT:
                raise Unavailable(_line(error)) from error
            raise ValueError(f"{self.name} refuses a request: {_line(error)}") from error
        try:
            reply = json.loads(response.content)  # the library would make an object of each token
        except (ValueError, RecursionError) as error:
            raise BadReply(f"its reply is no JSON: {response.content[:80]!r}") from error
        if not isinstance(reply, dict):
            raise BadReply(f"its reply is no JSON object: {response.content[:80]!r}")
        return reply

    def _checked(self, choice: dict, request: Request, decoding: Decoding) -> tuple[list[int], list[float]]:
        """Token ids and log-probabilities of `choice`; BadReply where it is no answer to `request`."""
        token_ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if choice.get("prompt_token_ids") != list(request.prompt_token_ids):
            raise BadReply("it answers another prompt than it was asked")
        if not isinstance(token_ids, list) or not 0 < len(token_ids) <= decoding.max_tokens:
            length = len(token_ids) if isinstance(token_ids, list) else "no list of"
            raise BadReply(f"it gives {length} tokens, and was asked for 1 to {decoding.max_tokens}")
        strange = [each for each in token_ids if type(each) is not int or not 0 <= each < self.num_tokens]
        if strange:
            raise BadReply(
                f"it gives the token id {str(strange[0])[:80]!r}; the model's are 0 to {self.num_tokens - 1}"
            )
        if reason not in ("stop", "length"):
            raise BadReply(f"it ended a completion with {str(reason)[:80]!r}")
        if reason == "length" and len(token_ids) < decoding.max_tokens:
            raise BadReply(
                f"it cuts completions off at {len(token_ids)} tokens, before max_tokens={decoding.max_tokens}; serve "
                "the model without --override-generation-config"
            )
        if reason == "stop" and not self._ends(token_ids, decoding.stop):
            raise BadReply(f"it says stop, and the last token, {token_ids[-1]}, is none that ends a completion")
        return token_ids, _logprobs(choice, len(token_ids))

    def _ends(self, token_ids: Sequence[int], stop: Sequence[str]) -> bool:
        if token_ids[-1] in self.end_ids:
            return True
        texts = [self.tokenizer.decode(token_ids, skip_special_tokens=skip) for skip in (True, False)] if stop else []
        return any(end in text for end in stop for text in texts)


def _choice_of(reply: dict) -> dict:
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadReply(f"its reply has not one choice: {str(choices)[:80]}")
    return choices[0]


def _logprobs(choice: dict, length: int) -> list[float]:
    """The log-probability of each of `length` tokens."""
    content = choice.get("logprobs")
    logprobs = content.get("token_logprobs") if isinstance(content, dict) else None
    if not isinstance(logprobs, list) or len(logprobs) != length:
        raise BadReply(f"it gives {length} tokens and not as many log-probabilities")
    if strange := [each for each in logprobs if type(each) not in (int, float) or not math.isfinite(each)]:
        raise BadReply(f"it gives {str(strange[0])[:80]!r} as a log-probability")
    return logprobs


def _line(error: openai.APIError) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())[:500]


def _allow_open_files(number: int) -> None:
    """Raise the soft limit of open files, often 1,024, by one for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + number if hard == resource.RLIM_INFINITY else min(soft + number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
