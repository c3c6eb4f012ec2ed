"""Tiny random models on disk, as Hugging Face writes them, with a byte-level tokenizer trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, again and again, until the evening comes.",
    "def main():\n    return 0\n",
    "In the beginning there was the word, and the word was with those who read.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB = 384
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")


def write_tokenizer(folder: Path, chat: bool = True) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def tiny_model(architecture: str) -> torch.nn.Module:
    """A random model that is large enough for every part to matter and small enough to build at once."""
    import transformers as t

    torch.manual_seed(0)
    rotary = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if architecture == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**rotary, tie_word_embeddings=True))
    if architecture == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**rotary, sliding_window=None))
    if architecture == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**rotary))
    if architecture == "qwen3":
        return t.Qwen3ForCausalLM(t.Qwen3Config(**rotary))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if architecture == "gpt2":
        sizes = {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, **sizes, **ends))
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    return t.OPTForCausalLM(
        t.OPTConfig(vocab_size=VOCAB, **sizes, num_attention_heads=4, max_position_embeddings=512, init_std=0.2, **ends)
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder("llama")` is a folder with that model in float32; made once a session."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
            model = tiny_model(architecture).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):  # transformers starts them at zero, where a mistake would not show
                        parameter.normal_(0, 0.1)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[architecture] = folder
        return made[architecture]

    return make


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(2)
