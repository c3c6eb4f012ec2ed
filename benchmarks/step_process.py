"""A model in a process of its own that answers a line, a prompt's length and a number of tokens, with seconds.

All arms of a comparison stay loaded and take turns, so that a machine that becomes slower does it to all alike. The
process prints `ready`, then for each line the seconds of the prompt and those of each further token.

    python -m benchmarks.step_process FOLDER

is that process for one of our engines, with scheduling and greedy sampling in the times. A line `native PROMPT TOKENS`
is answered with the share of the decode steps' time that is spent outside of the model's operators.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any


class StepProcess:
    """The caller's side."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        self._name = name
        with tempfile.TemporaryFile("w+") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
            if self._line() != "ready":
                self.close()
                errors.seek(0)
                last = (errors.read().strip() or "it said nothing").splitlines()[-1]
                raise ValueError(f"{name} could not be loaded: {last}")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def ask(self, line: str) -> list[float]:
        """The numbers that answer a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        numbers = [float(word) for word in self._line().split()]
        if not numbers:
            raise ValueError(f"{self._name} ended while it was measured")
        return numbers

    def answer(self, prompt: int, tokens: int) -> list[float]:
        """Seconds of a prompt and of each of `tokens` decode steps."""
        return self.ask(f"{prompt} {tokens}")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def engine_process(folder: Path) -> StepProcess:
    """One of our engines, as `serve` sets it up, in a process of its own."""
    return StepProcess([sys.executable, "-m", "benchmarks.step_process", str(folder)], str(folder))


class _Clock:
    """Adds up the time within functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


def main(arguments: list[str]) -> int:
    """The process's side."""
    from benchmarks.measure import answer, load_engine

    engine = load_engine(Path(arguments[0]), compile_in_background=False)
    print("ready", flush=True)
    for line in sys.stdin:
        *kind, prompt, tokens = line.split()
        if not kind:
            times = answer(engine, int(prompt), int(tokens) + 1).token_times
            print(times[0], *[b - a for a, b in pairwise(times)], flush=True)
            continue
        runner, model, clock = engine.runner, engine.loaded.decoder, _Clock()
        answer(engine, int(prompt), 1)
        inside, head = runner.forward, model.logits
        runner.forward, model.logits = clock(inside), clock(head)  # type: ignore[method-assign]
        first = answer(engine, int(prompt), 1)
        prompt_seconds, before = clock.seconds, engine.stats.step_seconds
        clock.seconds = 0.0
        answer(engine, int(prompt), int(tokens) + 1)
        steps = engine.stats.step_seconds - before - first.time_to_first_token
        print(1 - (clock.seconds - prompt_seconds) / steps, flush=True)
        runner.forward, model.logits = inside, head  # type: ignore[method-assign]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
