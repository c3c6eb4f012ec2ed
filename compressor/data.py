"""Text for calibration, retraining and held-out loss: documents from a named source, cut into token blocks.

A source is "default" (general prose of the kind small language models are trained on), "heldout" (C4
documents that share no 13-gram with the default text), a text file, a .jsonl or .parquet file with a text
field, or the id of a data set on the hub. Documents are shuffled by the seed, joined with the tokenizer's
end-of-text token, and cut into blocks of equal length; nothing is padded.

Shapes: N blocks, L tokens in a block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.packages import PACKAGES, fetch_member

ACCEPTED = "'default', 'heldout', a text file, a .jsonl or .parquet file with a text field, or a hub data set id"
_GRAM = 13
_TABLES = (".json", ".csv", ".tsv")

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...


@dataclass(frozen=True)
class TextReport:
    """What the model card says about a text; tokens counts the blocks handed out."""

    source: str
    documents: int
    tokens: int
    sha256: str
    licence: str


@dataclass(frozen=True)
class TextBlocks:
    """Token ids [N, L] and where they come from."""

    blocks: Tensor
    report: TextReport

    def split(self, held_out: int) -> tuple[Tensor, Tensor]:
        """The blocks to train on, and the last `held_out` for validation."""
        if not 0 < held_out < len(self.blocks):
            raise ValueError(
                f"{held_out} of {len(self.blocks)} blocks asked for validation; at least one must stay on either "
                "side: give more text or a shorter block length"
            )
        return self.blocks[:-held_out], self.blocks[-held_out:]


def load_text(
    source: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    seed: int = 0,
    max_tokens: int | None = None,
    field: str = "text",
    split: str = "train",
) -> TextBlocks:
    """Token blocks [N, length] of a source; `max_tokens` stops tokenising once that many are read."""
    if length < 2:
        raise ValueError(f"block length {length} given; at least 2 tokens are needed to predict one")
    documents, licence = _documents(source, field, split, max_tokens)
    random.Random(seed).shuffle(documents)
    ids, used = _tokenize(documents, tokenizer, max_tokens)
    opening = opening_of(tokenizer)
    inside = length - len(opening)
    count = len(ids) // inside
    if count == 0:
        raise ValueError(
            f"text {source!r} has {len(ids)} tokens; a block takes {length}: give more text or a shorter length"
        )
    blocks = torch.frombuffer(ids, dtype=torch.int32, count=count * inside).to(torch.int64).view(count, inside)
    blocks = torch.cat([torch.tensor([opening] * count, dtype=torch.int64).view(count, -1), blocks], dim=1)
    digest = hashlib.sha256("\0".join(documents[:used]).encode()).hexdigest()
    return TextBlocks(blocks, TextReport(source, used, blocks.numel(), digest, licence))


def opening_of(tokenizer: Tokenizer) -> list[int]:
    """The token that the tokenizer opens every text with, if it does: models such as Gemma are lost without it."""
    first = tokenizer(["a"])["input_ids"][0][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def _tokenize(documents: list[str], tokenizer: Tokenizer, max_tokens: int | None) -> tuple[array[int], int]:
    """Ids of the documents, each closed by the end-of-text token, and how many documents were read."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = array("i")
    batch = 64
    for start in range(0, len(documents), batch):
        encoded = tokenizer(documents[start : start + batch], add_special_tokens=False, verbose=False)
        for document in encoded["input_ids"]:
            ids.extend(document)
            ids.extend(end)
        if max_tokens is not None and len(ids) >= max_tokens:
            return ids[:max_tokens], min(start + batch, len(documents))
    return ids, len(documents)


def is_hub_id(source: str) -> bool:
    """Whether a source can only be a data set on the hub: no name of ours, nor of a file, and not on disk."""
    path = Path(source).expanduser()
    ours = source in NAMED or path.exists() or path.suffix.lower() in {*_READERS, *_TABLES, ".txt"}
    return not ours and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None


def check_suffix(source: str) -> None:
    """Raises ValueError for a file whose suffix says that it is no text, and that no reader knows."""
    if (suffix := Path(source).suffix.lower()) in _TABLES:
        raise ValueError(
            f"text {source!r} is a {suffix[1:].upper()} file, which is not read. Write it as .jsonl, an object with a "
            "text field on each line, or as plain text; task.source takes .csv and .tsv"
        )


def _documents(source: str, field: str, split: str, max_tokens: int | None) -> tuple[list[str], str]:
    if source in NAMED:
        return NAMED[source]()
    path = Path(source).expanduser()
    check_suffix(source)
    if path.is_file():
        read = _READERS.get(path.suffix.lower(), _read_text)
        documents, licence = list(read(path, field)), "unknown (local file)"
    elif not is_hub_id(source):
        raise ValueError(f"text {source!r} is not a file; accepted is {ACCEPTED}")
    else:
        documents, licence = list(_read_hub(source, field, split, max_tokens)), "see the data set's card"
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"text {source!r} holds no text; accepted is {ACCEPTED}")
    return documents, licence


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8"
        ) from error


