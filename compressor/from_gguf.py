"""A GGUF file as a Hugging Face folder in bf16, by transformers' reader, with nothing of the file left out.

That reader makes up weights that a file lacks, and drops biases and rotary scaling, all without a word; here they are
read too, or the file is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from compressor.models import check_loaded, quiet_transformers
from compressor.packages import check_cache_space

ROPE_FACTORS = "rope_freqs.weight"
# What the file's factors do not tell is tried: Llama 3's own bounds, and contexts that a model may have had before.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ORIGINAL_POSITIONS = tuple(2**power for power in range(10, 18))
_NEEDLESS = (ROPE_FACTORS, "output.weight")  # read below; transformers' GPT-2 takes the other by a way of its own


def convert(file: Path, stage: Path, source: str) -> None:
    """Writes the folder of a GGUF file; `source` is the name that it was given by.

    Raises:
        ValueError: a part of a model, or one with tensors or a rotary embedding that transformers does not read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader = gguf.GGUFReader(file)
    _check_whole(file, reader)
    check_cache_space(2 * sum(int(tensor.n_elements) for tensor in reader.tensors), file)
    with quiet_transformers():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        _add_biases(config, reader)
        _add_rope_scaling(config, file, reader)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16, output_loading_info=True,
        )  # fmt: skip
        check_loaded(file, model, report)
        _check_all_read(file, reader, model)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(stage)
        model.config.quantization_config = None
        model.save_pretrained(stage)
    record = json.loads((stage / "config.json").read_text())
    record.pop("quantization_config", None)
    record["_name_or_path"] = source
    record["halfweight_source"] = f"{file.name}, dequantised to bf16"
    (stage / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a key, {arch} being the architecture; None where the file has none."""
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    field = reader.get_field(key.format(arch=architecture.contents() if architecture else ""))
    return None if field is None else field.contents()


def _check_whole(file: Path, reader: gguf.GGUFReader) -> None:
    parts = _value(reader, gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    if parts is not None and parts > 1:
        raise ValueError(
            f"{file} is one of {parts} parts of a model. Join them first: "
            "llama-gguf-split --merge FIRST_PART MODEL.gguf"
        )


def _add_biases(config: Any, reader: gguf.GGUFReader) -> None:
    names = {tensor.name for tensor in reader.tensors}
    for key, bias in (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias")):
        if bias in names and hasattr(config, key):
            setattr(config, key, True)


def _add_rope_scaling(config: Any, file: Path, reader: gguf.GGUFReader) -> None:
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    keys = gguf.Keys.Rope
    kind = _value(reader, keys.SCALING_TYPE) or (
        "none" if _value(reader, "{arch}.rope.scale_linear") is None else "linear"
    )
    factor = _value(reader, keys.SCALING_FACTOR) or _value(reader, "{arch}.rope.scale_linear")
    scaling: dict[str, Any] = {}
    if factors is not None:
        scaling = _llama3(config, file, np.asarray(factors, dtype=np.float64))
    elif kind == "linear" and factor not in (None, 0.0, 1.0):
        scaling = {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn" and factor not in (None, 0.0):
        before = _value(reader, keys.SCALING_ORIG_CTX_LEN)
        if not before:
            raise ValueError(f"{file} scales its rotary embedding by yarn without {keys.SCALING_ORIG_CTX_LEN}")
        scaling = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(before)}
        attention = _value(reader, keys.SCALING_ATTN_FACTOR)
        if attention not in (None, 0.0, 1.0):  # llama.cpp multiplies it by yarn's own
            scaling["attention_factor"] = float(attention) * yarn_attention(float(factor))
    elif kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{file} scales its rotary embedding by {kind!r}; read here: none, linear, yarn, Llama 3's")
    if scaling:
        config.rope_parameters = dict(config.rope_parameters) | scaling


def yarn_attention(factor: float) -> float:
    """What yarn multiplies queries and keys by (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0


def llama3_factors(head_dim: int, theta: float, rope: Mapping[str, Any]) -> np.ndarray:
    """What the frequencies [head_dim / 2] of a rotary embedding are divided by under Llama 3's scaling."""
    lengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    smooth = ((int(rope["original_max_position_embeddings"]) / lengths - low) / (high - low)).clip(0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / float(rope["factor"]) + smooth)


def _llama3(config: Any, file: Path, factors: np.ndarray) -> dict[str, Any]:
    """Llama 3's scaling that gives these factors [head_dim / 2]."""
    theta, factor = config.rope_parameters["rope_theta"], round(float(factors.max()), 4)
    for positions in _ORIGINAL_POSITIONS:
        scaling = {
            "rope_type": "llama3", "factor": factor, **_LLAMA3, "original_max_position_embeddings": positions
        }  # fmt: skip
        if np.allclose(llama3_factors(2 * len(factors), theta, scaling), factors, rtol=1e-3):
            return scaling
    raise ValueError(f"{file} scales its rotary embedding by factors ({ROPE_FACTORS}) that are not those of Llama 3")


def _check_all_read(file: Path, reader: gguf.GGUFReader, model: Any) -> None:
    """Raises ValueError for a tensor that transformers has no place for."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = _value(reader, gguf.Keys.General.ARCHITECTURE)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    known = set(get_gguf_hf_weights_map(model, processor))
    left = sorted(tensor.name for tensor in reader.tensors if tensor.name not in known | set(_NEEDLESS))
    if left:
        raise ValueError(
            f"{file} has {len(left)} tensors that a {type(model).__name__} has no place for, such as "
            f"{', '.join(left[:3])}. Give the Hugging Face folder that the file was made from."
        )
