"""Exports of encoders with a head for classes: the ONNX graph and the dense folder against transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from compressor.checkpoint import Checkpoint, CheckpointWriter
from compressor.exports import export_checkpoint, import_checkpoint
from compressor.formats import make_format
from compressor.masks import n_m_mask
from compressor.models import block_linears, quiet_transformers
from compressor.output import OutputFolder
from compressor.quantizers import rtn
from compressor.scheme import QuantizationConfig, Scheme
from tests.tiny import VOCABULARY, make_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
LABELS = {"id2label": {0: "good", 1: "bad", 2: "neither"}, "label2id": {"good": 0, "bad": 1, "neither": 2}}
SCHEMES = {
    "dense": None,
    "sparse int4": Scheme("sparse24_int4", 32),
    "int4": Scheme("int4", 32),
    "int8 rows": Scheme("int8", -1),
    "sparse bf16": Scheme("sparse24", -1),
    "fp8": Scheme("fp8", -1),
}
SENTENCES = [[5, 9, 200, 31, 77, 120, 3], [7, 250, 42], [8]]


class MatMulNBits(OpRun):  # type: ignore[misc]
    """onnxruntime's product, by its documentation: fields low first, the zero point half the range."""

    op_domain = "com.microsoft"

    def _run(self, x: Any, blob: Any, scale: Any, K: int, N: int, bits: int, block_size: int) -> tuple[Any]:
        fields = np.stack((blob & 15, blob >> 4), axis=3) if bits == 4 else blob
        values = fields.reshape(N, K).astype(np.float32) - 2 ** (bits - 1)
        return (x @ (values * scale.reshape(N, -1).repeat(block_size, axis=1)).T,)


def make_classifier(kind: str, folder: Path, **options: Any) -> Path:
    torch.manual_seed(1)
    model: Any
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**SIZES, **LABELS, **options))
    else:
        model = RobertaForSequenceClassification(RobertaConfig(**SIZES, **LABELS, **options))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, for a graph that left them out would pass
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save(model, folder)
    return folder


def save(model: Any, folder: Path) -> None:
    with quiet_transformers():
        model.bfloat16().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)


def pack(model: Path, out: Path, scheme: Scheme, embedding: Scheme | None = None) -> Path:
    """Rounds a folder's linears, and its word embedding where asked, to nearest."""
    source, loaded = Checkpoint.open(model), load(model)
    schemes = dict.fromkeys(block_linears(loaded), scheme)
    if embedding is not None:
        schemes[f"{loaded.base_model_prefix}.embeddings.word_embeddings"] = embedding
    with OutputFolder(out) as output:
        writer = CheckpointWriter(output)
        for name in source.names():
            module, _, key = name.rpartition(".")
            if key != "weight" or module not in schemes:
                writer.add(name, source.tensor(name))
                continue
            weight = source.tensor(name).float()
            if schemes[module].format.startswith("sparse24"):
                weight *= n_m_mask(weight.abs())
            for part, tensor in make_format(schemes[module]).pack(rtn(weight, None, schemes[module])).items():
                writer.add(f"{module}.{part}", tensor)
        make_tokenizer().save_pretrained(writer.folder)
        writer.finish(source.config | {"quantization_config": QuantizationConfig.from_schemes(schemes).to_dict()})
    return out


