"""Any other causal language model, through transformers' own modules: slower than the decoder, as right as they are.

A sequence has a cache of transformers' kind and is computed by itself, so a step of many sequences costs as much as
they do one after the other. The scheduler counts blocks and the sampler picks tokens as for the decoder; what is not
to be had is sharing computed prefixes and guessing ahead. Encoders (`serve.engine.encoder`) load through here too.

Shapes: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from compressor.checkpoint import Checkpoint
from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, PackedModule, tie
from serve.engine.model_runner import sampling_rows
from serve.engine.scheduler import Scheduled
from serve.engine.sequence import Sequence
from serve.quick_torch import complete_torch

logger = logging.getLogger(__name__)

NOTE = "through transformers: slower, one sequence after the other"
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
PROBE = 8  # tokens of the self-check


@dataclass(frozen=True)
class TransformersConfig:
    """What the engine must know of such a model."""

    architecture: str
    vocab_size: int
    max_positions: int
    bytes_per_token: int
    sequence_bytes: int = 0
    sliding_window: int | None = None  # the model's own cache forgets what lies behind it

    def token_bytes(self, cache_dtype: str) -> int:
        if cache_dtype in ("int8", "fp8"):
            raise ValueError(f"--kv-cache-dtype {cache_dtype} is not served for {self.architecture}, which runs {NOTE}")
        return self.bytes_per_token


class TransformersModel(nn.Module):
    """A causal language model of transformers, and its configuration in the engine's words."""

    def __init__(self, model: nn.Module, architecture: str) -> None:
        super().__init__()
        self.model = model
        self._limits_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        positions = [value for name in POSITIONS if isinstance(value := getattr(text, name, None), int)]
        needs = self._check(architecture, text.vocab_size)
        self.config = TransformersConfig(architecture, text.vocab_size, (*positions, 2048)[0], *needs)

    @property
    def formats(self) -> tuple[str, ...]:
        return formats_of(self.model)

    def reach(self, num_positions: int) -> None:
        """Choose LongRoPE's factors for texts of up to so many tokens: once, before anything is computed.

        transformers chooses them for each call by the last position in it, but the keys of one call meet the queries
        of later ones, and suit none that were turned by other factors.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rotary: list[Any] = [m for m in self.model.modules() if getattr(m, "rope_type", None) == "longrope"]
        for module in rotary:
            own = module.config.rope_parameters
            if num_positions > (short := own["original_max_position_embeddings"]):
                own |= {f"short_{kind}": own[f"long_{kind}"] for kind in ("factor", "mscale") if f"long_{kind}" in own}
                module.inv_freq = module.original_inv_freq = ROPE_INIT_FUNCTIONS["longrope"](module.config)[0]
                logger.warning(
                    "LongRoPE's long factors serve all texts; --max-model-len %d takes the short ones", short
                )

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def logits(self, tokens: list[int], cache: Any, rows: int) -> Tensor:
        """Float logits [rows, V] after the last `rows` of `tokens`, which follow what `cache` holds and are added."""
        limit = {"logits_to_keep": rows} if self._limits_logits else {}
        ids = torch.tensor([tokens])
        found: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **limit).logits
        return found[0, -rows:].float()

    @torch.inference_mode()
    def _check(self, architecture: str, vocab_size: int) -> tuple[int, int]:
        """Bytes of cache a token and a sequence; ValueError unless a text in pieces gives what it gives whole."""
        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            raise ValueError(f"{architecture} keeps no cache of keys and values; the torch runtime cannot serve it")
        tokens = [(7 * i + 5) % vocab_size for i in range(PROBE)]
        whole = self.logits(tokens, self.new_cache(), 1)
        cache = self.new_cache()
        for part in (tokens[:4], tokens[4:5], tokens[5:]):
            pieces = self.logits(part, cache, 1)
        if bool(torch.isfinite(whole).all()) and (pieces - whole).norm() > 0.1 * whole.norm():
            raise ValueError(f"{architecture} does not go on from its cache exactly; the torch runtime cannot serve it")
        grown = [getattr(layer, kind, None) for layer in cache.layers for kind in ("keys", "values")]
        states = [getattr(layer, kind, {}) for layer in cache.layers for kind in ("conv_states", "recurrent_states")]
        fixed = [tensor for kind in states for tensor in kind.values()]
        return max(1, _bytes(grown) // PROBE), _bytes(fixed)


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def formats_of(model: nn.Module) -> tuple[str, ...]:
    """The formats that a model's linears and embeddings are stored in."""
    weighty = [m for m in model.modules() if isinstance(m, PackedModule | nn.Linear | nn.Embedding)]
    return tuple(sorted({m.scheme.format if isinstance(m, PackedModule) else "dense" for m in weighty}))


