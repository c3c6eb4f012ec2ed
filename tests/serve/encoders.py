"""Tiny random encoders on disk: BERT and RoBERTa, with a head for classes or without one, dense or packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from compressor.checkpoint import write_manifest
from compressor.formats import make_format
from compressor.masks import n_m_mask
from compressor.quantizers import rtn
from compressor.scheme import QuantizationConfig, Scheme

LABELS = ("good", "bad", "neither")
SCHEMES = {
    "sparse24_int8": Scheme("sparse24_int8", -1),
    "sparse24_int4": Scheme("sparse24_int4", 32),
    "int8": Scheme("int8", -1),
}
WORDS = (
    "the",
    "a",
    "film",
    "was",
    "is",
    "very",
    "not",
    "good",
    "bad",
    "long",
    "short",
    "and",
    "but",
    "end",
    "we",
    "saw",
)
VOCABULARY = 64
POSITIONS = 48


def write_tokenizer(folder: Path, kind: str) -> None:
    """Whole words, with the special tokens where BERT and RoBERTa have them."""
    start, end, padding, unknown = (
        ("[CLS]", "[SEP]", "[PAD]", "[UNK]") if kind == "bert" else ("<s>", "</s>", "<pad>", "<unk>")
    )
    first = [padding, start, end, unknown] if kind == "bert" else [start, padding, end, unknown]
    vocabulary = {word: i for i, word in enumerate((*first, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = f"{start} $A {end} $B:1 {end}:1" if kind == "bert" else f"{start} $A {end} {end} $B {end}"
    special = [(token, vocabulary[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{start} $A {end}", pair, special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": padding, "unk_token": unknown, "cls_token": start, "sep_token": end}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_encoder(kind: str, *, head: bool = True, **options: Any) -> Any:
    """A random model whose every part matters, biases and norms too."""
    import transformers as t

    torch.manual_seed(0)
    offset = 0 if kind == "bert" else 2
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": POSITIONS + offset, "initializer_range": 0.2,
        "pad_token_id": 0 if kind == "bert" else 1, "type_vocab_size": 2 if kind == "bert" else 1,
    }  # fmt: skip
    if head:
        sizes |= {"id2label": dict(enumerate(LABELS)), "problem_type": "single_label_classification"}
    name = ("Bert" if kind == "bert" else "Roberta") + ("ForSequenceClassification" if head else "Model")
    config = getattr(t, "BertConfig" if kind == "bert" else "RobertaConfig")(**(sizes | options))
    model = getattr(t, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_encoder(folder: Path, kind: str, **options: Any) -> Path:
    tiny_encoder(kind, **options).save_pretrained(folder)
    write_tokenizer(folder, kind)
    return folder


def pack_encoder(
    dense: Path, out: Path, scheme: Scheme | Callable[[str], Scheme | None]
) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder with packed linears and int8 word embeddings, and the weights that it stands for."""
    scheme_of = scheme if callable(scheme) else lambda _: scheme
    out.mkdir()
    for file in dense.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    stored = load_file(dense / "model.safetensors")
    unpacked = dict(stored)
    schemes: dict[str, Scheme] = {}
    for name in [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]:
        if ".encoder." in name and "LayerNorm" not in name:
            if (own := scheme_of(name)) is not None:
                schemes[name] = own
        elif name.endswith("word_embeddings"):
            schemes[name] = Scheme("int8", -1)
    for name, own in schemes.items():
        weight = stored.pop(f"{name}.weight")
        if own.format.startswith("sparse24"):
            weight = weight * n_m_mask(weight.abs())
        tensors = make_format(own).pack(rtn(weight, None, own))
        unpacked[f"{name}.weight"] = make_format(own).unpack(tensors).float()
        stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        if f"{name}.bias" in stored:  # as `compress` stores it
            stored[f"{name}.bias"] = stored[f"{name}.bias"].to(torch.bfloat16)
            unpacked[f"{name}.bias"] = stored[f"{name}.bias"].float()
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig.from_schemes(schemes).to_dict()
    (out / "config.json").write_text(json.dumps(config))
    write_manifest(out)
    return out, unpacked
