"""Classifiers, and encoders that turn a text into a vector: what is served of them, whatever computes it.

Sequences of about the same length are computed together; `serve.engine.async_encoder` chooses which.

Shapes: B sequences, S tokens of the longest of them, E hidden size, N numbers of a result: classes, or E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.checkpoint import Checkpoint, check_manifest
from compressor.checkpoint import read_json as checked_json
from compressor.machine import use_threads
from compressor.models import is_classifier
from serve.engine.encoder_models import OFFSET, EncoderInput, EncoderModel, labels_of, load_encoder
from serve.engine.sampler import NotFiniteError
from serve.engine.tokenizer import Tokenizer, read_json

PROBES = (9, 4)  # tokens of the self-test's sequences
UNLIMITED = 10**6  # tokenizers write such a number where they know no longest text


@dataclass(frozen=True)
class EncoderConfig:
    """What is computed at once; see the fields of the same names in `EngineConfig`.

    Args:
        deterministic: one sequence after the other, so that no result depends on what is computed beside it.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    dtype: str = "bfloat16"
    num_threads: int | None = None
    deterministic: bool = False


class EncoderEngine:
    """An encoder, what turns its states into results, and its tokenizer.

    Args:
        labels: names of a classifier's classes; None for an encoder without a head.
        pool: of an encoder without a head: hidden states [B, S, E] and mask [B, S] to [B, E].
        longest: tokens that a sequence may have.
    """

    def __init__(
        self,
        model: EncoderModel,
        tokenizer: Tokenizer,
        config: EncoderConfig,
        *,
        labels: tuple[str, ...] | None,
        pool: Pool | None,
        longest: int,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.labels, self._pool = labels, pool
        self.architecture = str(model.config["architectures"][0])
        self.vocab_size = int(model.config["vocab_size"])
        self.max_model_len = _longest(config.max_model_len, longest)
        self.max_num_seqs = 1 if config.deterministic else config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self._activation = _activation(model.config.get("problem_type"), len(labels or ()))
        self._padding = model.config.get("pad_token_id") or 0

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        config: EncoderConfig | None = None,
        tokenizer: Tokenizer | None = None,
        **settings: Any,
    ) -> EncoderEngine:
        """Load a checkpoint folder; `settings` are fields of EncoderConfig; ValueError says what is wrong with it."""
        config, folder = config or EncoderConfig(**settings), Path(folder)
        use_threads(config.num_threads)
        tokenizer = tokenizer or Tokenizer.from_folder(folder)
        checkpoint = Checkpoint.open(folder, verify=False)
        classifies = is_classifier(checkpoint.config.get("architectures"))
        pool = None if classifies else _pooling(folder)
        with ThreadPoolExecutor(1, "manifest") as threads:  # hashing needs no lock of Python's
            verified = threads.submit(check_manifest, folder) if checkpoint.packed else None
            try:
                model = load_encoder(checkpoint, getattr(torch, config.dtype), classifies)
            finally:
                if verified is not None:
                    verified.result()  # an altered file is the better reason for whatever else failed
        checkpoint.close()
        labels = labels_of(model.config) if classifies else None
        longest = _positions(model.config, folder, alone=not classifies)
        return cls(model, tokenizer, config, labels=labels, pool=pool, longest=longest)

    def close(self) -> None:
        """As of other engines; nothing runs in the background."""

    @property
    def classifies(self) -> bool:
        return self.labels is not None

    @property
    def width(self) -> int:
        """N: numbers of a result."""
        return len(self.labels) if self.labels is not None else int(self.model.config["hidden_size"])

    @property
    def formats(self) -> tuple[str, ...]:
        return self.model.formats

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def check_input(self, given: EncoderInput) -> None:
        """ValueError for a sequence that the model cannot take."""
        if not given.ids:
            raise ValueError("an input has no tokens")
        if len(given) > self.max_model_len:
            raise ValueError(
                f"an input has {len(given)} tokens, but this model takes at most {self.max_model_len}; "
                "shorten it, or send truncate_prompt_tokens"
            )
        if any(not 0 <= token < self.vocab_size for token in given.ids):
            raise ValueError(f"token ids must be below {self.vocab_size}, the size of the vocabulary")

    @torch.inference_mode()
    def forward(self, batch: Sequence[EncoderInput]) -> Tensor:
        """Logits, or pooled states, [B, N] in float32."""
        if self._pool is None:
            return self.model.logits(batch).float()
        hidden_BSE, mask_BS = self.model.states(batch)
        return self._pool(hidden_BSE.float(), mask_BS)

    def activated(self, rows_BN: Tensor) -> Tensor:
        """Probabilities of classes, the number itself of a regression; embeddings with the length 1."""
        return self._activation(rows_BN) if self.classifies else F.normalize(rows_BN, dim=-1)

    def self_test(self) -> None:
        """Finite results, the same alone and padded in a batch, or an error: a broken model must not look healthy."""
        usable = [token for token in range(min(self.vocab_size, 64)) if token != self._padding]
        lengths = [min(length, self.max_model_len) for length in PROBES]
        probes = [[usable[(7 * i + length) % len(usable)] for i in range(length)] for length in lengths]
        inputs = [EncoderInput(probe, [0] * len(probe)) for probe in probes]
        together, alone = self.forward(inputs), torch.cat([self.forward([one]) for one in inputs])
        if not bool(torch.isfinite(together).all()):
            raise NotFiniteError(
                "the self-test of the model gave NaN or infinite results: the checkpoint is damaged; "
                "run `compress verify` on it, or make it again"
            )
        if (together - alone).norm() > 0.1 * alone.norm():
            raise ValueError(
                f"{self.architecture} gives other results beside padding; the torch runtime cannot serve it"
            )


