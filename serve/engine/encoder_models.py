"""From a checkpoint folder to an encoder: our own for BERT's shape, transformers' modules for its other relatives.

Ours starts in a fraction of the time, since transformers is not imported, and computes no padding.

Shapes: B sequences, S tokens of the longest of them, T tokens of all, C hidden size, N classes.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.checkpoint import Checkpoint
from compressor.compressed_linear import CompressedEmbedding, CompressedLinear, PackedModule
from serve.engine.models.bert import Bert, BertLayer, Places
from serve.engine.models.decoder import Norm
from serve.engine.models.linears import PlainEmbedding, SideBySide, packed_embedding, packed_linear, plain_linear
from serve.engine.transformers_model import formats_of, from_pretrained, prepare
from serve.engine.weights import bytes_of

logger = logging.getLogger(__name__)

OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
"""Model types whose positions begin behind the padding token's id."""
OURS = {"bert": "bert.", "roberta": "roberta.", "xlm-roberta": "roberta.", "camembert": "roberta."}
"""Model types of BERT's shape, and what the names of an encoder under a head begin with."""
HEADS = {"bert": ("bert.pooler.dense", "classifier")}
ROBERTA_HEAD = ("classifier.dense", "classifier.out_proj")
EXPECTED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}


@dataclass(frozen=True)
class EncoderInput:
    """Token ids, and of each whether it belongs to the first or the second text."""

    ids: list[int]
    types: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class EncoderModel(Protocol):
    """An encoder, with its configuration as config.json has it."""

    config: Mapping[str, Any]
    formats: tuple[str, ...]
    weight_bytes: int

    def logits(self, batch: Sequence[EncoderInput]) -> Tensor:
        """[B, N], of a classifier."""

    def states(self, batch: Sequence[EncoderInput]) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, C], and which of them are a token's [B, S]."""


def load_encoder(checkpoint: Checkpoint, dtype: torch.dtype, classifies: bool) -> EncoderModel:
    """The model of an opened checkpoint; ValueError says what is wrong with it."""
    config = checkpoint.config
    if config.get("model_type") in OURS and all(config.get(key, value) == value for key, value in EXPECTED.items()):
        return OurEncoder(checkpoint, dtype, classifies)
    return TransformersEncoder(checkpoint, dtype, classifies)


class OurEncoder:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, classifies: bool) -> None:
        self.config: Mapping[str, Any] = checkpoint.config
        reader = _Reader(checkpoint, dtype)
        self._bert = reader.bert(classifies).eval()
        self.formats, self.weight_bytes = tuple(sorted(reader.formats)), bytes_of(self._bert)

    def logits(self, batch: Sequence[EncoderInput]) -> Tensor:
        hidden_TC, places = self._hidden(batch)
        return self._bert.logits(hidden_TC, places)

    def states(self, batch: Sequence[EncoderInput]) -> tuple[Tensor, Tensor]:
        hidden_TC, places = self._hidden(batch)
        return hidden_TC[places.flat_BS], places.real_BS

    def _hidden(self, batch: Sequence[EncoderInput]) -> tuple[Tensor, Places]:
        places = Places([len(given) for given in batch])
        ids_T = torch.tensor([token for given in batch for token in given.ids])
        types_T = torch.tensor([kind for given in batch for kind in given.types])
        return self._bert(ids_T, types_T, places), places


