"""`compress MODEL --recipe pst-... --task T`: from a labelled file to a packed model that transformers loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compressor import task_stage
from compressor.checkpoint import Checkpoint, sha256_of
from compressor.cli import main
from compressor.exports import export_checkpoint
from compressor.inspection import packed_modules, verify
from compressor.masks import check_n_m
from compressor.models import load_classifier
from compressor.recipe import TaskSection
from compressor.tasks import Example, Task
from serve.engine.encoder import EncoderEngine
from tests.compressor.test_exports_classifiers import run_onnx
from tests.serve.test_encoder import ask
from tests.tiny import VOCABULARY, make_tokenizer

WORDS = {"bad": ("dull", "slow", "worse"), "good": ("bright", "quick", "better")}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head, as encoders come.

    Its weights are ten times BERT's own initial ones, so that words reach the token that is classified, as in a trained
    encoder: at 0.02 they move it by 0.4 %, as much as a step of bf16, and what is learnt is luck.
    """
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "reviews.jsonl"
    lines = [
        json.dumps({"text": f"{number} a {word} film", "label": label})
        for number in range(60)
        for label, words in WORDS.items()
        for word in words[: 1 + number % 3]
    ]
    file.write_text("\n".join(lines))
    return file


def arguments(model: Path, task: Path, out: Path, *settings: str, recipe: str = "pst-2of4-int8") -> list[str]:
    fixed = (f"task.source.path={task}", "task.length=32", "retraining.loop.learning_rate=2e-3", *settings)
    flags = [part for setting in fixed for part in ("--set", setting)]
    return [str(model), "--recipe", recipe, "--task", "custom", "--out", str(out), *flags]