def _read_text(path: Path, _field: str) -> Iterable[str]:
    """Documents of a plain text file are divided by blank lines gathered into pieces of some length."""
    return _paragraph_groups(_decode(path))


def _paragraph_groups(text: str, size: int = 4000) -> Iterator[str]:
    """Whole paragraphs up to about `size` characters: shuffled pieces still hold long context."""
    group: list[str] = []
    held = 0
    for paragraph in re.split(r"\n\s*\n", text):
        group.append(paragraph)
        held += len(paragraph)
        if held >= size:
            yield "\n\n".join(group)
            group, held = [], 0
    if group:
        yield "\n\n".join(group)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            record = parse_json(line, f"text {path}, line {number}")
            yield _field_of(record, field, f"{path}, line {number}")


def parse_json(line: str, where: str) -> Any:
    """What a line of JSON says; halves of UTF-16 pairs, which JSON can escape and no tokenizer takes, are U+FFFD."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    if "\\ud" not in line and "\\uD" not in line:
        return found
    text = json.dumps(found, ensure_ascii=False)
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole != text:
        log.warning("%s holds half of a UTF-16 pair, read as U+FFFD", where)
    return json.loads(whole)


def _read_parquet(path: Path, field: str) -> list[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"text {path} needs pyarrow: pip install 'halfweight[data]'") from error
    try:
        table = parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise ValueError(f"text {path} has columns {table.schema_arrow.names}; no {field!r} to read text from")
        column = table.read(columns=[field]).column(field).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"text {path} is not a parquet file: {error}") from error
    return [_field_of({field: value}, field, str(path)) for value in column]


def _read_hub(name: str, field: str, split: str, max_tokens: int | None) -> Iterator[str]:
    """Stream a hub data set until there is surely enough text (a token is hardly ever over 16 characters)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"text {name!r} is no file here, so a hub data set is meant, which needs the package 'datasets': "
            f"pip install 'halfweight[data]'. Otherwise give {ACCEPTED}"
        ) from error
    try:
        rows = load_dataset(name, split=split, streaming=True)
        characters = 0
        for number, record in enumerate(rows):
            text = _field_of(record, field, f"{name}, row {number}")
            yield text
            characters += len(text)
            if max_tokens is not None and characters > 16 * max_tokens:
                return
    except (OSError, RuntimeError) as error:
        raise ValueError(f"data set {name!r} could not be read: {error}. Accepted is {ACCEPTED}") from error


def _field_of(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        given = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(
            f"text {where} holds {given}; a field {field!r} with a string is needed (text.field names another)"
        )
    return text


_READERS: dict[str, Callable[[Path, str], Iterable[str]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _default_text() -> tuple[list[str], str]:
    """C4, Wikipedia and OpenWebText, about 1.08M tokens; stubs of under 1,000 characters are left out."""
    cal = "exllamav3/conversion/standard_cal_data/"
    c4 = _decode(fetch_member("exllamav3", cal + "c4.utf8")).split("\n")
    wiki = _decode(fetch_member("exllamav3", cal + "wiki.utf8"))
    articles = [body.strip() for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", wiki, flags=re.DOTALL)]
    long_articles = _decode(fetch_member("llamafactory", "llamafactory-0.9.5/data/wiki_demo.txt")).split("\n")
    passages = _read_jsonl(fetch_member("evals", "evals/registry/data/schelling_point/owt_5.jsonl"), "0")
    documents = [*c4, *(article for article in articles if len(article) > 1000), *long_articles, *passages]
    return [document for document in documents if document.strip()], _licences("exllamav3", "llamafactory", "evals")


def _heldout_text() -> tuple[list[str], str]:
    """C4 documents, less those that overlap with the default text."""
    file = fetch_member("llamafactory", "llamafactory-0.9.5/data/c4_demo.jsonl")
    seen = {gram for document in _default_text()[0] for gram in _grams(document)}
    documents = [document for document in _read_jsonl(file, "text") if seen.isdisjoint(_grams(document))]
    return documents, _licences("llamafactory")


def _grams(document: str) -> Iterator[int]:
    """Hashes of every run of 13 words; case and punctuation do not matter."""
    words = re.findall(r"\w+", document.lower())
    return (hash(tuple(words[start : start + _GRAM])) for start in range(len(words) - _GRAM + 1))


def _licences(*packages: str) -> str:
    return "; ".join(f"{PACKAGES[key].requirement}: {PACKAGES[key].licence}" for key in packages)


NAMED: dict[str, Callable[[], tuple[list[str], str]]] = {"default": _default_text, "heldout": _heldout_text}
