"""The command `serve chat OUT`: a conversation in the terminal, with the engine in this process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve.options import ServeOptions

if TYPE_CHECKING:
    from serve.engine.llm_engine import LLMEngine

HELP = "Type a message. /reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


Say = Callable[[str], None]
"""Writes to the terminal what it is given, without a line's end."""


def chat(options: ServeOptions, say: Say) -> int:
    from serve.runtimes.torch_compiled import load_engine

    if options.encodes:
        raise ValueError(f"{options.model_name} classifies or embeds texts and cannot talk; use `serve` without chat")
    engine = load_engine(options)
    try:
        engine.self_test()
        return _converse(engine, options.model_name, say)
    finally:
        engine.close()


def _converse(engine: LLMEngine, name: str, say: Say) -> int:
    say(f"{name}: {engine.weight_bytes / 1e6:.0f} MB of weights. {HELP}\n")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("\nyou> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            say("\n")
            return 0
        if text == "/quit":
            return 0
        if text == "/reset":
            messages.clear()
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                messages.append({"role": "assistant", "content": _answer(engine, messages, say)})
            except ValueError as error:  # the context is full, for instance
                messages.pop()
                say(f"{error}. /reset forgets the conversation.\n")


def _answer(engine: LLMEngine, messages: list[dict[str, str]], say: Say) -> str:
    """Stream one answer to the terminal and return it."""
    from serve.engine.sampling_params import SamplingParams

    began = time.perf_counter()
    params = SamplingParams(max_tokens=None, temperature=0.7, top_p=0.95)
    seq = engine.add(engine.tokenizer.encode_chat(messages), params)
    text = ""
    try:
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                text += output.text
                say(output.text)
    except KeyboardInterrupt:
        engine.abort(seq.id)
    rate = seq.num_generated / (time.perf_counter() - began)
    dim, plain = ("", "") if os.environ.get("NO_COLOR") else ("\033[2m", "\033[0m")
    say(f"\n{dim}{seq.num_generated} tokens, {rate:.0f} tokens/s{plain}\n" if sys.stdout.isatty() else "\n")
    return text
