"""Small random models of every family, and their packed checkpoints, made without the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.checkpoint import write_manifest
from compressor.formats import make_format
from compressor.formats.low_rank import pack_low_rank
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import QuantizationConfig, Scheme
from tests.tiny import make_tokenizer

VOCAB = 384
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")
MORE_FAMILIES = {
    "gemma": {},
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "phi3": {"original_max_position_embeddings": 256},
    "stablelm": {},
}
"""Families that the embedded runtime runs through transformers' modules, and what their configuration needs."""
EMBEDDING = Scheme("int8")


def small_model(family: str, **changes: Any) -> nn.Module:
    """A random model whose heads have a size that vLLM's attention takes on a CPU."""
    import transformers as t

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rotary = ends | {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "initializer_range": 0.2, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    if family == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**rotary))
    if family == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**rotary, sliding_window=None))
    if family == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**rotary))
    if family == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**rotary))
    if family in MORE_FAMILIES:
        own = rotary | {"pad_token_id": 0, "tie_word_embeddings": family != "phi3"} | MORE_FAMILIES[family]
        return t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(family, **own))
    if family == "gpt2":
        sizes = {"n_positions": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, **sizes, **ends))
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "num_hidden_layers": 2}
    shared = {"num_attention_heads": 4, "max_position_embeddings": 256, "init_std": 0.2}
    return t.OPTForCausalLM(t.OPTConfig(vocab_size=VOCAB, **sizes, **shared, **ends))


def write_model(family: str, folder: Path, **changes: Any) -> Path:
    """A dense folder in bf16, with a byte-level tokenizer."""
    from compressor.models import quiet_transformers

    model = small_model(family, **changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, where a mistake would not show
                parameter.normal_(0, 0.1)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


def pack(
    dense: Path,
    out: Path,
    scheme: Scheme,
    *,
    embedding: Scheme | None = EMBEDDING,
    plain: str = "-",
    others: dict[str, Scheme] | None = None,
) -> Path:
    """A checkpoint with every linear in `scheme`, but those that have `plain` or a key of `others` in their name."""
    shutil.copytree(dense, out)
    tensors = load_file(dense / "model.safetensors")
    schemes: dict[str, Scheme] = {}
    for key in [key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2]:
        name = key.removesuffix(".weight")
        table = any(part in name for part in ("embed_tokens", "wte", "lm_head"))
        own = embedding if table else next((other for key, other in (others or {}).items() if key in name), scheme)
        if own is None or plain in name or "wpe" in name or "embed_positions" in name:
            continue
        weight = tensors.pop(key).float()
        weight = weight.t().contiguous() if ".c_" in name else weight  # GPT-2's Conv1D
        schemes[name] = own
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed_tensors(weight, own).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig.from_schemes(schemes).to_dict()
    (out / "config.json").write_text(json.dumps(config))
    write_manifest(out)
    return out


def packed_tensors(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of a weight, with a random low-rank branch where the scheme has one."""
    fmt, branch = make_format(scheme), scheme.low_rank
    if fmt.sparse:
        weight = weight * n_m_mask(weight.abs())
    stored = fmt.pack(rtn(weight, None, scheme))
    if branch is not None:
        generator = torch.Generator().manual_seed(weight.shape[0])
        rank = weight.shape[1] // branch.segment
        s = 0.1 * torch.randn(weight.shape[0], rank, generator=generator)
        sums = torch.eye(rank).repeat_interleave(branch.segment, dim=1)
        projection = sums + 0.1 * torch.randn(rank, weight.shape[1], generator=generator)
        stored |= pack_low_rank(branch, s, projection if branch.trained_projection else None)
    return stored
