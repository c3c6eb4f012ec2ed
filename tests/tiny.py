"""Builds tiny models with a byte-level tokenizer: real folders, real loading code, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 300
OWN: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 32, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 2},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen3": {"head_dim": 16},
}
"""What a family needs beyond the sizes that all share."""


def tiny_config(kind: str) -> Any:
    """A transformers configuration of each family under test."""
    from transformers import AutoConfig, GPT2Config, LlamaConfig, OPTConfig

    shared = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257}
    if kind == "llama":
        return LlamaConfig(
            **shared, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
    if kind == "gpt2":
        return GPT2Config(**shared, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    if kind == "opt":
        return OPTConfig(
            **shared, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
            max_position_embeddings=512, pad_token_id=258,
        )  # fmt: skip
    return AutoConfig.for_model(
        kind, **shared, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=258, **OWN.get(kind, {}),
    )  # fmt: skip


def make_tokenizer() -> Any:
    """A byte-level tokenizer: 256 bytes, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_tiny_model(kind: str, folder: Path, **overrides: Any) -> Path:
    """Saves a random model of `kind` in bf16 with tokenizer and chat template; returns the folder."""
    from transformers import AutoModelForCausalLM

    from compressor.models import quiet_transformers

    torch.manual_seed(0)
    config = tiny_config(kind)
    for key, value in overrides.items():
        setattr(config, key, value)
    with quiet_transformers():
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder
