"""What the ONNX export must know of an encoder of BERT's kind, read from `config.json`.

BERT and RoBERTa share one block. They differ in how positions are counted (RoBERTa's begin after its padding token's
id and leave padding out), in token types, which RoBERTa does not ask for, and in the layers of the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressor.exports.source import architecture_of

ARCHITECTURES = ("BertForSequenceClassification", "RobertaForSequenceClassification", "BertModel", "RobertaModel")
HEADS = {
    "BertForSequenceClassification": ("bert.pooler.dense", "classifier"),
    "RobertaForSequenceClassification": ("classifier.dense", "classifier.out_proj"),
}
"""{architecture: the two linears of its head, a tanh between them}."""


@dataclass(frozen=True)
class BertLike:
    """The numbers of `config.json` under short names.

    Args:
        labels: classes, or 0 for an encoder without a head.
        prefix: of the names of the encoder's tensors.
        padding: the id from which RoBERTa counts positions; None where they are counted from 0.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    labels: int
    eps: float
    prefix: str
    padding: int | None


def parse_bert_like(target: str, config: Mapping[str, Any]) -> BertLike:
    """Reads the configuration of one of `ARCHITECTURES`; raises ValueError for what the exports do not know."""
    architecture = architecture_of(config)
    known = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, value in known.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"export to {target} knows {key} {value!r}, this is {config[key]!r}; export to dense instead"
            )
    roberta = architecture.startswith("Roberta")
    has_head = architecture in HEADS
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels", 2))
    return BertLike(
        architecture=architecture,
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        labels=labels if has_head else 0,
        eps=float(config.get("layer_norm_eps", 1e-12)),
        prefix=("roberta." if roberta else "bert.") if has_head else "",
        padding=int(config.get("pad_token_id", 1)) if roberta else None,
    )