Pool = Callable[[Tensor, Tensor], Tensor]


def _activation(problem: str | None, classes: int) -> Callable[[Tensor], Tensor]:
    """What vLLM does with logits: by the kind of problem; a single score without a kind is a probability."""
    if problem == "regression":
        return lambda logits: logits
    if problem == "multi_label_classification" or (problem is None and classes < 2):
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)


def _positions(config: Mapping[str, Any], folder: Path, alone: bool) -> int:
    """The longest sequence: what the model has positions for, its tokenizer allows, a sentence encoder was made for."""
    positions = int(config.get("max_position_embeddings", 512))
    if config.get("model_type") in OFFSET:
        positions -= (config.get("pad_token_id") or 0) + 1
    limits = [read_json(folder / "tokenizer_config.json").get("model_max_length")]
    if alone:
        limits.append(read_json(folder / "sentence_bert_config.json").get("max_seq_length"))
    return min(
        [positions, *(int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < UNLIMITED)]
    )


def _longest(wanted: int | None, limit: int) -> int:
    if wanted is not None and not 1 <= wanted <= limit:
        raise ValueError(f"--max-model-len is {wanted}, but this model takes 1 to {limit} tokens")
    return wanted or limit


def _pooling(folder: Path) -> Pool:
    """What sentence-transformers' files in the folder say, or the mean where there are none."""
    path = folder / "modules.json"
    kinds = _modules(path) if path.is_file() else []
    unknown = [kind for kind, _ in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ValueError(f"modules.json of {folder.name} asks for {unknown[0]}, which is not served")
    places = [place for kind, place in kinds if kind == "Pooling"]
    if not places:
        return POOLINGS["pooling_mode_mean_tokens"]
    config = folder / places[0] / "config.json"
    if Path(places[0]).name != places[0] or not config.is_file():
        raise ValueError(f"modules.json of {folder.name} names {places[0]}/config.json, which is not there; copy it")
    record = read_json(config)
    chosen = [name for name, value in record.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS:
        raise ValueError(
            f"{places[0]}/config.json asks for {' + '.join(chosen) or 'nothing'}; served: {', '.join(POOLINGS)}"
        )
    return POOLINGS[chosen[0]]


def _modules(path: Path) -> list[tuple[str, str]]:
    """(class, folder) of each part of a sentence encoder, in order."""
    found = checked_json(path)
    if not isinstance(found, list) or not all(isinstance(part, dict) for part in found):
        raise ValueError(f"{path} must hold a list of objects")
    return [(str(part.get("type", "")).rpartition(".")[2], str(part.get("path", ""))) for part in found]


def _mean(hidden_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    weights = mask_BS[:, :, None].float()
    return (hidden_BSE * weights).sum(1) / weights.sum(1)


def _largest(hidden_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    return hidden_BSE.masked_fill(~mask_BS[:, :, None], -torch.inf).amax(1)


POOLINGS: dict[str, Pool] = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_cls_token": lambda hidden_BSE, mask_BS: hidden_BSE[:, 0],
    "pooling_mode_max_tokens": _largest,
}
"""sentence-transformers' names for [B, S, E] -> [B, E]."""
