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
    """The seconds of every call of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return result


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
        runner: Any = engine.runner
        model: Any = engine.loaded.decoder
        count = int(tokens)
        layers, head = _Clock(runner.forward), _Clock(model.logits)
        runner.forward, model.logits = layers, head
        times = answer(engine, int(prompt), count + 1).token_times
        inside = sum(layers.seconds[-count:]) + sum(head.seconds[-count:])
        print(1 - inside / (times[-1] - times[0]), flush=True)
        runner.forward, model.logits = layers.function, head.function
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