def load(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def packed_values(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of the packed modules, from the formats themselves."""
    checkpoint = Checkpoint.open(folder)
    modules = {name.rpartition(".")[0] for name in checkpoint.names()}
    schemes = {name: scheme for name in modules if (scheme := checkpoint.scheme_of(name)) is not None}
    result = {}
    for name, scheme in schemes.items():
        parts = {key: part for key, part in checkpoint.module(name).items() if key != "bias"}
        result[name] = make_format(scheme).unpack_quantized(parts).dequantized()
    return result


def batch(padding: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of several lengths in one padded batch, and their mask."""
    longest = max(map(len, SENTENCES))
    rows = []
    for sentence in SENTENCES:
        fill = [padding] * (longest - len(sentence))
        rows.append([*fill, *sentence] if left else [*sentence, *fill])
    ids = np.array(rows, np.int64)
    return ids, (ids != padding).astype(np.int64)


def feeds_of(kind: str, *, left: bool = False) -> dict[str, np.ndarray]:
    ids, mask = batch(0 if kind == "bert" else 1, left=left)
    feeds = {"input_ids": ids, "attention_mask": mask}
    return feeds | {"token_type_ids": (ids % 2) * mask} if kind == "bert" else feeds


def run_onnx(folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by onnx's own reference interpreter."""
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(folder / "model.onnx")
    assert [entry.name for entry in model.graph.input] == list(feeds)
    evaluator = ReferenceEvaluator(model, new_ops=[MatMulNBits])
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


def by_transformers(model: Any, feeds: dict[str, np.ndarray]) -> Any:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in feeds.items()})


@pytest.fixture(scope="module", params=["bert", "roberta"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def classifier(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(kind, tmp_path_factory.mktemp(kind) / "model")


@pytest.fixture(scope="module")
def sparse_int4(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    return pack(classifier, out, Scheme("sparse24_int4", 32), Scheme("int8", -1))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_onnx_graph_computes_what_transformers_does(name: str, kind: str, classifier: Path, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    folder = classifier if scheme is None else pack(classifier, tmp_path / "packed", scheme)
    assert export_checkpoint(folder, "onnx", tmp_path / "onnx") == []
    model = load(classifier)
    for module, values in packed_values(folder).items():
        rounded = values.bfloat16().float() if name in ("sparse bf16", "fp8") else values
        model.get_submodule(module).weight.data = rounded
    padded = feeds_of(kind)
    attended = padded | {"attention_mask": np.ones_like(padded["attention_mask"])}
    for feeds in (padded, feeds_of(kind, left=True), attended):
        found = run_onnx(tmp_path / "onnx", feeds)["logits"]
        wanted = by_transformers(model, feeds).logits.numpy()
        assert found.shape == (len(SENTENCES), 3)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert np.abs(wanted - wanted[0]).max() > 0.1  # the head does see the sentences


@pytest.mark.full
@pytest.mark.parametrize("name", ["sparse int4", "int8 rows"])
def test_onnxruntime_computes_what_the_reference_does(name: str, kind: str, classifier: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="a peer: pip install onnxruntime")
    scheme = SCHEMES[name]
    assert scheme is not None
    export_checkpoint(pack(classifier, tmp_path / "packed", scheme, Scheme("int8", -1)), "onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = feeds_of(kind)
    (found,) = session.run(["logits"], feeds)
    wanted = run_onnx(tmp_path / "onnx", feeds)["logits"]
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_padding_changes_nothing(kind: str, sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "onnx", tmp_path / "onnx")
    feeds = feeds_of(kind)
    together = run_onnx(tmp_path / "onnx", feeds)["logits"]
    for row, sentence in enumerate(SENTENCES):
        alone = {name: array[row : row + 1, : len(sentence)] for name, array in feeds.items()}
        assert np.allclose(run_onnx(tmp_path / "onnx", alone)["logits"][0], together[row], atol=1e-4)


def test_the_embedding_stays_int8(kind: str, sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "onnx", tmp_path / "onnx")
    values = packed_values(sparse_int4)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    table = next(name for name in values if name.endswith("word_embeddings"))
    assert stored[f"{table}.weight_packed"] == onnx.TensorProto.UINT8
    assert f"{table}.weight" not in stored
    reference = load_with(sparse_int4, tmp_path / "dense", values)
    feeds = feeds_of(kind)
    found, wanted = run_onnx(tmp_path / "onnx", feeds)["logits"], by_transformers(reference, feeds).logits.numpy()
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def load_with(folder: Path, dense: Path, values: dict[str, Tensor]) -> Any:
    """The dense export of a folder with the weights that the formats give, before rounding to bf16."""
    export_checkpoint(folder, "dense", dense)
    model = load(dense)
    for name, value in values.items():
        model.get_submodule(name).weight.data = value
    return model


def test_dense_is_a_plain_folder_with_zeros_in_place(kind: str, sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "dense", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    model = load(tmp_path / "dense")
    assert (
        type(model).__name__
        == config["architectures"][0]
        == json.loads((sparse_int4 / "config.json").read_text())["architectures"][0]
    )
    assert model.config.id2label == LABELS["id2label"]
    for name, values in packed_values(sparse_int4).items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, values.bfloat16().float()), name
        if not name.endswith("word_embeddings"):
            assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) <= 2
    stored = Checkpoint.open(sparse_int4)
    head = next(name for name in stored.names() if name in ("classifier.weight", "classifier.out_proj.weight"))
    assert torch.equal(model.state_dict()[head], stored.tensor(head).float())


@pytest.mark.parametrize("target", ["dense", "onnx", "compressed-tensors"])
def test_import_gives_the_same_bytes(target: str, sparse_int4: Path, tmp_path: Path) -> None:
    assert export_checkpoint(sparse_int4, target, tmp_path / "export") == []
    assert import_checkpoint(tmp_path / "export", tmp_path / "back") == []
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (sparse_int4 / name).read_bytes(), name


def test_compressed_tensors_leaves_the_head_alone(kind: str, sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "compressed-tensors", tmp_path / "ct")
    record = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    head = ["bert.pooler.dense", "classifier"] if kind == "bert" else ["classifier.dense", "classifier.out_proj"]
    assert record["ignore"] == sorted([*head, "lm_head"])
    assert [group["targets"] for group in record["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize("target", ["gptq", "gguf"])
def test_targets_for_language_models_refuse_a_classifier(target: str, sparse_int4: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"knows .* this is (Bert|Roberta)ForSequenceClassification.*export to .*dense"
    ):
        export_checkpoint(sparse_int4, target, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_no_integers_is_said_before_any_work(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of this checkpoint has integer values"):
        export_checkpoint(classifier, "compressed-tensors", tmp_path / "export")


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_what_the_graph_does_not_know_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make_classifier("bert", tmp_path / "model", **change)
    with pytest.raises(ValueError, match=f"export to onnx knows {next(iter(change))}"):
        export_checkpoint(folder, "onnx", tmp_path / "export")


def test_an_encoder_without_a_head(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model: Any = BertModel(BertConfig(**SIZES))
    save(model, tmp_path / "model")
    export_checkpoint(tmp_path / "model", "onnx", tmp_path / "onnx")
    feeds = feeds_of("bert")
    found, wanted = run_onnx(tmp_path / "onnx", feeds), by_transformers(model.float().eval(), feeds)
    for name in ("last_hidden_state", "pooler_output"):
        assert np.abs(found[name] - wanted[name].numpy()).max() < 1e-4, name