def load_with_transformers(checkpoint: Checkpoint, dtype: torch.dtype, reason: ValueError) -> TransformersModel:
    """The model of an opened checkpoint; ValueError with `reason`, why the decoder refused it, if nobody knows it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = checkpoint.config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if architecture not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(f"{reason}, and whatever causal language model transformers has") from None
    model = from_pretrained(checkpoint.folder, dtype, "AutoModelForCausalLM").eval()
    prepare(model)
    return TransformersModel(model, architecture)


def from_pretrained(folder: Path, dtype: torch.dtype, kind: str, optional: tuple[str, ...] = ()) -> Any:
    """The model by transformers' `kind`; ValueError unless all its tensors are there, but for the `optional` ones.

    Args:
        kind: the name of one of transformers' automatic classes.
        optional: what the names of tensors begin with that may be missing.
    """
    complete_torch()
    import transformers

    import compressor.hf  # noqa: F401  registers the packed format
    from compressor.models import quiet_transformers

    try:
        with quiet_transformers():
            model, report = getattr(transformers, kind).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"transformers cannot load {folder.name}: {str(error).splitlines()[0]}") from error
    if missing := sorted(
        n for n in report["missing_keys"] if not n.startswith(optional)
    ):  # transformers would go on with random numbers
        raise ValueError(f"{folder.name} has no tensor {missing[0]!r}: the checkpoint is incomplete")
    return model


def prepare(model: Any) -> None:
    """Packed weights into their kernels' layout, those of a tied head once."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = (
        isinstance(embedding, CompressedEmbedding)
        and isinstance(head, CompressedLinear)
        and head.tensors["weight_packed"] is embedding.tensors["weight_packed"]
    )
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and not (tied and module is head):
            try:
                module.format.validate({key: t for key, t in module.tensors.items() if key.startswith("weight")})
            except ValueError as error:  # a position out of range would be read outside of the inputs
                raise ValueError(f"{name}: {error}") from None
            module.prepare()
    if tied:
        tie(head, embedding)


class TransformersRunner:
    """What `ModelRunner` is to the decoder; hidden states are logits already."""

    def __init__(self, model: TransformersModel) -> None:
        self.model = model
        self._caches: WeakKeyDictionary[Sequence, Any] = WeakKeyDictionary()

    @torch.inference_mode()
    def run(self, step: list[Scheduled]) -> Tensor:
        """Logits [T, V]; only the rows that somebody will ask for are written, the others cost no memory."""
        for seq in [seq for seq in self._caches if seq.num_computed == 0]:  # preempted
            del self._caches[seq]
        logits_TV = torch.empty(sum(item.count for item in step), self.model.config.vocab_size)
        end = 0
        for item in step:
            end += item.count
            rows = item.count if item.seq.params.prompt_logprobs is not None else 1
            cache = self._caches.setdefault(item.seq, self.model.new_cache() if item.start == 0 else None)
            tokens = item.seq.tokens[item.start : item.start + item.count]
            logits_TV[end - rows : end] = self.model.logits(tokens, cache, rows)
        return logits_TV

    def sample_logits(self, hidden_TC: Tensor, step: list[Scheduled]) -> Tensor:
        return hidden_TC[sampling_rows(step)]

    def prompt_logits(self, hidden_TC: Tensor, offset: int, count: int) -> list[Tensor]:
        return [hidden_TC[offset : offset + count]]
