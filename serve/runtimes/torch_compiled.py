"""The embedded runtime: our own engine in this process, behind uvicorn.

The port is taken first, so that a port in use costs nothing; then the web framework is imported while torch is, and
the model loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from serve.options import ServeOptions
from serve.process import settle, share_processors
from serve.quick_torch import import_torch

if TYPE_CHECKING:
    from serve.engine.encoder import EncoderEngine
    from serve.engine.llm_engine import LLMEngine
    from serve.engine.tokenizer import Tokenizer

WEB_MODULES = ("fastapi", "uvicorn", "jinja2.sandbox", "serve.api.schema")


def serve(options: ServeOptions, say: Callable[[str], None]) -> int:
    """Load, test, `say` what is served and where, serve until told to stop; returns the exit status."""
    began = time.perf_counter()
    if options.check:
        say(_check(options))
        return 0
    with contextlib.closing(_bind(options.host, options.port)) as listener:
        web = threading.Thread(target=lambda: [import_module(name) for name in WEB_MODULES], daemon=True)
        web.start()
        engine = load_encoder(options) if options.encodes else load_engine(options)
        with contextlib.closing(engine):
            engine.self_test()
            web.join()
            from serve.api.server import Server

            settle()
            server = Server(engine, options, listener)
            say(_summary(options, engine, listener, time.perf_counter() - began))
            return asyncio.run(server.run())


def load_engine(options: ServeOptions) -> LLMEngine:
    # Plain weights go through oneDNN, which keeps a primitive for every batch size it ever saw, 1024 by default.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    tokenizer = ThreadPoolExecutor(1, "tokenizer").submit(_tokenizer, options)  # beside the import: it holds no lock
    share_processors()
    import_torch()
    from serve.engine.config import EngineConfig
    from serve.engine.llm_engine import LLMEngine

    config = EngineConfig(
        kv_cache_gb=options.kv_cache_gb,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=max(options.max_num_batched_tokens, options.max_num_seqs),
        prefix_caching=options.prefix_caching,
        compile=not options.eager,
        compile_in_background=True,
        prompt_lookup=options.prompt_lookup,
        deterministic=options.deterministic,
        dtype=options.dtype,
        kv_cache_dtype=options.kv_cache_dtype,
        num_threads=options.threads,
    )
    return LLMEngine.from_folder(options.folder, config, tokenizer.result())


def load_encoder(options: ServeOptions) -> EncoderEngine:
    """The model of a folder whose texts are classified or embedded; it keeps no cache and runs eagerly."""
    if options.prompt_lookup or options.kv_cache_dtype != "auto":
        raise ValueError("--prompt-lookup and --kv-cache-dtype are for models that write text; leave them out")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    tokenizer = ThreadPoolExecutor(1, "tokenizer").submit(_tokenizer, options)
    share_processors()
    import_torch()
    from serve.engine.encoder import EncoderConfig, EncoderEngine

    config = EncoderConfig(
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        dtype=options.dtype,
        num_threads=options.threads,
        deterministic=options.deterministic,
    )
    return EncoderEngine.from_folder(options.folder, config, tokenizer.result())


def _tokenizer(options: ServeOptions) -> Tokenizer:
    from serve.engine.tokenizer import Tokenizer

    return Tokenizer.from_folder(options.folder)


def _check(options: ServeOptions) -> str:
    loaded = _check_encoder(options) if options.encodes else _check_generation(replace(options, eager=True))
    return f"{options.model_name}: loaded, {loaded}"


def _check_generation(options: ServeOptions) -> str:
    from serve.engine.sampling_params import SamplingParams

    engine = load_engine(options)
    engine.self_test()
    [output] = engine.generate([[0]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    return f"{engine.weight_bytes / 1e6:.1f} MB of weights, generated {output.token_ids}"


def _check_encoder(options: ServeOptions) -> str:
    engine = load_encoder(options)
    engine.self_test()
    made = "classified" if engine.classifies else "embedded"
    return f"{engine.weight_bytes / 1e6:.1f} MB of weights, {made} two inputs"


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
    return listener


def _summary(options: ServeOptions, engine: LLMEngine | EncoderEngine, listener: socket.socket, seconds: float) -> str:
    from compressor import kernels
    from serve.engine.encoder import EncoderEngine

    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"{'https' if options.ssl_certfile else 'http'}://{host}:{listener.getsockname()[1]}"
    own, path, body = _of_encoder(engine) if isinstance(engine, EncoderEngine) else _of_generator(engine)
    lines = {
        "model": f"{options.model_name} ({own.pop('architecture')})",
        "format": own.pop("formats") or options.dtype,
        "kernel": kernels.describe(),
        "weights": f"{engine.weight_bytes / 1e6:.1f} MB in memory",
        **own,
        "ready in": f"{seconds:.1f} s",
        "url": url,
    }
    table = "\n".join(f"{name:>9}  {value}" for name, value in lines.items())
    key = ' -H "Authorization: Bearer $HALFWEIGHT_API_KEY"' if options.api_key else ""
    return f"{table}\n\n  curl {url}{path} -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n"


def _of_generator(engine: LLMEngine) -> tuple[dict[str, str], str, str]:
    """What is said of a language model; and a route to try, with a body."""
    tokens = engine.plan.num_blocks * engine.plan.block_size
    lines = {
        "architecture": engine.loaded.config.architecture,
        "formats": ", ".join(engine.loaded.formats),
        "cache": f"{engine.kv_cache_bytes / 1e6:.0f} MB at most, {tokens} tokens in {engine.plan.dtype}",
        "context": f"{engine.max_model_len} tokens" + (f", {engine.plan.note}" if engine.plan.note else ""),
    }
    return lines, "/v1/chat/completions", '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'


def _of_encoder(engine: EncoderEngine) -> tuple[dict[str, str], str, str]:
    """The same of a classifier, or of an encoder without a head."""
    shown = ", ".join((engine.labels or ())[:6]) + (", ..." if len(engine.labels or ()) > 6 else "")
    lines = {
        "architecture": engine.architecture,
        "formats": ", ".join(engine.formats),
        "answers": f"{engine.width} classes: {shown}" if engine.classifies else f"vectors of {engine.width} numbers",
        "context": f"{engine.max_model_len} tokens",
    }
    return lines, "/classify" if engine.classifies else "/v1/embeddings", '{"input": ["Hello"]}'
