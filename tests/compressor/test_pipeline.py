"""The command `compress` on tiny models, through its own entry point."""

import gc
import json
import re
import shutil
import sys
import weakref
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from compressor import pipeline
from compressor.calibration import calibrate_blocks, weight_of
from compressor.checkpoint import Checkpoint
from compressor.cli import main, parser
from compressor.data import load_text
from compressor.exports import export_checkpoint
from compressor.formats import make_format
from compressor.inspection import inspect, packed_modules, verify
from compressor.masks import check_n_m
from compressor.models import load_model, load_tokenizer
from compressor.pipeline import quantize, retrain
from compressor.preflight import check
from compressor.recipe import load_recipe
from compressor.retraining import text_loss

FAST = ["--set", "retraining.budget=4ktok", "--set", "text.length=64", "--set", "sparsity.samples=8"]
FAST += ["--set", "retraining.validation_blocks=4", "--set", "retraining.loop.batch=8"]
QUICKLY = ["reconstruction.samples=8", "quantization.reconstruction.samples=8", "quantization.scales.samples=8"]
QUICKLY = [part for setting in QUICKLY for part in ("--set", setting)]


@pytest.fixture(scope="module")
def one_shot(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    arguments = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(out)]
    assert main([*arguments, "--set", f"text.source={prose}", "--set", "text.length=64"]) == 0
    return out


def test_output_is_a_whole_valid_folder(one_shot: Path, tiny_llama: Path) -> None:
    report = verify(one_shot)
    assert report.packed == 15
    assert report.sparse == 14
    present = {file.name for file in one_shot.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "manifest.json",
        "recipe.yaml",
        "README.md",
        "tokenizer.json",
    } <= present
    assert [entry.name for entry in one_shot.parent.iterdir()] == ["model"]
    card = (one_shot / "README.md").read_text()
    assert tiny_llama.name in card and str(tiny_llama) not in card  # what lies here is nobody's business
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["tags"] == ["halfweight", "2:4", "sparsity", "quantization"] and "base_model" not in header
    assert "sha256" in card
    assert yaml.safe_load((one_shot / "recipe.yaml").read_text())["sparsity"]["criterion"] == "sparsegpt"


