"""Settings of the engine, and what they become for a given model and machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compressor.machine import available_memory

GIB = 2**30
CACHE_DTYPES = ("auto", "bfloat16", "int8", "fp8")

_FIXED_CHUNK = 128


@dataclass(frozen=True)
class EngineConfig:
    """What a user may set; None means "choose for me".

    Args:
        kv_cache_gb: memory for keys and values, in GiB. By default what `max_num_seqs` sequences of 2048 tokens need,
            at most a quarter of the memory that is available, at least one sequence of `max_model_len`.
        max_model_len: longest prompt and answer together; by default what the model was trained for.
        max_num_seqs: sequences computed at once.
        max_num_batched_tokens: tokens computed in one step.
        max_prefill_beside_decode: prompt tokens computed in a step in which others decode: bounds their stutter.
        compile: run steps as one native program (see `serve.engine.compiled`); the first time it is made, which takes
            a minute or so; False computes every step eagerly.
        compile_in_background: answer eagerly until the program is made, instead of waiting for it.
        dtype: of activations: `bfloat16` or `float32`.
        kv_cache_dtype: of keys and values: `bfloat16`; `int8` with a factor for each token and head, in which nearly
            twice as many tokens fit; `fp8` (e4m3) without factors, in which twice as many do, less exactly; `auto` is
            what the checkpoint says, or else `dtype`.
        prompt_lookup: tokens guessed ahead from the sequence itself (see `serve.engine.prompt_lookup`); 0: none.
        deterministic: an answer's bits do not depend on what is computed beside it.
    """

    kv_cache_gb: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_prefill_beside_decode: int = 256
    block_size: int = 16
    prefix_caching: bool = True
    compile: bool = True
    compile_in_background: bool = False
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    num_threads: int | None = None
    prompt_lookup: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_prefill_beside_decode", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence computes one token a step"
            )
        if self.prompt_lookup < 0:
            raise ValueError(f"prompt_lookup must not be negative, got {self.prompt_lookup}")
        if self.deterministic:
            self._check_deterministic()
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be bfloat16 or float32, got {self.dtype!r}")
        if self.kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.kv_cache_dtype!r}")
        if self.kv_cache_gb is not None and not 0 < self.kv_cache_gb < 1e6:
            raise ValueError(f"kv_cache_gb must be a positive number of GiB, got {self.kv_cache_gb}")

    @property
    def fixed_chunk(self) -> int:
        """Prompt tokens of a sequence that `deterministic` computes at once; prompts are shared by whole chunks."""
        return min(self.max_prefill_beside_decode, _FIXED_CHUNK)

    def _check_deterministic(self) -> None:
        """Whole chunks, of whole blocks, beside everything that decodes."""
        chunk = self.fixed_chunk
        if chunk % self.block_size or self.max_num_batched_tokens < self.max_num_seqs + chunk:
            raise ValueError(
                f"--deterministic computes prompts in chunks of {chunk} tokens beside {self.max_num_seqs} sequences: "
                f"max_num_batched_tokens must be at least {self.max_num_seqs + chunk}, and the chunk a multiple of "
                f"{self.block_size}"
            )


class CacheNeeds(Protocol):
    """What a model says of its cache."""

    @property
    def max_positions(self) -> int: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def sequence_bytes(self) -> int: ...
    def token_bytes(self, cache_dtype: str) -> int: ...


@dataclass(frozen=True)
class CachePlan:
    """How the KV cache is cut."""

    num_blocks: int
    block_size: int
    bytes_per_block: int
    max_model_len: int
    dtype: str = "bfloat16"
    note: str = ""
    state_bytes: int = 0  # what sequences keep whatever their length

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block + self.state_bytes

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)


def plan_cache(engine: EngineConfig, model: CacheNeeds, recorded_dtype: str | None = None) -> CachePlan:
    """Blocks of the KV cache and the longest sequence, so that one such sequence always fits.

    `recorded_dtype` is what the checkpoint says of the cache.
    """
    dtype = (recorded_dtype or engine.dtype) if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    per_token = model.token_bytes(dtype)
    per_block = per_token * engine.block_size
    longest, states = _longest(engine, model), model.sequence_bytes * engine.max_num_seqs
    budget = _budget(engine, per_token, longest, states)
    num_blocks = max((budget - states) // per_block, 1)
    fits = num_blocks * engine.block_size
    if fits >= longest:
        return CachePlan(num_blocks, engine.block_size, per_block, longest, dtype, state_bytes=states)
    if engine.max_model_len is not None:
        raise ValueError(
            f"the KV cache holds {fits} tokens ({budget / GIB:.2f} GiB), but --max-model-len is {longest}: "
            f"give --kv-cache-gb {(longest * per_token + states) / GIB:.2f} or more, or lower --max-model-len"
        )
    note = f"limited to {fits} tokens of context by the KV cache; --kv-cache-gb raises it"
    return CachePlan(num_blocks, engine.block_size, per_block, fits, dtype, note, states)


def _longest(engine: EngineConfig, model: CacheNeeds) -> int:
    limit = min(model.max_positions, model.sliding_window or model.max_positions)
    if engine.max_model_len is None:
        return limit
    if not 2 <= engine.max_model_len <= limit:
        raise ValueError(f"--max-model-len is {engine.max_model_len}, but this model takes 2 to {limit} tokens")
    return engine.max_model_len


def _budget(engine: EngineConfig, per_token: int, longest: int, states: int) -> int:
    if engine.kv_cache_gb is not None:
        return int(engine.kv_cache_gb * GIB)
    wanted = states + per_token * max(engine.max_num_seqs * min(longest, 2048), longest)
    return min(wanted, available_memory() // 4)