class _Reader:
    """Reads the parts of a model of BERT's shape, each in the format that it is stored in."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.config = checkpoint.config
        self.formats: set[str] = set()
        try:
            self.hidden, self.inner = int(self.config["hidden_size"]), int(self.config["intermediate_size"])
            self.heads, self.eps = int(self.config["num_attention_heads"]), float(self.config["layer_norm_eps"])
            self.layers, self.vocab = int(self.config["num_hidden_layers"]), int(self.config["vocab_size"])
        except KeyError as error:
            raise ValueError(f"config.json of {checkpoint.folder.name} has no {error.args[0]}") from None

    def bert(self, classifies: bool) -> Bert:
        kind = str(self.config["model_type"])
        under_head = f"{OURS[kind]}embeddings.LayerNorm.weight" in self.checkpoint.shards
        prefix = OURS[kind] if under_head else ""
        at = f"{prefix}embeddings"
        first = int(self.config.get("pad_token_id") or 0) + 1 if kind in OFFSET else 0
        labels = len(labels_of(self.config))
        head = None
        if classifies:
            dense, out = HEADS.get(kind, ROBERTA_HEAD)
            head = self._linear([dense], self.hidden, [self.hidden]), self._linear([out], self.hidden, [labels])
        return Bert(
            self._embedding(f"{at}.word_embeddings", self.vocab),
            self._table(f"{at}.position_embeddings")[first:].contiguous(),
            self._table(f"{at}.token_type_embeddings"),
            self._norm(f"{at}.LayerNorm"),
            [self._layer(f"{prefix}encoder.layer.{index}") for index in range(self.layers)],
            head,
        )

    def _layer(self, at: str) -> BertLayer:
        hidden, inner = self.hidden, self.inner
        return BertLayer(
            self.heads,
            self._linear([f"{at}.attention.self.{part}" for part in ("query", "key", "value")], hidden, [hidden] * 3),
            self._linear([f"{at}.attention.output.dense"], hidden, [hidden]),
            self._norm(f"{at}.attention.output.LayerNorm"),
            self._linear([f"{at}.intermediate.dense"], hidden, [inner]),
            self._linear([f"{at}.output.dense"], inner, [hidden]),
            self._norm(f"{at}.output.LayerNorm"),
        )

    def _linear(self, names: list[str], in_features: int, sizes: list[int]) -> nn.Module:
        """Linears of the same input: as one where they are stored alike, else side by side."""
        schemes = [self.checkpoint.scheme_of(name) for name in names]
        scheme = schemes[0]
        own_projections = scheme is not None and scheme.low_rank is not None and scheme.low_rank.trained_projection
        if len(names) > 1 and (len(set(schemes)) > 1 or own_projections):
            parts = zip(names, sizes, strict=True)
            return SideBySide([self._linear([name], in_features, [size]) for name, size in parts])
        tensors = self.checkpoint.linear(names)
        if "bias" not in tensors:
            raise ValueError(f"{names[0]} has no bias: the checkpoint is incomplete")
        if scheme is None:
            weight = self._plain(names[0], tensors["weight"], (sum(sizes), in_features))
            return plain_linear(weight, tensors["bias"].to(self.dtype))
        tensors["bias"] = tensors["bias"].to(getattr(torch, scheme.dtype))
        with torch.device("meta"):
            stored = CompressedLinear(in_features, sum(sizes), scheme, bias=True)
        self._fill(stored, names[0], tensors)
        return packed_linear(stored)

    def _embedding(self, name: str, rows: int) -> nn.Module:
        scheme, tensors = self.checkpoint.scheme_of(name), self.checkpoint.module(name)
        if scheme is None:
            return PlainEmbedding(self._plain(name, tensors["weight"], (rows, self.hidden)))
        with torch.device("meta"):
            stored = CompressedEmbedding(rows, self.hidden, scheme)
        self._fill(stored, name, tensors)
        return packed_embedding(stored)

    def _table(self, name: str) -> Tensor:
        """A small embedding as it is computed with; unpacked if need be."""
        module = self._embedding(name, self._rows(name))
        rows: Tensor = module(torch.arange(self._rows(name)))
        return rows.to(self.dtype)

    def _rows(self, name: str) -> int:
        key = "max_position_embeddings" if name.endswith("position_embeddings") else "type_vocab_size"
        return int(self.config[key])

    def _norm(self, name: str) -> Norm:
        weight, bias = (self.checkpoint.tensor(f"{name}.{part}").to(self.dtype) for part in ("weight", "bias"))
        return Norm(weight, bias, self.eps, rms=False)

    def _plain(self, name: str, weight: Tensor, shape: tuple[int, int]) -> Tensor:
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, but config.json says {shape}")
        self.formats.add("dense")
        return weight.to(self.dtype).contiguous()

    def _fill(self, module: PackedModule, name: str, tensors: dict[str, Tensor]) -> None:
        try:
            module.assign(tensors)
        except ValueError as error:
            raise ValueError(f"{name} does not fit config.json: {error}") from None
        self.formats.add(module.scheme.format)


class TransformersEncoder:
    """Padded batches through transformers' modules."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, classifies: bool) -> None:
        self._model = _from_transformers(checkpoint, dtype, classifies)
        config = self._model.config
        # Some families have names of their own for these.
        shared = {key: getattr(config, key) for key in ("hidden_size", "vocab_size", "max_position_embeddings")}
        self.config: Mapping[str, Any] = config.to_dict() | shared
        self.formats, self.weight_bytes = formats_of(self._model), bytes_of(self._model)
        self._padding = config.pad_token_id or 0
        typed = "token_type_ids" in inspect.signature(self._model.forward).parameters
        self._types = getattr(config, "type_vocab_size", 0) if typed else 0

    def logits(self, batch: Sequence[EncoderInput]) -> Tensor:
        logits: Tensor = self._computed(batch)[0].logits
        return logits

    def states(self, batch: Sequence[EncoderInput]) -> tuple[Tensor, Tensor]:
        out, mask_BS = self._computed(batch)
        return out.last_hidden_state, mask_BS

    def _computed(self, batch: Sequence[EncoderInput]) -> tuple[Any, Tensor]:
        longest = max(map(len, batch))
        ids_BS = torch.full((len(batch), longest), self._padding)
        types_BS, mask_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, given in enumerate(batch):
            ids_BS[row, : len(given)] = torch.tensor(given.ids)
            types_BS[row, : len(given)] = torch.tensor(given.types)
            mask_BS[row, : len(given)] = True
        types = {"token_type_ids": types_BS.clamp_(max=self._types - 1)} if self._types else {}
        return self._model(input_ids=ids_BS, attention_mask=mask_BS.long(), **types), mask_BS


def _from_transformers(checkpoint: Checkpoint, dtype: torch.dtype, classifies: bool) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = checkpoint.config
    if config.get("model_type") not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.get("is_encoder_decoder"):
        [architecture, *_] = config.get("architectures") or ["no architecture"]
        raise ValueError(
            f"unsupported architecture {architecture}: classifiers and embeddings are served from encoders "
            "of BERT's kind, such as BERT, RoBERTa, DistilBERT, MPNet and ModernBERT"
        )
    logger.warning("%s runs through transformers' modules: it starts slower", config.get("model_type"))
    kind = "AutoModelForSequenceClassification" if classifies else "AutoModel"
    # Sentence encoders are often stored without the pooler that they have no use for.
    model = from_pretrained(checkpoint.folder, dtype, kind, optional=() if classifies else ("pooler.",)).eval()
    if not classifies and getattr(model, "pooler", None) is not None:
        model.pooler = None
    prepare(model)
    return model


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes; transformers leaves out of config.json what is as it takes it to be, two classes."""
    named = {int(place): str(name) for place, name in (config.get("id2label") or {}).items()}
    count = len(named) or int(config.get("num_labels") or 2)
    return tuple(named.get(place, f"LABEL_{place}") for place in range(count))
