"""`compress MODEL --recipe pst-... --task T`: from a labelled file to a packed model that transformers loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compressor.checkpoint import Checkpoint, sha256_of
from compressor.cli import main
from compressor.inspection import packed_modules, verify
from compressor.masks import check_n_m
from tests.tiny import VOCABULARY, make_tokenizer

WORDS = {"bad": ("dull", "slow", "worse"), "good": ("bright", "quick", "better")}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head, as encoders come."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)).save_pretrained(folder)
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


def arguments(model: Path, task: Path, out: Path, *settings: str) -> list[str]:
    fixed = (f"task.source.path={task}", "task.length=32", "retraining.loop.learning_rate=1e-2", *settings)
    flags = [part for setting in fixed for part in ("--set", setting)]
    return [str(model), "--recipe", "pst-2of4-int8", "--task", "custom", "--out", str(out), *flags]


def logits_of(folder: Path, text: str) -> torch.Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import compressor.hf  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "bad", 1: "good"}
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).logits[0].float()


def test_a_classifier_is_fine_tuned_pruned_packed_and_loaded(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(arguments(encoder, reviews, out, "retraining.budget=6 epochs")) == 0
    report = verify(out)
    assert report.sparse == 12
    assert report.packed == 13
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config["architectures"] == ["BertForSequenceClassification"]
    assert {scheme.format for scheme in packed_modules(checkpoint).values()} == {"sparse24_int8", "int8"}
    card = (out / "README.md").read_text()
    accuracy = re.search(r"\| test accuracy \| ([\d.]+) \|", card)
    assert accuracy is not None and float(accuracy[1]) > 0.9
    assert "text-classification" in card
    assert logits_of(out, "7 a quick film").argmax() == 1
    assert logits_of(out, "7 a slow film").argmax() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_was_trained_on_the_grid_is_what_is_packed(encoder: Path, reviews: Path, tmp_path: Path) -> None:
    """The tested model and the loaded one are the same weights: only embeddings are rounded after the test."""
    out = tmp_path / "model"
    wanted = ("quantization.embeddings=dense", "retraining.loop.quantize_share=0.5")
    assert main(arguments(encoder, reviews, out, *wanted)) == 0
    assert verify(out).packed == 12
    for name, scheme in packed_modules(Checkpoint.open(out)).items():
        from compressor.formats import make_format

        check_n_m(make_format(scheme).unpack(Checkpoint.open(out).module(name)))


def test_texts_are_written(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{n}:", "label": "yes"}) for n in range(80)))
    out = tmp_path / "model"
    settings = ["task.source.kind=generation", "task.beams=2", "quantization.values=int4", "task.test_examples=3"]
    settings.append("retraining.budget=8 epochs")
    assert main(arguments(tiny_llama, file, out, *settings)) == 0
    assert verify(out).sparse == 14
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
