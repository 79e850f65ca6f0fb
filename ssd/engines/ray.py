"""vLLM on an existing Ray cluster as an engine: a worker for each free GPU; a lost worker's requests are done again."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

import ssd
from ssd import adapters, models
from ssd.engines.pool import Place, Pool, Unavailable
from ssd.engines.request import Request, max_model_len
from ssd.engines.vllm_decoding import refuse_penalty_before_truncation, truncates_first
from ssd.records import Sample

CONCURRENCY = 1000  # a worker; more than vLLM runs at once, so that it never waits


class RayEngine(Pool):
    """`address` is the cluster's, `HOST:PORT`; empty, it is found as Ray finds it (RAY_ADDRESS, a local cluster).

    Every node needs this environment, and the model under the same path. A cluster without GPUs gets a worker for
    each CPU.
    """

    def __init__(self, model: str, requests: Sequence[Request], address: str = ""):
        refuse_penalty_before_truncation(requests, "ray")
        adapters.refuse(model, "ray")
        length, first = max_model_len(requests, models.context_length(model)), truncates_first(requests)
        models.load_tokenizer(model)
        try:
            if address:  # Ray would try for five minutes
                socket.create_connection(address.rsplit(":", 1), timeout=10).close()
            if not ray.is_initialized():
                ray.init(address or "auto", runtime_env={"py_modules": [ssd]}, log_to_driver=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"engine=ray finds no cluster at {address or 'auto'} ({error}); start one with `ray start --head`"
            ) from error
        self.num_gpus = float(ray.cluster_resources().get("GPU", 0))
        unit = "GPU" if self.num_gpus else "CPU"
        free = int(ray.available_resources().get(unit, 0))
        if not free:
            raise ValueError(f"engine=ray: every {unit} of the cluster is taken; wait, or end what runs there")
        self.num_gpus = float(free) if self.num_gpus else 0.0
        # A worker that is lost is started again, elsewhere if need be; what it was doing is asked for again by Pool.
        actor = ray.remote(max_restarts=-1, max_concurrency=2 * CONCURRENCY, **{f"num_{unit.lower()}s": 1})(_Actor)
        workers = [_Worker(f"worker {number}", actor.remote(model, length, first)) for number in range(free)]
        super().__init__(workers, CONCURRENCY, first)
        for worker in self.places:
            self.runner.run(worker.start())


class _Worker(Place):
    def __init__(self, name: str, actor: Any):
        super().__init__(name)
        self.actor = actor

    async def start(self) -> None:
        try:
            await self.ready()
        except Unavailable as error:
            raise ValueError(f"engine=ray: {self.name} does not start: {error}") from error

    async def complete(self, request: Request) -> Sample:
        return await self._answer(self.actor.complete.remote(request))

    async def ready(self) -> None:
        await self._answer(self.actor.ready.remote())

    async def _answer(self, reference: ray.ObjectRef) -> Any:
        try:
            return await reference
        except RayActorError as error:
            raise Unavailable(" ".join(str(error).split())[-500:]) from error
        except RayError as error:
            raise RuntimeError(f"{self.name}: {error}") from error


class _Actor:
    """Lives on the cluster, beside one GPU."""

    def __init__(self, model: str, max_model_len: int, truncate_first: bool):
        from ssd.engines.vllm import AsyncVLLM

        self.engine = AsyncVLLM(model, max_model_len, truncate_first)

    async def complete(self, request: Request) -> Sample:
        try:
            return await self.engine.complete(request)
        except Exception:
            await self.ready()
            raise

    async def ready(self) -> None:
        try:
            await self.engine.ready()
        except Exception:
            os._exit(1)  # vLLM's own process has died: this one ends too, so that Ray starts another
