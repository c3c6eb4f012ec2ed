"""Which sequences an encoder computes together, in a thread of its own, and the asyncio side that waits for results.

Clients take turns: a batch begins with the shortest waiting sequence of whoever was served longest ago, and is filled
with those of all clients that are about as long, so that little of it is padding. A client that hangs up takes what it
had waiting along; one batch, which is short, is computed to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from itertools import chain, islice, repeat, zip_longest

import torch
from torch import Tensor

from serve.engine.async_engine import EngineDeadError, QueueFullError
from serve.engine.encoder import EncoderEngine
from serve.engine.encoder_models import EncoderInput
from serve.engine.sampler import NotFiniteError

logger = logging.getLogger(__name__)

WINDOW = 512  # sequences among which a batch is chosen
FREE_TOKENS = 64  # so few cost the reading of the weights and little more, padding or not
REAL_SHARE = 0.8  # of a larger batch


@dataclass(eq=False)
class Job:
    """One request: some sequences, and their results as they come."""

    inputs: list[EncoderInput]
    activate: bool
    future: asyncio.Future[list[list[float]]]
    waiting: list[int] = field(init=False)  # places in `inputs`, the shortest first
    rows: dict[int, Tensor] = field(default_factory=dict)
    closed: bool = False
    arrival: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.inputs)), key=lambda place: len(self.inputs[place]))


Item = tuple[Job, int]
"""A sequence: its request, and its place in there."""


@dataclass
class EncoderStats:
    """Counters since the start; `computed_tokens` includes padding."""

    steps: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0


class AsyncEncoder:
    def __init__(self, engine: EncoderEngine, max_queue: int) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self.failure: BaseException | None = None
        self.stats = EncoderStats()
        self.num_running = 0
        self._jobs: list[Job] = []  # with something waiting; who was served longest ago comes first
        self._open: set[Job] = set()
        self._unanswered = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)

    def start(self) -> None:
        """Call inside the event loop that will serve the requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Stop after the batch that is being computed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def alive(self) -> bool:
        return self.failure is None

    @property
    def num_open(self) -> int:
        """Requests that are not completely answered yet."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Sequences that are asked for and not being computed."""
        return max(0, self._unanswered - self.num_running)

    def submit(self, inputs: list[EncoderInput], activate: bool = True) -> Job:
        """Queue a request; raises ValueError, QueueFullError or EngineDeadError, and otherwise must be closed."""
        if self.failure is not None:
            raise EngineDeadError("the engine has failed; restart the server")
        for given in inputs:
            self.engine.check_input(given)
        # A request larger than the whole queue is let in when nothing else waits: it could never be served otherwise.
        if self._unanswered and self._unanswered + len(inputs) > self.max_queue + self.engine.max_num_seqs:
            raise QueueFullError(f"{self._unanswered} sequences are computed or waiting already; try again later")
        job = Job(inputs, activate, asyncio.get_running_loop().create_future())
        self._open.add(job)
        self._unanswered += len(inputs)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job

    async def results(self, job: Job) -> list[list[float]]:
        """The numbers of each sequence; closes the request, also when the wait is cancelled."""
        try:
            return await job.future
        finally:
            self.close(job)

    def close(self, job: Job) -> None:
        """Forget whatever of `job` still waits."""
        if job in self._open:
            self._open.discard(job)
            self._unanswered -= len(job.inputs)
            job.closed = True

    # Below: the encoder's thread.

    def _run(self) -> None:
        try:
            while batch := self._next_batch():
                inputs = [job.inputs[place] for job, place in batch]
                rows = self.engine.forward(inputs)
                self._count(inputs)
                self._store(batch, rows)
        except BaseException as error:  # whatever it is, the clients must learn of it
            logger.exception("the encoder failed")
            self.failure = error
            dead = EngineDeadError("the engine failed while computing this answer")
            for job in tuple(self._open):
                self._deliver(job, dead)

    def _next_batch(self) -> list[Item]:
        """What to compute next, waiting for it; nothing when the thread shall stop."""
        with self._changed:
            self.num_running = 0
            self._jobs = [job for job in self._jobs if job.waiting and not job.closed]
            while not self._jobs and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return []
            batch = choose(self._jobs, self.engine.max_num_seqs, self.engine.max_num_batched_tokens)
            taken = {(id(job), place) for job, place in batch}
            for job in self._jobs:
                job.waiting = [place for place in job.waiting if (id(job), place) not in taken]
            self._jobs.append(self._jobs.pop(0))
            self.num_running = len(batch)
            return batch

    def _store(self, batch: list[Item], rows_BN: Tensor) -> None:
        for (job, place), row in zip(batch, rows_BN, strict=True):
            job.rows[place] = row
            if len(job.rows) == len(job.inputs) and not job.closed:
                self._deliver(job, self._result(job))

    def _result(self, job: Job) -> list[list[float]] | Exception:
        rows = torch.stack([job.rows[place] for place in range(len(job.inputs))])
        rows = self.engine.activated(rows) if job.activate else rows
        if not bool(torch.isfinite(rows).all()):
            return NotFiniteError("the model gave NaN or infinite numbers")
        found: list[list[float]] = rows.tolist()
        return found

    def _count(self, inputs: list[EncoderInput]) -> None:
        self.stats.steps += 1
        self.stats.prompt_tokens += sum(map(len, inputs))
        self.stats.computed_tokens += len(inputs) * max(map(len, inputs))

    def _deliver(self, job: Job, result: list[list[float]] | Exception) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(_finish, job.future, result)


def _finish(future: asyncio.Future[list[list[float]]], result: list[list[float]] | Exception) -> None:
    """In the event loop again."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def choose(jobs: list[Job], max_seqs: int, max_tokens: int) -> list[Item]:
    """A batch of at most `max_seqs` sequences and `max_tokens` tokens with padding; one sequence may be longer.

    The first job's first sequence is in it, so everyone gets a turn.
    """
    first = (jobs[0], jobs[0].waiting[0])
    wanted = _length(first)
    # Every client's next, every client's second, and so on.
    in_turn = chain.from_iterable(zip_longest(*(zip(repeat(job), job.waiting) for job in jobs)))
    window = [item for item in islice(filter(None, in_turn), WINDOW) if item != first]
    window.sort(key=lambda item: abs(_length(item) - wanted))
    batch, longest, real = [first], wanted, wanted
    for item in window:
        padded = max(longest, _length(item)) * (len(batch) + 1)
        little_padding = padded <= FREE_TOKENS or real + _length(item) >= REAL_SHARE * padded
        if len(batch) == max_seqs or padded > max_tokens or not little_padding:
            continue
        batch.append(item)
        longest, real = max(longest, _length(item)), real + _length(item)
    return batch


def _length(item: Item) -> int:
    job, place = item
    return len(job.inputs[place])
