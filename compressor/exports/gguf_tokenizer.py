"""A Hugging Face byte-level BPE tokenizer in the metadata of a GGUF file.

llama.cpp splits text by rules of its own that a name stands for, so a tokenizer is taken only where its rule is one of
those; a wrong rule would give other tokens without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raises ValueError for a tokenizer that cannot be exported."""
    record = _read(folder)
    _rule(record)
    last = max(record["model"]["vocab"].values())
    if last >= vocabulary:
        raise ValueError(f"tokenizer.json has a token {last}, and config.json a vocabulary of {vocabulary}")


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which the export to gguf reads")
    record = json.loads(file.read_text("utf-8"))
    assert isinstance(record, dict)
    return record


def _rule(record: dict[str, Any]) -> str:
    """llama.cpp's name of the rule that splits text before merging."""
    model, splitter = record["model"], record.get("pre_tokenizer") or {}
    parts = splitter.get("pretokenizers", [splitter])
    kinds = [part.get("type") for part in parts]
    if model["type"] == "BPE" and not model.get("byte_fallback") and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in _SPLITS:
            return _SPLITS[parts[0]["pattern"]["Regex"]]
    raise ValueError(
        f"export to gguf knows byte-level BPE tokenizers that split text as GPT-2, SmolLM, Llama 3 or Qwen 2 do; this "
        f"one is {model['type']} with {kinds}. Export to dense and convert that with llama.cpp's own script."
    )


def add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    """Adds tokens, their kinds, merges, special tokens and the chat template to a GGUFWriter."""
    record = _read(folder)
    tokens = [f"[UNUSED{index}]" for index in range(vocabulary)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary
    for token, index in record["model"]["vocab"].items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in record.get("added_tokens", []):
        if added["id"] < vocabulary:
            kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in record["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(record))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    _add_special(writer, folder, tokens)


def _add_special(writer: Any, folder: Path, tokens: list[str]) -> None:
    from compressor.models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < len(tokens):
            add(index)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