def logits_of(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import compressor.hf  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits[0].float()


@pytest.fixture(scope="module", params=[("int8", "fp32"), ("int4", "bf16")], ids=lambda given: given[0])
def tuned(
    request: pytest.FixtureRequest, encoder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the command makes of the encoder, once for each kind of values, in each precision on any processor."""
    values, precision = request.param
    out = tmp_path_factory.mktemp(values) / "model"
    settings = ("retraining.budget=12 epochs", f"retraining.loop.precision={precision}")
    assert main(arguments(encoder, reviews, out, *settings, recipe=f"pst-2of4-{values}")) == 0
    return out


def test_a_classifier_is_fine_tuned_pruned_packed_and_loaded(tuned: Path) -> None:
    report = verify(tuned)
    assert report.sparse == 12
    assert report.packed == 13
    checkpoint = Checkpoint.open(tuned)
    assert checkpoint.config["architectures"] == ["BertForSequenceClassification"]
    values = tuned.parent.name[:4]
    assert {scheme.format for scheme in packed_modules(checkpoint).values()} == {f"sparse24_{values}", "int8"}
    card = (tuned / "README.md").read_text()
    accuracy = re.search(r"\| test accuracy \| ([\d.]+) \|", card)
    assert re.search(r"\| validation accuracy \| [\d.]+ \|", card)
    commonest = re.search(r"\| test share of commonest class \| ([\d.]+) \|", card)
    assert accuracy is not None and commonest is not None
    assert float(accuracy[1]) > 0.9 and 0.5 <= float(commonest[1]) < 0.7
    assert "text-classification" in card
    assert re.search(r"\| trained parameters \| [\d,]+ \([\d.]+% of the model's\) \|", card)
    for label, words in enumerate(WORDS.values()):
        for word in words:
            assert logits_of(tuned, f"7 a {word} film").argmax() == label
    assert [entry.name for entry in tuned.parent.iterdir()] == ["model"]


def test_the_classifier_is_served(tuned: Path) -> None:
    """`POST /classify` gives the probabilities that transformers computes from the same packed weights."""
    engine = EncoderEngine.from_folder(tuned, dtype="float32")
    texts = ["7 a quick film", "12 a dull film"]
    answer = ask(engine, "/classify", {"input": texts})
    assert answer.status_code == 200
    assert [one["label"] for one in answer.json()["data"]] == ["good", "bad"]
    for one, text in zip(answer.json()["data"], texts, strict=True):
        assert one["probs"] == pytest.approx(logits_of(tuned, text).softmax(-1).tolist(), abs=0.05)


def test_the_classifiers_onnx_graph_classes_alike(tuned: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    export_checkpoint(tuned, "onnx", tmp_path / "onnx")
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    for text in ("7 a quick film", "12 a dull film"):
        ids = np.array([tokenizer(text)["input_ids"]])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found = torch.from_numpy(run_onnx(tmp_path / "onnx", feeds)["logits"][0]).softmax(-1)
        torch.testing.assert_close(found, logits_of(tuned, text).softmax(-1), atol=0.05, rtol=0.05)


def test_what_was_trained_on_the_grid_is_what_is_packed(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    """The tested model and the loaded one are the same weights: only embeddings are rounded after the test."""
    out = tmp_path / "model"
    wanted = ("quantization.embeddings=dense", "retraining.loop.quantize_share=0.5")
    assert main(arguments(encoder, reviews, out, *wanted)) == 0
    assert verify(out).packed == 12
    for name, scheme in packed_modules(Checkpoint.open(out)).items():
        from compressor.formats import make_format

        check_n_m(make_format(scheme).unpack(Checkpoint.open(out).module(name)))


@pytest.fixture(scope="module")
def dense_classifier(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is fine-tuned for the task, as others publish them."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    export_checkpoint(tuned, "dense", folder, allow_lossy=True)
    return folder


def teacher_of(out: Path) -> str | None:
    found = re.search(r"\| teacher \| (.*) \|", (out / "README.md").read_text())
    return found and found[1]


def test_a_fine_tuned_model_is_its_own_teacher(dense_classifier: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(arguments(dense_classifier, reviews, out, "retraining.budget=1 epochs")) == 0
    assert teacher_of(out) == "the model itself, dense"
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["kl"] > -1e-6 for line in metrics)


def test_a_head_of_another_task_teaches_nothing(dense_classifier: Path, reviews: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(dense_classifier)
    torch.nn.init.zeros_(model.classifier.weight)
    other, out = tmp_path / "other", tmp_path / "model"
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    assert main(arguments(other, reviews, out, "retraining.budget=1 epochs")) == 0
    assert teacher_of(out) == "none: the model's own head knows another task"
    assert "kl" not in (out / "metrics.jsonl").read_text()


def test_a_teacher_is_checked(
    encoder: Path, dense_classifier: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"

    def refused(teacher: Path, *settings: str) -> str:
        assert main([*arguments(encoder, reviews, out, f"task.teacher={teacher}", *settings), "--dry-run"]) == 1
        return capsys.readouterr().err

    assert "has no head for classes" in refused(encoder)
    assert "is not known" in refused(tmp_path / "nowhere")
    assert "leave out one of them" in refused(dense_classifier, "retraining.loop.kl_weight=0")
    wanted = (f"task.teacher={dense_classifier}", "retraining.budget=1 epochs")
    assert main(arguments(encoder, reviews, out, *wanted)) == 0
    assert teacher_of(out) == str(dense_classifier)


def test_a_teacher_is_known_by_files_sorted_by_class_and_by_its_classes_names(
    dense_classifier: Path, reviews: Path, tmp_path: Path
) -> None:
    """Its head has the classes in the other order, as models on a hub may."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(dense_classifier)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.flip(0))
    model.config.id2label, model.config.label2id = {0: "GOOD", 1: "BAD"}, {"GOOD": 0, "BAD": 1}
    other, out, file = tmp_path / "other", tmp_path / "model", tmp_path / "sorted.jsonl"
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    file.write_text("\n".join(sorted(reviews.read_text().splitlines(), key=lambda line: json.loads(line)["label"])))
    assert main(arguments(other, file, out, "retraining.budget=1 epochs")) == 0
    assert teacher_of(out) == "the model itself, dense"
    assert logits_of(out, "7 a quick film").argmax() == 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_decoder_learns_to_classify(
    family: str, reviews: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither names a padding token, which is where a decoder looks for a text's end."""
    out = tmp_path / "model"
    assert main(arguments(request.getfixturevalue(f"tiny_{family}"), reviews, out, "retraining.budget=2 epochs")) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == make_tokenizer().eos_token_id


def test_a_body_of_another_shape_is_not_replaced_by_noise(encoder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": VOCABULARY + 8}))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has another shape than config\.json says"):
        load_classifier(folder, ("a", "b"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_texts_are_written(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{n}:", "label": "yes"}) for n in range(80)))
    out = tmp_path / "model"
    settings = ["task.source.kind=generation", "task.beams=2", "quantization.values=int4", "task.test_examples=3"]
    settings.append("retraining.budget=8 epochs")
    assert main(arguments(model, file, out, *settings)) == 0
    assert verify(out).sparse == (14 if family == "llama" else 8)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["ce"] < metrics[0]["ce"] - 0.5
    assert "| test bleu |" in (out / "README.md").read_text()


def test_whole_heads_and_neurons(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    settings = ("sparsity=null", "retraining.heads_and_neurons=0.5", "quantization.values=bfloat16")
    assert main(arguments(encoder, reviews, out, *settings, "retraining.budget=1 epochs")) == 0
    checkpoint = Checkpoint.open(out)
    weight = checkpoint.module("bert.encoder.layer.0.intermediate.dense")["weight"]
    assert int((weight.float().abs().sum(1) == 0).sum()) == 64


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("sparsity=null",), "needs a sparsity section"),
        (("quantization.quantizer=gptq",), "rounded to nearest"),
        (("retraining.method=ast",), "methods that fine-tune for a task"),
        (("retraining.method=dense",), "leave the sparsity section out"),
        (("sparsity.keep_dense=auto:5%",), "name the layers"),
        (("sparsity=null", "retraining.method=movement", "retraining.heads_and_neurons=0.5"), "by pst only"),
        (("task.source.label=stars",), "stars"),
        (("retraining.loop.hidden_weight=1",), "of training on text only"),
        (("text.source=mine.txt",), "its examples are all that is read"),
    ],
)
def test_what_does_not_go_together_is_said(
    settings: tuple[str, ...],
    why: str,
    encoder: Path,
    reviews: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments(encoder, reviews, tmp_path / "model", *settings), "--dry-run"]) == 1
    assert why in capsys.readouterr().err


def test_missing_libraries_of_metrics_are_said_before_fine_tuning(
    encoder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    assert main([*arguments(encoder, reviews, tmp_path / "model"), "--dry-run"]) == 1
    assert "pip install 'halfweight[tasks]'" in capsys.readouterr().err


def test_examples_longer_than_the_models_positions_are_refused(
    encoder: Path, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(encoder, reviews, tmp_path / "model", "task.length=65"), "--dry-run"]) == 1
    assert "task.length 65 given, and the model has 64 positions" in capsys.readouterr().err


def test_robertas_positions_begin_behind_the_one_for_padding(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=34, **sizes))
    model(torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 33), 5))
    model.save_pretrained(tmp_path / "roberta")
    make_tokenizer().save_pretrained(tmp_path / "roberta")
    command = [*arguments(tmp_path / "roberta", reviews, tmp_path / "model"), "--dry-run"]
    assert main(command) == 0
    assert main([*command, "--set", "task.length=33"]) == 1
    assert "the model has 32 positions" in capsys.readouterr().err


