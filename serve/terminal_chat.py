"""The command `serve chat OUT`: a conversation in the terminal, with the engine in this process."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from serve.options import ServeOptions

if TYPE_CHECKING:
    from serve.engine.llm_engine import LLMEngine

HELP = "Type a message. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


def chat(options: ServeOptions) -> int:
    from serve.runtimes.torch_compiled import load_engine

    engine = load_engine(options)
    try:
        engine.self_test()
        return _converse(engine, options.model_name)
    finally:
        engine.close()


def _converse(engine: LLMEngine, name: str) -> int:
    print(f"{name}: {engine.weight_bytes / 1e6:.0f} MB of weights. {HELP}")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\nyou> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/quit":
            return 0
        if text == "/reset":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(engine, messages)})


def _answer(engine: LLMEngine, messages: list[dict[str, str]]) -> str:
    """Stream one answer to the terminal and return it."""
    from serve.engine.sampling_params import SamplingParams

    began = time.perf_counter()
    params = SamplingParams(max_tokens=None, temperature=0.7, top_p=0.95)
    seq = engine.add(engine.tokenizer.encode_chat(messages), params)
    text = ""
    try:
        while engine.has_work:
            for output in engine.step():
                text += output.text
                print(output.text, end="", flush=True)
    except KeyboardInterrupt:
        engine.abort(seq.id)
    rate = seq.num_generated / (time.perf_counter() - began)
    print(f"\n\033[2m{seq.num_generated} tokens, {rate:.0f} tokens/s\033[0m" if sys.stdout.isatty() else "")
    return text
