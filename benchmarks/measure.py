"""Measures one model in a process of its own, so that no model's memory or warm caches touch another's figures.

    python -m benchmarks.measure speed|perplexity FOLDER '{"setting": value, ...}'

prints JSON lines: {"progress": [done, total]} as it goes on, then {"result": {...}}. `in_own_process` runs that and
returns the result. Models are loaded and run by the engine that `serve` uses, dense and packed ones alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.engine.llm_engine import GenerationOutput, LLMEngine

Progress = Callable[[int, int], None]
FIRST_PROMPT_ID = 100
"""Prompts are runs of ordinary token ids; lower ids are control tokens in most vocabularies."""


@dataclass(frozen=True)
class SpeedSettings:
    """How speed is measured; the table states these figures."""

    prefill_tokens: int = 512
    prompt_tokens: int = 128
    output_tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class QualitySettings:
    """What perplexity is measured on; the table states these figures."""

    text: str = "heldout"
    window: int = 512
    max_tokens: int | None = None
    wikitext: bool = False


def load_engine(folder: Path, **settings: Any) -> LLMEngine:
    """The engine as `serve` sets it up, without reuse of earlier prompts: every prompt is computed."""
    from serve.engine.llm_engine import LLMEngine

    return LLMEngine.from_folder(folder, prefix_caching=False, **settings)


def speed(folder: Path, settings: SpeedSettings, progress: Progress) -> dict[str, Any]:
    """Memory, time to the first token, prefill and decode rates of one model, batch 1, greedy."""
    before = status_bytes("VmRSS")
    start = time.perf_counter()
    engine = load_engine(folder)
    loaded = time.perf_counter() - start
    after_import = status_bytes("VmRSS")
    answer(engine, settings.prompt_tokens, settings.output_tokens)  # warm-up: compiles, allocates
    answer(engine, settings.prefill_tokens, 1)
    decode, first, prefill = [], [], []
    for repeat in range(settings.repeats):
        output = answer(engine, settings.prompt_tokens, settings.output_tokens)
        decode.append((settings.output_tokens - 1) / (output.token_times[-1] - output.token_times[0]))
        first.append(output.time_to_first_token)
        prefill.append(settings.prefill_tokens / answer(engine, settings.prefill_tokens, 1).time_to_first_token)
        progress(repeat + 1, settings.repeats)
    return {
        "weight_bytes": engine.weight_bytes,
        "peak_rss_bytes": status_bytes("VmHWM"),
        "rss_before_loading_bytes": before,
        "rss_loaded_bytes": after_import,
        "load_seconds": loaded,
        "decode_tokens_per_s": median(decode),
        "ttft_seconds": median(first),
        "prefill_tokens_per_s": median(prefill),
        "formats": list(engine.loaded.formats),
        "threads": threads(),
        "kernels": kernel_sentence(),
    }


def answer(engine: LLMEngine, prompt_tokens: int, output_tokens: int) -> GenerationOutput:
    """One greedy answer of exactly `output_tokens` tokens; their times begin with the request."""
    from serve.engine.sampling_params import SamplingParams

    last = engine.loaded.config.vocab_size - 1
    prompt = [min(FIRST_PROMPT_ID + 7 * i % 5000, last) for i in range(prompt_tokens)]
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return engine.generate([prompt], params)[0]


def perplexity(folder: Path, settings: QualitySettings, progress: Progress) -> dict[str, Any]:
    """exp of the mean negative log-likelihood of a token, over windows of held-out text (benchmarks/texts.py).

    The standard error is that of the mean over windows: tokens of one window depend on each other.
    """
    from benchmarks.texts import read_windows
    from compressor.models import load_tokenizer
    from serve.engine.sampling_params import SamplingParams

    windows = read_windows(
        settings.text,
        load_tokenizer(folder),
        window=settings.window,
        max_tokens=settings.max_tokens,
        wikitext=settings.wikitext,
    )
    engine = load_engine(folder, max_num_seqs=1, max_num_batched_tokens=settings.window)
    score_only = SamplingParams(max_tokens=0, prompt_logprobs=0)
    total = len(windows.tokens)
    nll = []
    for done, window in enumerate(windows.tokens.tolist(), start=1):
        scored = engine.generate([window], score_only)[0].prompt_logprobs
        nll.append(-sum(entry.logprob for entry in scored if entry is not None) / (len(window) - 1))
        progress(done, total)
    return summary(nll) | {
        "tokens": total * (settings.window - 1),
        "windows": total,
        "text": windows.text,
        "opened_by_bos": windows.opened_by_bos,
        "window_nll": nll,
    }


def summary(nll: list[float]) -> dict[str, Any]:
    """Perplexity, mean and standard error (None for a single window) of the windows' losses."""
    import math

    mean = sum(nll) / len(nll)
    if not math.isfinite(mean):
        raise ValueError("the model gave losses that are not finite; run `compress verify` on it")
    variance = sum((value - mean) ** 2 for value in nll) / (len(nll) - 1) if len(nll) > 1 else None
    error = None if variance is None else math.sqrt(variance / len(nll))
    return {"perplexity": math.exp(mean), "mean_nll": mean, "stderr_nll": error}


def status_bytes(key: str) -> int:
    """An entry of /proc/self/status in bytes. VmHWM is this process's own peak; ru_maxrss would count its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}; memory is measured on Linux only")


def threads() -> int:
    """Threads that one operation uses."""
    import torch

    return torch.get_num_threads()


def kernel_sentence() -> str:
    """Which of our kernels ran, or that none did."""
    from compressor import kernels

    return kernels.describe()


def in_own_process(
    kind: str, folder: Path, settings: SpeedSettings | QualitySettings, progress: Progress | None = None
) -> dict[str, Any]:
    """Measures in a fresh process.

    Raises:
        ValueError: the measurement failed; says why.
    """
    command = [sys.executable, "-m", "benchmarks.measure", kind, str(folder), json.dumps(asdict(settings))]
    result: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            result = message.get("result", result)
            if progress and "progress" in message:
                progress(*message["progress"])
        process.wait()
        errors.seek(0)
        last = (errors.read().strip() or f"it ended with status {process.returncode}").splitlines()[-1]
    if process.returncode or result is None:
        raise ValueError(f"{kind} of {folder} could not be measured: {last}")
    return result


def main(arguments: list[str]) -> int:
    """The process that `in_own_process` starts."""
    kind, folder, settings = arguments[0], Path(arguments[1]), json.loads(arguments[2])

    def progress(done: int, total: int) -> None:
        print(json.dumps({"progress": [done, total]}), flush=True)

    try:
        if kind == "speed":
            result = speed(folder, SpeedSettings(**settings), progress)
        else:
            result = perplexity(folder, QualitySettings(**settings), progress)
    except (ValueError, OSError, RuntimeError) as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        return 1
    print(json.dumps({"result": result}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