def test_what_is_tested_lies_where_it_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def evaluated(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        seen.append(model.weight.device.type)
        return {"accuracy": 1.0}

    monkeypatch.setattr(task_stage, "training_device", lambda: torch.device("meta"))
    monkeypatch.setattr(task_stage, "evaluate", evaluated)
    example = Example("a", label=0)
    task = Task("some", "classification", ("x", "y"), ("accuracy",), [example], [example], [example])
    figures = task_stage._tested(torch.nn.Linear(4, 4), None, task, TaskSection(name="custom"), lambda *_: None)
    assert seen == ["meta", "meta"] and figures["validation_accuracy"] == figures["test_accuracy"] == 1.0


def test_a_task_recipe_without_a_task_is_refused(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(encoder), "--recipe", "pst-2of4-int4", "--out", "x"]) == 1
    assert "give --task NAME, of: rotten-tomatoes" in capsys.readouterr().err


@pytest.mark.full
def test_two_processes_train_as_one(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    """Gradients are averaged, so both see the same masks; fp32 sums differ in the last bits only."""
    settings = ("retraining.budget=1 epochs", "retraining.loop.precision=fp32", "retraining.loop.micro_batch=8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", [sys.executable, "-m"]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]),
    ):
        command = [*launcher, "compressor", *arguments(encoder, reviews, tmp_path / name, *settings)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    one, two = (logits_of(tmp_path / name, "3 a better film") for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=0.05, rtol=0.05)


def test_a_second_run_gives_the_same_bytes(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(arguments(encoder, reviews, tmp_path / name, "retraining.budget=1 epochs")) == 0
    one, two = (sha256_of(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one == two
