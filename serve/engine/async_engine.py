"""The engine in a thread of its own, and the asyncio side that talks with it.

All torch work happens in the engine thread. Commands go in through a queue that the thread empties between steps; the
outputs of a step come out in one call into the event loop, which hands them to the requests' own queues. When the
engine fails, every open request gets the failure, and the engine stays dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from serve.engine.llm_engine import LLMEngine, StepOutput
from serve.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class EngineDeadError(RuntimeError):
    """The engine thread has failed; nothing will be computed any more."""


class QueueFullError(RuntimeError):
    """More requests wait than the server is willing to queue."""


class Mailbox:
    """What one task waits for and the event loop's callbacks put in: an asyncio.Queue for less than half its cost."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, StepOutput] | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: tuple[int, StepOutput] | Exception) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[int, StepOutput] | Exception:
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


@dataclass(eq=False)
class Request:
    """Some prompts, each with `params.n` answers; answer j of prompt i has the index i * n + j.

    `outputs` carries (index, output) as they come, or the exception that ends the request.
    """

    prompts: list[list[int]]
    params: SamplingParams
    outputs: Mailbox = field(default_factory=Mailbox)
    seq_ids: list[int] = field(default_factory=list)
    closed: bool = False
    arrival: float = field(default_factory=time.perf_counter)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.num_answers

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.params.n


class AsyncEngine:
    def __init__(self, engine: LLMEngine, max_queue: int) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self.failure: BaseException | None = None
        self.on_output: Callable[[Request, StepOutput], None] | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._owner: dict[int, tuple[Request, int]] = {}
        self._open: set[Request] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._unanswered = 0

    def start(self) -> None:
        """Call inside the event loop that will serve the requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Stop after what was asked before; what is being computed is dropped."""
        self._commands.put(None)
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
    def num_running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Answers that are asked for and not being computed."""
        return max(0, self._unanswered - self.num_running)

    def submit(self, prompts: list[list[int]], params: SamplingParams) -> Request:
        """Queue a request; raises ValueError, QueueFullError or EngineDeadError, and otherwise must be closed."""
        if self.failure is not None:
            raise EngineDeadError("the engine has failed; restart the server")
        for prompt in prompts:
            self.engine.check_prompt(prompt)
        self.engine.check_params(params)
        request, room = Request(prompts, params), self.max_queue + self.engine.max_num_seqs
        if request.num_answers > room:
            raise ValueError(
                f"the request asks for {request.num_answers} answers, but this server takes up to {room} at once; "
                "send fewer prompts, or a smaller n"
            )
        if self._unanswered + request.num_answers > room:
            raise QueueFullError(f"{self._unanswered} answers are computed or waiting already; try again later")
        self._open.add(request)
        self._unanswered += request.num_answers
        self._commands.put(lambda: self._add(request))
        return request

    async def outputs(self, request: Request) -> AsyncIterator[tuple[int, StepOutput]]:
        """All outputs of `request` as they come; closes it at the end, and also when left early."""
        try:
            unfinished = request.num_answers
            while unfinished:
                item = await request.outputs.get()
                if isinstance(item, Exception):
                    raise item
                if item[1].error is not None:
                    raise item[1].error
                unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            self.close(request)

    def close(self, request: Request) -> None:
        """Free whatever `request` still holds."""
        if request in self._open:
            self._open.discard(request)
            self._unanswered -= request.unfinished
            request.closed = True
            self._commands.put(lambda: self._abort(request))

    # Below: the engine thread.

    def _add(self, request: Request) -> None:
        if request.closed:
            return
        for i, prompt in enumerate(request.prompts):
            for j in range(request.params.n):
                seq = self.engine.add(prompt, request.params, j)
                request.seq_ids.append(seq.id)
                self._owner[seq.id] = (request, i * request.params.n + j)

    def _abort(self, request: Request) -> None:
        for seq_id in request.seq_ids:
            if self._owner.pop(seq_id, None) is not None:
                self.engine.abort(seq_id)

    def _run(self) -> None:
        try:
            while self._obey(block=not self.engine.has_work):
                if self.engine.has_work:
                    self._publish(self.engine.step())
        except BaseException as error:  # whatever it is, the clients must learn of it
            logger.exception("the engine failed")
            self.failure = error
            dead = EngineDeadError("the engine failed while computing this answer")
            self._deliver([(request, dead) for request in tuple(self._open)])

    def _obey(self, block: bool) -> bool:
        """Carry out what has been asked for; False when the engine shall stop."""
        try:
            while (command := self._commands.get(block=block)) is not None:
                command()
                block = False
        except queue.Empty:
            return True
        return False

    def _publish(self, outputs: list[StepOutput]) -> None:
        ready: list[tuple[Request, tuple[int, StepOutput] | Exception]] = []
        for output in outputs:
            owner = self._owner.get(output.seq_id)
            if owner is None:
                continue
            request, index = owner
            ready.append((request, (index, output)))
            if output.finish_reason is not None:
                del self._owner[output.seq_id]
        if ready:
            self._deliver(ready)

    def _deliver(self, ready: list[tuple[Request, tuple[int, StepOutput] | Exception]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._hand_out, ready)

    # In the event loop again.

    def _hand_out(self, ready: list[tuple[Request, tuple[int, StepOutput] | Exception]]) -> None:
        for request, item in ready:
            if request.closed:
                continue
            request.outputs.put(item)
            if isinstance(item, Exception):
                continue
            if item[1].finish_reason is not None:
                request.unfinished -= 1
                self._unanswered -= 1
            if self.on_output is not None:
                self.on_output(request, item[1])