def test_sizes_are_the_arithmetic_of_the_format(one_shot: Path) -> None:
    report = inspect(one_shot)
    blocks = [row for row in report.rows if row.format == "sparse24_int4"]
    assert blocks
    assert all(row.bits_per_weight == 3.25 and row.group == "64" for row in blocks)
    stored = sum(Checkpoint.open(one_shot).size_of(name) for name in Checkpoint.open(one_shot).names())
    assert report.stored_bytes == stored


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_opt"])
def test_ast_retrains_packs_and_keeps_two_of_four(
    family: str, prose: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(family)
    out = tmp_path / "model"
    arguments = [str(source), "--recipe", "ast-2of4-int4", "--out", str(out), "--set", f"text.source={prose}", *FAST]
    assert main([*arguments, *QUICKLY]) == 0
    checkpoint = Checkpoint.open(out)
    for name, scheme in packed_modules(checkpoint).items():
        fmt = make_format(scheme)
        tensors = {key: t for key, t in checkpoint.module(name).items() if key.startswith("weight")}
        if fmt.sparse:
            check_n_m(fmt.unpack(tensors))
    assert verify(out).sparse > 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == list(range(1, len(metrics) + 1))
    assert len(metrics) * 8 * 64 >= 4000
    assert not [entry for entry in tmp_path.iterdir() if entry != out]


REBUILT = ["samples=16", "passes=4", "batch=2", "learning_rate=2e-3"]
REBUILD = [part for setting in REBUILT for part in ("--set", f"quantization.reconstruction.{setting}")]


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_rounded_blocks_are_trained_to_give_what_they_gave(
    quantizer: str, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    arguments = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(out), "--set", f"text.source={prose}"]
    assert main([*arguments, "--set", f"quantization.quantizer={quantizer}", *FAST[2:6], *REBUILD]) == 0
    assert verify(out).sparse == 14
    figures = dict(re.findall(r"block[ _]error[ _](rounded|rebuilt)\W+([0-9.]+)", (out / "README.md").read_text()))
    assert 0 < float(figures["rebuilt"]) < 0.8 * float(figures["rounded"])


def test_scales_are_trained_last_and_what_is_packed_has_them(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "model", ["--set", f"text.source={prose}", "--set", "text.length=64"]
    settings = ["scales.samples=64", "scales.learning_rate=2e-2", "quantizer=rtn"]
    scales = [part for setting in settings for part in ("--set", f"quantization.{setting}")]
    assert main([str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(out), *text, *scales]) == 0
    assert verify(out).sparse == 14
    losses = dict(re.findall(r"validation[ _]loss[ _](rounded|packed)\W+([0-9.]+)", (out / "README.md").read_text()))
    assert float(losses["packed"]) < float(losses["rounded"])
    export_checkpoint(out, "dense", tmp_path / "dense", allow_lossy=True)
    blocks = load_text(str(prose), load_tokenizer(tiny_llama), length=64, seed=0, max_tokens=64 * (64 + 16)).blocks
    found = text_loss(load_model(tmp_path / "dense"), blocks[-16:])
    assert found == pytest.approx(float(losses["packed"]), abs=2e-3)


def test_gptq_sees_the_inputs_that_low_rank_branches_leave(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: list[int] = []

    def watched(model: Any, batches: Any, linears: Any, **settings: Any) -> Any:
        hooks.append(sum(len(module._forward_hooks) for module in linears.values()))
        return calibrate_blocks(model, batches, linears, **settings)

    monkeypatch.setattr(pipeline, "calibrate_blocks", watched)
    recipe = ["--recipe", "ast-slorb-2of4-int4", "--set", f"text.source={prose}"]
    recipe += ["--set", "quantization.quantizer=gptq"]
    assert main([str(tiny_llama), "--out", str(tmp_path / "model"), *recipe, *FAST, *QUICKLY]) == 0
    assert hooks == [14]


def test_gptq_rounds_what_was_not_trained_on_its_grid(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers left unpruned are none of the retraining's."""
    rounded: list[str] = []

    def watched(model: Any, batches: Any, linears: Any, **settings: Any) -> Any:
        rounded.extend(linears)
        return calibrate_blocks(model, batches, linears, **settings)

    monkeypatch.setattr(pipeline, "calibrate_blocks", watched)
    kept = "model.layers.0.mlp.up_proj"
    settings = ["quantization.reconstruction=null", "quantization.scales=null", "quantization.quantizer=gptq"]
    settings += ["retraining.loop.quantize_share=0.5", f"sparsity.keep_dense={kept}", f"text.source={prose}"]
    given = [part for setting in settings for part in ("--set", setting)]
    out = tmp_path / "model"
    assert main([str(tiny_llama), "--recipe", "ast-2of4-int4", "--out", str(out), *FAST, *QUICKLY[:2], *given]) == 0
    assert rounded == [kept]
    verify(out)


def test_rounded_blocks_train_under_the_mask_that_retraining_ended_with(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At this rate masks move far from those that the criterion chose."""
    chosen: dict[str, torch.Tensor] = {}
    retrained: dict[str, torch.Tensor] = {}

    def begun(sparse: Any, *more: Any) -> None:
        chosen.update({name: mask.clone() for name, mask in sparse.masks.items()})
        retrain(sparse, *more)

    def watched(sparse: Any, recipe: Any, text: Any, result: Any, report: Any) -> None:
        for name in sparse.masks:
            retrained[name] = weight_of(sparse.model.get_submodule(name)).detach() != 0
        moved = [float((retrained[name] != mask).float().mean()) for name, mask in chosen.items()]
        assert min(moved) > 0.01
        quantize(sparse, recipe, text, result, report)

    monkeypatch.setattr(pipeline, "retrain", begun)
    monkeypatch.setattr(pipeline, "quantize", watched)
    out = tmp_path / "model"
    recipe = ["--recipe", "ast-2of4-int4", "--set", f"text.source={prose}", *FAST, *QUICKLY]
    recipe += ["--set", "retraining.loop.learning_rate=1e-2", "--set", "retraining.ast.refresh_every=2"]
    assert main([str(tiny_llama), "--out", str(out), *recipe]) == 0
    checkpoint = Checkpoint.open(out)
    for name, mask in retrained.items():
        stored = make_format(packed_modules(checkpoint)[name]).unpack(checkpoint.module(name)) != 0
        assert not bool((stored & ~mask).any())
        assert float((stored & mask).sum() / mask.sum()) > 0.8  # the others round to zero


def test_slorb_branch_is_stored_beside_the_sparse_weight(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    recipe = ["--recipe", "ast-slorb-2of4-int4", "--set", f"text.source={prose}"]
    assert main([str(tiny_llama), "--out", str(out), *recipe, *FAST, *QUICKLY]) == 0
    tensors = Checkpoint.open(out).module("model.layers.0.mlp.up_proj")
    assert tensors["low_rank_b"].shape == (128, 4)
    assert tensors["low_rank_b"].dtype == torch.int8
    assert tensors["low_rank_b"].any()


def test_from_pretrained_computes_what_was_packed(one_shot: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compressor.models import load_tokenizer, quiet_transformers

    with quiet_transformers():
        packed = AutoModelForCausalLM.from_pretrained(one_shot)
        dense = AutoModelForCausalLM.from_pretrained(tiny_llama)
    checkpoint = Checkpoint.open(one_shot)
    for name, scheme in packed_modules(checkpoint).items():
        dense.get_submodule(name).weight.data = make_format(scheme).unpack(checkpoint.module(name))
    ids = load_tokenizer(one_shot)("the quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = dense(ids).logits.float(), packed(ids).logits.float()
    assert torch.allclose(found, expected, atol=2e-2)
    assert packed.lm_head.tensors["weight_packed"] is packed.model.embed_tokens.tensors["weight_packed"]


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail with one line after its progress; returns the line."""
    assert main(list(arguments)) == 1
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert all(json.loads(shown)["stage"] == "fetch" for shown in progress)
    assert line.startswith("compress: ")
    return line


class TestBadInput:
    """Said before any long work, in one line, with nothing left behind."""

    def run(self, capsys: pytest.CaptureFixture[str], model: Path | str, out: Path, *more: str) -> str:
        before = set(out.parent.iterdir())
        line = failing(capsys, str(model), "--out", str(out), "--recipe", "one-shot-2of4-int4", *more)
        assert set(out.parent.iterdir()) == before
        return line

    def test_unknown_recipe_key(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        line = self.run(capsys, tiny_llama, tmp_path / "o", "--set", "sparsity.critereon=wanda")
        assert "did you mean 'criterion'" in line

    def test_unknown_recipe(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        assert "did you mean 'ast-2of4-int4'" in self.run(
            capsys, tiny_llama, tmp_path / "o", "--recipe", "ast-2of4-in4"
        )

    def test_bad_budget(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        line = self.run(capsys, tiny_llama, tmp_path / "o", "--recipe", "ast-2of4-int4", "--budget", "soon")
        assert "10m" in line

    def test_no_tokenizer(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_llama, tmp_path / "model")
        for file in (tmp_path / "model").glob("tokenizer*"):
            file.unlink()
        assert "has no tokenizer" in self.run(capsys, tmp_path / "model", tmp_path / "o")

    @pytest.mark.parametrize(("hidden", "expected"), [(30, "multiple of 4"), (68, "multiple of group_size 64")])
    def test_widths_that_do_not_fit(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, hidden: int, expected: str
    ) -> None:
        from tests.tiny import make_tiny_model

        model = make_tiny_model(
            "llama",
            tmp_path / "model",
            hidden_size=hidden,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=hidden,
        )
        line = self.run(capsys, model, tmp_path / "o", "--set", "quantization.group_size=64")
        assert expected in line
        assert "q_proj" in line

    def test_unsupported_architecture(
        self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(tiny_llama, tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))
        assert "no supported causal language model" in self.run(capsys, tmp_path / "model", tmp_path / "o")

    def test_missing_text(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        for source in ("nowhere.txt", "data/nowhere.jsonl", str(tmp_path / "nowhere")):
            line = self.run(capsys, tiny_llama, tmp_path / "o", "--dry-run", "--set", f"text.source={source}")
            assert f"{source!r} is not there" in line

    @pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
    def test_blocks_longer_than_learned_positions(
        self, family: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        arguments = [str(request.getfixturevalue(f"tiny_{family}")), "--out", str(tmp_path / "o"), "--dry-run"]
        assert main([*arguments, "--set", "text.length=512"]) == 0
        assert main([*arguments, "--set", "text.length=513"]) == (0 if family == "llama" else 1)
        refused = "text.length 513 given, and the model has 512 positions" in capsys.readouterr().err
        assert refused is (family != "llama")

    def test_unknown_model(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "accepted: a model folder" in self.run(capsys, "nothing-here", tmp_path / "o")

    def test_existing_output(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        (tmp_path / "o").mkdir()
        assert "--force" in self.run(capsys, tiny_llama, tmp_path / "o")

    def test_compressed_input(self, capsys: pytest.CaptureFixture[str], one_shot: Path, tmp_path: Path) -> None:
        assert "compressed checkpoint already" in self.run(capsys, one_shot, tmp_path / "o")

    def test_too_little_disk_and_memory(
        self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = type("usage", (), {"free": 10})
        with monkeypatch.context() as patch:
            patch.setattr("compressor.preflight.shutil.disk_usage", lambda _path: usage)
            assert "GB free" in self.run(capsys, tiny_llama, tmp_path / "o")
        monkeypatch.setattr("compressor.preflight.available_memory", lambda: 10)
        assert "of memory are available" in self.run(capsys, tiny_llama, tmp_path / "o")

    def test_truncated_weights(self, capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_llama, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "truncated" in self.run(capsys, tmp_path / "model", tmp_path / "o")


@pytest.mark.parametrize(
    ("recipe", "settings", "why"),
    [
        ("ast-2of4-int4", ["retraining.loop.teacher_cache=top-k", "retraining.loop.teacher_top_k=301"], "300 tokens"),
        ("cast-2of4-bf16", ["retraining.cast.row_parts=3"], "has 64 inputs to divide"),
    ],
)
def test_what_retraining_refuses_is_refused_before(
    recipe: str, settings: list[str], why: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        check(tiny_llama, load_recipe(recipe, settings), tmp_path / "out")


def test_a_budget_of_time_holds_steps(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.preflight.training_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("compressor.preflight.tokens_within", lambda seconds, *_: 64.0 * seconds)

    def notes(budget: str) -> str:
        recipe = load_recipe("ast-2of4-bf16", [f"retraining.budget={budget}"])
        return " ".join(check(tiny_llama, recipe, tmp_path / "out").notes)

    with pytest.raises(ValueError, match=r"a step of 256 tokens takes about 4\.0 s\. Give 40s or more"):
        notes("1s")
    assert "about 2.5 steps of 256 tokens fit into the budget" in notes("10s")
    assert "fit into the budget" not in notes("1m") + notes("1tok")


def test_passes_over_a_hubs_data_set_are_said_to_read_it_all(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    def notes(source: str, budget: str) -> str:
        recipe = load_recipe("ast-2of4-bf16", [f"retraining.budget={budget}", f"text.source={source}"])
        return " ".join(check(tiny_llama, recipe, tmp_path / "out").notes)

    assert "2 epochs reads all of the data set 'some/stream'" in notes("some/stream", "2 epochs")
    assert "reads all" not in notes("some/stream", "1ktok") + notes(str(prose), "2 epochs")


def test_calibration_does_not_read_what_is_held_out(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    recipe = load_recipe("ast-2of4-int4", [f"text.source={prose}", "sparsity.criterion=wanda", "sparsity.samples=1000"])
    plan = check(tiny_llama, recipe, tmp_path / "out")
    text = pipeline.read_text(tiny_llama, recipe, Mock(), None)
    assert text is not None
    sparse = pipeline.sparsify(load_model(tiny_llama), recipe, plan, text, lambda *_: None)
    read = text.split(pipeline.held_out(recipe))[0]
    assert {layer.tokens for layer in sparse.stats.values()} == {read.numel()}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_teacher_that_teaches_nothing_is_let_go(
    weight: float, tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"text.source={prose}", f"retraining.loop.kl_weight={weight}", "sparsity.criterion=magnitude"]
    recipe = load_recipe("ast-2of4-bf16", [*settings, "retraining.budget=1ktok"])
    plan = check(tiny_llama, recipe, tmp_path / "out")
    text = pipeline.read_text(tiny_llama, recipe, Mock(), None)
    sparse = pipeline.sparsify(load_model(tiny_llama), recipe, plan, text, lambda *_: None)
    teachers: list[Any] = []
    whole = pipeline.load_model

    def load(folder: Path) -> Any:
        model = whole(folder)
        teachers.append(weakref.ref(model))
        return model

    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        gc.collect()
        assert (teachers[0]() is None) is (weight == 0.0)
        raise Stopped

    monkeypatch.setattr(pipeline, "load_model", load)
    monkeypatch.setattr(pipeline.retraining, "retrain", stop)
    with pytest.raises(Stopped):
        retrain(sparse, tiny_llama, recipe, text, pipeline.Result(tmp_path / "out", plan), lambda *_: None)


def test_dry_run_writes_nothing(
    capsys: pytest.CaptureFixture[str], tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    arguments = [str(tiny_llama), "--out", str(tmp_path / "o"), "--dry-run", "--set", f"text.source={prose}"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "sparse24_int4" in shown
    assert "rounding error" in shown
    assert not list(tmp_path.iterdir())


def test_inspect_verify_recipes_and_doctor_print(capsys: pytest.CaptureFixture[str], one_shot: Path) -> None:
    assert main(["inspect", str(one_shot)]) == 0
    assert "sparse24_int4" in capsys.readouterr().out
    assert main(["verify", str(one_shot)]) == 0
    assert "exactly 2:4" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert "ast-2of4-int4" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    assert "sparse24_int4" in capsys.readouterr().out


def test_the_environment_stands_in_for_the_flags_that_the_help_names(monkeypatch: pytest.MonkeyPatch) -> None:
    named = re.findall(r"HALFWEIGHT_(\w+)", parser().epilog or "")
    for name in named:
        monkeypatch.setenv(f"HALFWEIGHT_{name}", "given")
    options = vars(parser().parse_args(["model"]))
    assert {name for name, value in options.items() if value == "given"} == {name.lower() for name in named}
    assert "every flag" not in str(parser().epilog)


@pytest.mark.parametrize("given", [["--out", ""], []])
def test_an_empty_output_is_no_folder(
    given: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFWEIGHT_OUT", "")
    (tmp_path / "kept").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["any", "--recipe", "int4", "--force", *given])
    assert "--out is missing or empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "any", "--to", "dense", "--out", ""])
    assert "argument --out: is empty" in capsys.readouterr().err
    assert (tmp_path / "kept").exists()


def test_force_replaces_checkpoints_and_nothing_else(
    one_shot: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("")
    for out, why in ((tmp_path / "thesis", "holds other things"), (tiny_llama, "which is read")):
        for command in ([str(tiny_llama), "--recipe", "int4"], ["export", str(tiny_llama), "--to", "dense"]):
            assert main([*command, "--out", str(out), "--force"]) == 1
            assert why in capsys.readouterr().err
    shutil.copytree(one_shot, tmp_path / "out")
    assert main([str(tiny_llama), "--recipe", "int4", "--out", str(tmp_path / "out"), "--force"]) == 0
    assert "int4" in {row.format for row in inspect(tmp_path / "out").rows}


def test_a_budget_needs_a_retraining(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--print-config", "--recipe", "one-shot-2of4-int4"]
    assert main([*command, "--budget", "10m"]) == 1
    assert "'one-shot-2of4-int4' has none" in capsys.readouterr().err
    assert main([*command, "--budget", "10m", "--set", "retraining.method=ast"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["retraining"]["budget"] == "10m"
    monkeypatch.setenv("HALFWEIGHT_BUDGET", "10m")
    assert main(command) == 0
    assert yaml.safe_load(capsys.readouterr().out)["retraining"] is None


def test_the_recipe_is_printed_in_full_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--print-config", "--recipe", "one-shot-2of4-int4"]) == 0
    shown = capsys.readouterr().out
    assert {"task", "reconstruction", "retraining"} <= yaml.safe_load(shown).keys()
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe("one-shot-2of4-int4")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out")])
    assert "MODEL is missing" in capsys.readouterr().err


def test_only_the_first_of_several_processes_tells_what_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["compressor.retraining.distribution"], "join", lambda: (1, 2))
    monkeypatch.setattr(pipeline, "compress", lambda *_, report, **__: report("train", 0, 1, {}))
    assert main(["any", "--recipe", "int4", "--out", str(tmp_path / "out"), "--tensorboard", str(tmp_path / "tb")]) == 0
    shown = capsys.readouterr()
    assert not shown.out and not shown.err and not (tmp_path / "tb").exists()


def test_print_config_shows_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["any", "--print-config", "--set", "quantization.values=int8", "--budget", "2Mtok"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["quantization"]["values"] == "int8"
    assert shown["retraining"]["budget"] == "2Mtok"


def test_what_follows_retraining_may_be_killed_and_costs_no_second_retraining(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By time: done again it would run other steps, and what comes after would not go on from its work folder."""
    arguments = [str(tiny_llama), "--recipe", "ast-2of4-int4", "--budget", "2s", "--out", str(tmp_path / "out")]
    arguments += ["--set", f"text.source={prose}", "--set", "text.length=64", *QUICKLY]
    arguments += ["--set", "retraining.validation_blocks=4", "--set", "sparsity.samples=8"]
    whole = pipeline.save

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "save", killed)
    assert main(arguments) != 0
    first = capsys.readouterr().err
    assert '"stage": "retrain"' in first and '"stage": "scales"' in first
    monkeypatch.setattr(pipeline, "save", whole)
    assert main(arguments) == 0
    again = capsys.readouterr().err
    assert '"stage": "retrain"' not in again
    assert '"stage": "scales"' not in again, "its last snapshot is of its end"
    verify(tmp_path / "out")


@pytest.mark.parametrize(("budget", "tokens"), [("4ktok", 4096 + 256), ("1s", 8192 + 256), ("1tok", 1024 + 256)])
def test_a_hub_data_set_is_read_as_far_as_the_budget_goes(
    budget: str, tokens: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one without an end; by time so much as a rate of 2,000 tokens a second would see, four times."""

    class Hub:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> Any:
            return ({"text": f"{number} words and words"} for number in count())

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    monkeypatch.setattr(pipeline, "tokens_within", lambda seconds, *_: 2000.0 * seconds)
    monkeypatch.setattr(pipeline, "load_model", finished := Mock(side_effect=KeyboardInterrupt))
    read: list[int] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        text = load_text(*arguments, **settings)
        read.append(text.report.tokens)
        return text

    monkeypatch.setattr(pipeline, "load_text", watched)
    recipe = ["--recipe", "ast-2of4-bf16", "--set", "text.source=someone/some-text", *FAST, "--budget", budget]
    recipe += ["--set", "reconstruction.samples=16", "--set", "quantization.samples=16"]
    assert main([str(tiny_llama), "--out", str(tmp_path / "out"), *recipe]) == 130
    assert finished.called and read == [tokens]


def test_a_file_is_read_whole_for_a_retraining(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    """The blocks that are held out come last, and which ones are trained on is drawn from all."""
    recipe = load_recipe("ast-2of4-int4", [f"text.source={prose}", "retraining.budget=4ktok"])
    assert pipeline.tokens_needed(recipe, check(tiny_llama, recipe, tmp_path / "out")) is None


def test_a_text_too_short_to_hold_any_out_is_refused_before_calibration(
    tiny_llama: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_llama), "--recipe", "ast-2of4-int4", "--one-shot", "--out", str(tmp_path / "out")]
    short = tmp_path / "short.txt"
    short.write_text(prose.read_text()[:500])
    arguments += ["--set", f"text.source={short}", "--set", "text.length=64", "--set", "quantization.scales.samples=4"]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "blocks asked for validation" in told and '"stage": "prune"' not in told


@pytest.mark.parametrize(("values", "key"), [("bfloat16", "reconstruction"), ("fp8", "scales")])
def test_training_on_grids_needs_grids(
    tiny_llama: Path, tmp_path: Path, values: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_llama), "--recipe", "ast-2of4-int4", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--set", f"quantization.values={values}"]) == 1
    assert f"quantization.{key}=null" in capsys.readouterr().err
