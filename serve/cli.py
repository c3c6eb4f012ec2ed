"""The `serve` command. Parsing imports nothing heavy, so that `serve --help` answers at once."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve.options import ServeOptions

EPILOG = """\
examples:
  serve OUT                           an OpenAI-compatible endpoint on http://127.0.0.1:8000
  serve OUT --port 8080 --api-key K   the same elsewhere, for those who have the key
  serve OUT --check                   load, generate one token or class, exit 0 if all is well
  serve chat OUT                      talk with the model here, without a server
  serve OUT --runtime vllm -- --seed 1   by vLLM's server; what follows -- is for vLLM itself

A folder that is called chat is written ./chat."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    talks = given[:1] == ["chat"]
    parser = _parser("serve chat" if talks else "serve", talks)
    own, rest = _split(given[1:] if talks else given)
    options = _options(vars(parser.parse_args(own)) | {"runtime_arguments": rest})
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        options.validate()
        return _run(options, talks)
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(options: ServeOptions, talks: bool) -> int:
    if talks:
        from serve.terminal_chat import chat

        return chat(options, _write)
    from serve.runtimes import find_runtime

    return find_runtime(options.runtime)(options, lambda text: _write(text + "\n"))


def _write(text: str) -> None:
    """What the command says; nothing below it prints."""
    print(text, end="", flush=True)


def _split(given: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments before `--`, and those after it."""
    at = given.index("--") if "--" in given else len(given)
    return given[:at], tuple(given[at + 1 :])


def _options(values: dict[str, Any]) -> ServeOptions:
    values["given"] = frozenset(values)
    values["api_key"] = values.get("api_key") or os.environ.get("HALFWEIGHT_API_KEY") or None
    return ServeOptions(**values)


def _parser(program: str, talks: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program,
        description="Talk with a model in the terminal." if talks else "Serve a model behind OpenAI's API.",
        epilog=None if talks else EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folder", metavar="OUT", type=Path, help="folder that `compress` made, or a Hugging Face one")
    _add_engine_flags(parser)
    if not talks:
        _add_server_flags(parser)
    return parser


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engine").add_argument
    add("--max-model-len", type=int, metavar="N", help="longest prompt and answer together, in tokens")
    add("--max-num-seqs", type=int, metavar="N", help="sequences computed at once (32)")
    add("--max-num-batched-tokens", type=int, metavar="N", help="tokens computed in one step (512)")
    add("--kv-cache-gb", type=float, metavar="GB", help="memory for keys and values (chosen for the machine)")
    add("--dtype", choices=("bfloat16", "float32"), help="of activations (bfloat16)")
    cache = ("auto", "bfloat16", "int8", "fp8")
    add("--kv-cache-dtype", choices=cache, help="of keys and values (auto: the checkpoint's)")
    add("--threads", type=int, metavar="N", help="threads for computing (all cores, or what a CPU quota is worth)")
    add("--no-prefix-caching", dest="prefix_caching", action="store_false", help="never reuse computed prompts")
    add("--prompt-lookup", type=int, metavar="N", help="guess up to N tokens from the text before, then verify (0)")
    add("--deterministic", action="store_true", help="answers never depend on what is computed beside them; slower")
    add("--eager", action="store_true", help="compute every step without capture or compilation, for debugging")
    add("--debug", action="store_true", help="log more, and show tracebacks")


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--runtime", metavar="NAME", help="what computes: torch, or vllm with arguments of its own after -- (torch)")
    add("--tensor-parallel-size", type=int, metavar="N", help="ranks that share each layer; vllm only (1)")
    add("--pipeline-parallel-size", type=int, metavar="N", help="groups of ranks that share the layers; vllm only (1)")
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", type=int, metavar="N", help="port to listen on; 0 takes any free one (8000)")
    add("--served-model-name", metavar="NAME", help="the model's name in the API (the folder's name)")
    add("--api-key", metavar="KEY", help="demand this key; better given as HALFWEIGHT_API_KEY")
    add("--insecure", action="store_true", help="allow other machines in without a key")
    add("--ssl-certfile", type=Path, metavar="FILE", help="certificate, for https")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="its private key")
    add("--max-queue", type=int, metavar="N", help="answers that may wait before clients get 429 (512)")
    add("--max-body-mb", type=float, metavar="MB", help="largest request body (8)")
    add("--request-timeout", type=float, metavar="S", help="seconds in which an answer must be complete (600)")
    add("--shutdown-timeout", type=float, metavar="S", help="seconds that open answers get after SIGTERM (30)")
    add("--check", action="store_true", help="load, generate one token or class, and exit")
