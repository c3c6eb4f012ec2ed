"""Tiny models, text with something to learn, and one call that retrains: what the tests of retraining share."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from compressor.calibration import weight_of
from compressor.masks import n_m_mask
from compressor.retraining import AstSettings, Budget, LoopSettings, RetrainingReport, TextDistillation, retrain

FP32 = LoopSettings(batch=4, learning_rate=3e-3, kl_weight=1.0, precision="fp32")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2)
    )


def opt() -> nn.Module:
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, word_embed_proj_dim=32, init_std=0.2,
        )
    )  # fmt: skip


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "lm_head" not in name
    }


def masks_of(linears: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: n_m_mask(weight_of(module).detach().abs()) for name, module in linears.items()}


def text(blocks: int = 40) -> torch.Tensor:
    """Text with something to learn: each token follows from the one before."""
    start = torch.arange(blocks).unsqueeze(1) * 7
    return (start + 5 * torch.arange(16)) % 64


def run(model: nn.Module, teacher: nn.Module | None = None, **options: Any) -> RetrainingReport:
    linears = linears_of(model)
    budget = options.pop("budget", Budget(tokens=30 * 64))
    options = {"loop": FP32, "settings": AstSettings(), **options}
    loop = options["loop"]
    objective = TextDistillation(
        options.pop("tokens", text()),
        teacher or copy.deepcopy(model),
        kl_weight=loop.kl_weight,
        temperature=loop.temperature,
    )
    masks = options.pop("masks", None) or masks_of(linears)
    return retrain(model, objective, linears, masks, budget, **options)
