"""Requests over several places that may fail: each has a bounded number in flight, and a lost one's go to the others.

A place is a server or a worker that completes one request a call. One that fails is asked for nothing until it
answers again, which may take as long as another place is at work, or `LOST_AFTER_S` where none is. Where nothing is
finished for `deadline_s`, the run ends; what one place does not finish in half of that goes to another.
"""

import abc
import asyncio
import contextlib
import logging
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

from ssd.engines.request import Request
from ssd.engines.vllm_decoding import refuse_late_truncation_first
from ssd.records import Sample

PROBE_S = 30.0  # a place is asked this often whether it is there: a machine that goes away closes no connection
PROBE_TIMEOUT_S = 30.0
MISSED_PROBES = 3  # after which what it was asked for goes to the others
MIN_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
LOST_AFTER_S = 900.0  # without any place; loading a large model takes minutes
MAX_FAILURES = 8  # of one request, before it is held to be the cause
DEADLINE_ENV = "SSD_DEADLINE_S"

logger = logging.getLogger(__name__)


def deadline_s(requests: Sequence[Request]) -> float:
    """Seconds without a finished sample that end a run: SSD_DEADLINE_S, or 20 minutes and half a second a token."""
    given = os.environ.get(DEADLINE_ENV)
    if given is None:
        return 1200 + 0.5 * max((request.decoding.max_tokens for request in requests), default=0)
    with contextlib.suppress(ValueError):
        if 0 < float(given) < math.inf:
            return float(given)
    raise ValueError(f"{DEADLINE_ENV}={given!r} is not a number of seconds above 0; set it so, or unset it")


class Unavailable(Exception):
    """A place did not complete a request that it, or another one, may complete later."""


class Busy(Unavailable):
    """A place has too much to do; the request is not to blame."""


class Place(abc.ABC):
    """Where requests are completed. `complete` and `ready` raise Unavailable; any other error ends the run."""

    def __init__(self, name: str):
        self.name = name
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self.up.set()
        self.down_since = self.finished_at = 0.0
        self.error: BaseException | None = None  # its last
        self.backoff_s = MIN_BACKOFF_S
        self.calls: set[asyncio.Task] = set()

    @abc.abstractmethod
    async def complete(self, request: Request) -> Sample:
        """The sample that the request asks for."""

    @abc.abstractmethod
    async def ready(self) -> None:
        """Return once the place can complete requests."""

    async def close(self) -> None:
        """Give back what it holds: by default nothing."""
        return

    def fail(self, error: BaseException) -> None:
        """Ask it for nothing more until it answers again."""
        self.error = error
        if self.up.is_set():
            self.up.clear()
            self.down.set()
            self.down_since = time.monotonic()
            logger.warning("%s failed (%s); its requests wait for it or go elsewhere", self.name, error)


class Pool:
    """An engine over `places`, each with at most `concurrency` requests in flight.

    `can_truncate_first` is whether the places were opened for requests that do: others would leave it out, in silence.
    """

    def __init__(self, places: Sequence[Place], concurrency: int, can_truncate_first: bool):
        self.places = places
        self.can_truncate_first = can_truncate_first
        self.concurrency = concurrency
        self.runner = asyncio.Runner()  # for as long as the engine lives: connections belong to their event loop
        weakref.finalize(self, _close, self.runner, places)

    def generate(self, requests: Iterable[Request]) -> Iterator[Sample]:
        requests = list(requests)
        refuse_late_truncation_first(requests, self.can_truncate_first)
        samples = self._complete(requests)

        async def advance() -> Sample | None:
            return await anext(samples, None)

        async def end() -> None:
            await samples.aclose()

        try:
            while (sample := self.runner.run(advance())) is not None:
                yield sample
        finally:
            with contextlib.suppress(RuntimeError):  # a signal's SystemExit left it in the middle of a step
                self.runner.run(end())

    async def _complete(self, requests: Sequence[Request]) -> AsyncIterator[Sample]:
        waiting: asyncio.LifoQueue[tuple[Request, int]] = asyncio.LifoQueue()  # what came back is the next to go
        finished: asyncio.Queue[Sample | Exception] = asyncio.Queue()
        for request in reversed(requests):
            waiting.put_nowait((request, 0))
        # Turn by turn, so that few requests are shared out evenly.
        width = min(self.concurrency, len(requests))
        deadline = deadline_s(requests)
        works = [_work(place, waiting, finished, deadline / 2) for _ in range(width) for place in self.places]
        tasks = [asyncio.create_task(work) for work in works]
        tasks += [asyncio.create_task(self._watch(place, finished)) for place in self.places]
        try:
            for _ in requests:
                outcome = await self._next(finished, deadline)
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            tasks += [call for place in self.places for call in place.calls]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _next(self, finished: asyncio.Queue, deadline: float) -> Sample | Exception:
        try:
            async with asyncio.timeout(deadline):
                return await finished.get()
        except TimeoutError:
            places = ", ".join(f"{place.name} ({place.error or 'no answer'})" for place in self.places)
            raise ValueError(
                f"no sample has finished for {deadline:g} s at {places}; finished samples are kept: see its log and "
                f"give the same command again, or set {DEADLINE_ENV} to more seconds"
            ) from None

    async def _watch(self, place: Place, finished: asyncio.Queue) -> None:
        """Notice that `place` is gone, though it says nothing, and that it is back."""
        missed = 0
        while True:
            if place.up.is_set() and not missed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_S):
                        await place.down.wait()
            if missed or not place.up.is_set():
                await asyncio.sleep(place.backoff_s)
                place.backoff_s = min(2 * place.backoff_s, MAX_BACKOFF_S)
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await place.ready()
            except (Unavailable, TimeoutError) as error:
                missed += 1
                if missed == MISSED_PROBES:
                    place.fail(error)
                    for call in place.calls:
                        call.cancel("no sign of life")
                now = time.monotonic()
                if all(not each.up.is_set() and now - each.down_since > LOST_AFTER_S for each in self.places):
                    lost = ValueError(
                        f"none of {', '.join(each.name for each in self.places)} has answered for {LOST_AFTER_S:g} s "
                        f"({error}); finished samples are kept: start one again and give the same command"
                    )
                    finished.put_nowait(lost)
                    return
            except Exception as error:
                finished.put_nowait(error)
                return
            else:
                if not place.up.is_set():
                    logger.warning("%s answers again", place.name)
                missed = 0
                place.down.clear()
                place.up.set()


def _close(runner: asyncio.Runner, places: Sequence[Place]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        for place in places:
            runner.run(place.close())
        runner.close()
    # Else it was collected amid another engine's work, where no loop may run: what it holds ends with the process.


async def _within(call: asyncio.Task, place: Place, limit_s: float) -> None:
    """Wait for `call`, and cancel it where `place` finishes nothing for `limit_s`."""
    began = time.monotonic()
    while not call.done():
        left_s = max(began, place.finished_at) + limit_s - time.monotonic()
        if left_s <= 0:
            call.cancel(f"nothing finished there for {limit_s:g} s")
        await asyncio.wait({call}, timeout=max(left_s, 0) or None)


def _error(call: asyncio.Task) -> BaseException | None:
    if not call.cancelled():
        return call.exception()
    try:
        call.result()
    except asyncio.CancelledError as error:
        return Unavailable(*error.args)


async def _work(place: Place, waiting: asyncio.LifoQueue, finished: asyncio.Queue, limit_s: float) -> None:
    """Complete one waiting request after the other at `place`."""
    while True:
        await place.up.wait()
        request, failures = await waiting.get()
        if not place.up.is_set():
            waiting.put_nowait((request, failures))
            continue
        call = asyncio.ensure_future(place.complete(request))
        place.calls.add(call)
        await _within(call, place, limit_s)
        place.calls.discard(call)
        error = _error(call)
        if error is None:
            place.finished_at = time.monotonic()
            place.backoff_s = MIN_BACKOFF_S
            finished.put_nowait(call.result())
        elif isinstance(error, Unavailable):
            failures += not isinstance(error, Busy)
            place.fail(error)
            if failures == MAX_FAILURES:
                error = ValueError(
                    f"problem {request.problem_id}, sample {request.sample_index} failed {failures} times, last at "
                    f"{place.name} ({error}); see that server's log, or drop the problem"
                )
                finished.put_nowait(error)
                return
            waiting.put_nowait((request, failures))
        else:
            finished.put_nowait(error)
            return
