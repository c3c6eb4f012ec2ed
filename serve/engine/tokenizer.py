"""Text to tokens and back, and the chat template, with `tokenizers` and `jinja2` alone.

Importing transformers would take longer than loading the model; it is asked only for folders without `tokenizer.json`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder

if TYPE_CHECKING:
    from jinja2 import Template

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def _byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_of()


class ChatTemplateError(ValueError):
    """The messages do not suit the model's chat template."""


class Tokenizer:
    def __init__(self, fast: FastTokenizer, special: Mapping[str, str], chat_template: str | None) -> None:
        self.fast = fast
        self.special = dict(special)
        self.chat_template = chat_template
        fast.no_truncation()
        fast.no_padding()
        # What streaming asks for: the same few thousand again and again.
        self._decode_one = lru_cache(8192)(lambda token, skip: str(fast.decode([token], skip_special_tokens=skip)))
        self.token_bytes = lru_cache(8192)(self._token_bytes)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(
                f"{folder.name} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); "
                "copy the tokenizer files of the model into the folder"
            )
        config = read_json(folder / "tokenizer_config.json")
        special = {name: text for name, value in config.items() if (text := _token_text(name, value)) is not None}
        return cls(_load_fast(folder), special, _chat_template(folder, config))

    @cached_property
    def vocab_size(self) -> int:
        return max(self.fast.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no text of n tokens is longer than n times this."""
        return max(map(len, self.fast.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_typed(
        self,
        text: str,
        second: str | None = None,
        *,
        add_special_tokens: bool = True,
        max_length: int | None = None,
        side: str = "right",
    ) -> tuple[list[int], list[int]]:
        """Tokens of a text or a pair of texts, and which of the two each belongs to, as encoders read them.

        Args:
            max_length: cut to so many tokens, special ones included; of a pair, the longer text first.
            side: where to cut.
        """
        parts = [self.fast.encode(one, add_special_tokens=False) for one in (text, second) if one is not None]
        if max_length is not None:
            special = self.fast.num_special_tokens_to_add(len(parts) == 2) if add_special_tokens else 0
            if max_length < special:
                raise ValueError(f"{max_length} tokens have no room for the {special} special ones")
            for part, size in zip(parts, _shares([len(part) for part in parts], max_length - special), strict=True):
                part.truncate(size, direction=side)
        whole = self.fast.post_process(parts[0], parts[1] if len(parts) == 2 else None, add_special_tokens)
        return whole.ids, whole.type_ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        if len(tokens) == 1:
            return self._decode_one(tokens[0], skip_special_tokens)
        text: str = self.fast.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    @cached_property
    def by_bytes(self) -> bool:
        """Whether a text is its tokens' bytes one behind the other, as byte-level tokenizers have it."""
        return isinstance(self.fast.decoder, ByteLevelDecoder)

    def _token_bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        """What `token` adds to a text; only where `by_bytes`."""
        text = self.fast.id_to_token(token)
        if text is None or (skip_special_tokens and token in self._special_ids):
            return b""
        try:
            return bytes(map(BYTE_OF.__getitem__, text))
        except KeyError:  # an added token, written as it is
            return text.encode()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.fast.get_added_tokens_decoder().items() if token.special)

    def token_text(self, token: int) -> str:
        """The text of one token by itself, as log-probabilities show it."""
        return self.decode([token], skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        found: int | None = self.fast.token_to_id(text)
        return found

    @cached_property
    def eos_token_id(self) -> int | None:
        text = self.special.get("eos_token")
        return None if text is None else self.token_id(text)

    @cached_property
    def _template(self) -> Template:
        if self.chat_template is None:
            raise ChatTemplateError(
                "this model has no chat template; use /v1/completions, or put a chat_template.jinja into its folder"
            )
        template: Template = _environment().from_string(self.chat_template)
        return template

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; `variables` are what this model's template knows besides, `enable_thinking` say."""
        own = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render({"documents": None} | self.special | dict(variables or {}) | own)
        except Exception as error:  # whatever a template runs into
            raise ChatTemplateError(f"the model's chat template refused the messages: {error}") from error

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens of one or two texts fit into `room`: the longer one is cut until both are as long."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    half = (room + (first > second)) // 2
    kept = min(first, max(half, room - second))
    return [kept, min(second, room - kept)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} must hold a JSON object, but holds a {type(found).__name__}")
    return found


def _token_text(name: str, value: Any) -> str | None:
    if not name.endswith("_token"):
        return None
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _load_fast(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise ValueError(f"tokenizer.json of {folder.name} cannot be read: {error}") from error
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    fast: FastTokenizer = slow.backend_tokenizer
    return fast


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones: the default is the one to talk with
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _environment() -> Any:
    """Templates come with the checkpoint, so they run in a sandbox; trimming as transformers does."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """What stands between `generation` and `endgeneration`, which tell trainers what the model wrote, as it is."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' templates have it, not jinja2's, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
