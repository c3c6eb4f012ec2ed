"""vLLM's view of the `quantization_config` block: which of its layers gets which method.

vLLM fuses q/k/v and gate/up, so one of its layers may stand for several modules of the checkpoint. Where these differ
(one may be stored plainly), each keeps a product of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm import __version__ as vllm_version
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig as VllmQuantizationConfig

from compressor.scheme import QUANT_METHOD, QuantizationConfig, Scheme
from serve.vllm_plugin import check_version

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""The families' names of the token embedding: vLLM does not tell most of its embedding layers theirs."""
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What families mean that fuse layers and do not say of which."""


class HalfweightConfig(VllmQuantizationConfig):  # type: ignore[misc]
    """The record of a checkpoint; stands at module level because vLLM pickles it into its workers."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__()
        check_version(vllm_version)
        self.record = dict(record)
        self.parsed = QuantizationConfig.from_dict(self.record)
        targets = [target.removeprefix("re:") for group in self.parsed.groups.values() for target in group.targets]
        self.roots = sorted({target.partition(".")[0].rstrip("\\") for target in targets if "." in target})
        from serve.vllm_plugin.embedding import register_layers

        register_layers()

    def __reduce__(self) -> tuple[Any, ...]:
        return HalfweightConfig, (self.record,)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HalfweightConfig:
        return cls(config)

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of a linear, an embedding or an LM head; None where vLLM's own serves."""
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from serve.vllm_plugin.embedding import HalfweightEmbeddingMethod
        from serve.vllm_plugin.linear import HalfweightLinearMethod, TurnedBack

        if isinstance(layer, LinearBase):
            modules = self.modules_of(prefix)
            schemes = [self.scheme_of(name) for name in modules]
            # GPT-2's weights lie as Conv1D's do and vLLM turns them; what is recorded, dense too, lies as a linear's.
            turned = self.model_type() == "gpt2" and any(self.recorded(name) is not None for name in modules)
            if any(scheme is not None for scheme in schemes):
                return HalfweightLinearMethod(schemes, prefix, turned=turned)
            return TurnedBack() if turned else UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            scheme = self.head_scheme(prefix) if head else self.embedding_scheme()
            return None if scheme is None else HalfweightEmbeddingMethod(scheme, prefix, head or self.tied())
        return None

    def modules_of(self, prefix: str) -> list[str]:
        """The checkpoint's modules that one of vLLM's linears stands for."""
        module = prefix.strip(".")
        parent, dot, name = module.rpartition(".")
        parts = self.packed_modules_mapping.get(name)
        if parts is None:
            parts = _FUSED[name] if name in _FUSED and self.recorded(module) is None else [name]
        return [f"{parent}{dot}{part}" for part in parts]

    def recorded(self, module: str) -> Scheme | None:
        """What the checkpoint says of a module; the outermost name may be missing in it, or be another than vLLM's."""
        rest = module.partition(".")[2]
        names = (module, rest, *(f"{root}.{rest}" for root in self.roots))
        return next((found for name in names if (found := self.parsed.scheme_of(name)) is not None), None)

    def scheme_of(self, module: str) -> Scheme | None:
        """A module's scheme, or None where its weight is plain."""
        found = self.recorded(module)
        plain = found is not None and found.format == "dense" and found.low_rank is None
        return None if plain else found

    def embedding_scheme(self) -> Scheme | None:
        """The scheme of the token embedding."""
        groups = self.parsed.groups.values()
        module = next((t for group in groups for t in group.targets if t.rpartition(".")[2] in _EMBEDDINGS), None)
        return None if module is None else self.scheme_of(module)

    def head_scheme(self, prefix: str) -> Scheme | None:
        """The scheme of the LM head; a tied one stores nothing and reads the embedding's tensors."""
        return self.embedding_scheme() if self.tied() else self.scheme_of(prefix.strip(".") or "lm_head")

    @staticmethod
    def tied() -> bool:
        """Whether the token embedding is the LM head of the model that is being built."""
        return bool(getattr(_model_config(), "tie_word_embeddings", False))

    @staticmethod
    def model_type() -> str:
        """The family of the model that is being built, as transformers calls it; empty where none is."""
        return str(getattr(_model_config(), "model_type", ""))


def _model_config() -> Any:
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    return getattr(getattr(current, "model_config", None), "hf_config", None)
