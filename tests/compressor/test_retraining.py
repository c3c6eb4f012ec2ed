"""`retrain` end to end on tiny models: what it leaves, what it logs, how it stops and how it goes on."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.calibration import weight_of
from compressor.masks import MaskShape, check_n_m
from compressor.retraining import (
    AstSettings,
    Budget,
    DivergedError,
    LoopSettings,
    LowRankSettings,
    TextDistillation,
    retrain,
    text_loss,
)
from compressor.retraining.loop import training_device
from compressor.retraining.snapshots import Snapshots
from tests.retraining import FP32, gpt2, linears_of, llama, masks_of, opt, run, text


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: a second thread costs more than it gives, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("build", [llama, gpt2, opt])
def test_retraining_wins_back_what_pruning_lost_and_leaves_plain_sparse_weights(build: Any) -> None:
    model = build().to(torch.bfloat16)
    kl: list[float] = []
    report = run(
        model,
        validation=text(8),
        budget=Budget(tokens=60 * 64),
        progress=lambda step, total, metrics: kl.append(metrics["kl"]),
    )
    for module in linears_of(model).values():
        check_n_m(weight_of(module))
        assert float((weight_of(module) != 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert "weight_mask" not in dict(module.named_buffers()) and not module._forward_hooks
    assert all(parameter.dtype is torch.bfloat16 and parameter.requires_grad for parameter in model.parameters())
    assert report.steps == 60 and report.tokens == 3840
    assert report.validation_loss_before is not None and report.validation_loss is not None
    assert kl[-1] < 0.7 * kl[0]


def test_kl_falls_and_every_step_is_recorded(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    run(llama(), work_dir=tmp_path, progress=lambda step, total, metrics: seen.append((step, total)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31)) and seen == [(step, 30) for step in range(1, 31)]
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    rates = [line["learning_rate"] for line in lines]
    assert 0 < rates[0] < rates[1] == max(rates) and 0 < rates[-1] < 0.02 * rates[1]
    assert 0 < lines[0]["mask_decay"] < lines[1]["mask_decay"]
    assert lines[-1]["mask_decay"] == AstSettings().mask_decay
    refreshes = {line["step"] - 1: line for line in lines if "flip_rate" in line}
    assert list(refreshes) == [10, 20]
    assert refreshes[20]["mean_kept"] > refreshes[20]["mean_masked"]
    assert lines[-1]["tokens"] == 30 * 64


def test_masks_move_only_when_they_are_refreshed() -> None:
    flips: list[float] = []
    loop = LoopSettings(batch=4, learning_rate=3e-2, precision="fp32")
    run(llama(), loop=loop, progress=lambda step, total, metrics: flips.append(metrics.get("flip_rate", 0.0)))
    assert max(flips) > 0
    kept = llama()
    before = masks_of(linears_of(kept))
    run(kept, loop=loop, settings=AstSettings(refresh_every=0))
    assert all(torch.equal(weight_of(module) != 0, before[name]) for name, module in linears_of(kept).items())


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "50%", "70%"])
def test_other_masks_are_refreshed_and_kept(pattern: str) -> None:
    shape, model = MaskShape.parse(pattern), llama()
    linears = linears_of(model)
    masks = {name: shape.mask(weight_of(module).detach().abs()) for name, module in linears.items()}
    flips: list[float] = []
    loop = LoopSettings(batch=4, learning_rate=3e-2, kl_weight=0.0, precision="fp32")
    retrain(
        model, TextDistillation(text(), None, kl_weight=0.0), linears, masks, Budget(tokens=30 * 64), loop=loop,
        settings=AstSettings(), shapes=dict.fromkeys(linears, shape),
        progress=lambda step, total, metrics: flips.append(metrics.get("flip_rate", 0.0)),
    )  # fmt: skip
    assert max(flips) > 0
    for module in linears.values():
        shape.check(weight_of(module) != 0)
    with pytest.raises(ValueError, match="keep exactly 2 of 4"):
        run(llama(), masks=masks)


def test_micro_batches_do_not_change_the_result() -> None:
    whole, parts = llama(), llama()
    run(whole, budget=Budget(tokens=5 * 64))
    run(
        parts,
        budget=Budget(tokens=5 * 64),
        loop=replace(FP32, micro_batch=2),
    )
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_trains() -> None:
    blocks, everything = llama(), llama()
    before = {name: value.clone() for name, value in blocks.named_parameters()}
    run(blocks)
    run(everything, loop=LoopSettings(batch=4, learning_rate=3e-3, train="all", precision="fp32"))
    table = "model.embed_tokens.weight"
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(dict(blocks.named_parameters())[table], before[table])
    assert not torch.equal(dict(blocks.named_parameters())[norm], before[norm])
    assert not torch.equal(dict(everything.named_parameters())[table], before[table])


@pytest.mark.parametrize("projection", [False, True])
def test_low_rank_branches_are_trained_and_handed_over(projection: bool) -> None:
    model = llama()
    settings = AstSettings(low_rank=LowRankSettings(segment=16, projection=projection))
    report = run(model, settings=settings, validation=text(4))
    assert report.low_rank.keys() == linears_of(model).keys()
    branch = report.low_rank["model.layers.0.mlp.down_proj"]
    assert branch.s.shape == (32, 3) and (branch.x is not None) == projection
    for name, module in linears_of(model).items():
        report.low_rank[name].attach(module)
    assert text_loss(model, text(4)) == pytest.approx(report.validation_loss, abs=1e-4)


@pytest.mark.parametrize("segment", [16, 32])
def test_a_projection_may_start_from_the_pruned_part(segment: int) -> None:
    """From the first step on the branch makes up for more of what was pruned than segment means do."""
    first: dict[str, float] = {}
    for init in ("mean", "svd"):
        model, seen = llama(), []
        linears = {name: module for name, module in linears_of(model).items() if "down_proj" not in name}
        settings = AstSettings(low_rank=LowRankSettings(segment=segment, init=init, projection=True))
        retrain(
            model, TextDistillation(text(), llama()), linears, masks_of(linears), Budget(tokens=64), loop=FP32,
            settings=settings, progress=lambda step, total, metrics, seen=seen: seen.append(metrics["kl"]),
        )  # fmt: skip
        first[init] = seen[0]
    assert first["svd"] < first["mean"]
    with pytest.raises(ValueError, match=r"low_rank\.projection"):
        LowRankSettings(init="svd")


def test_the_quantised_tail_trains_what_is_packed() -> None:
    model = llama()
    calls: list[str] = []

    def snap(name: str, weight: torch.Tensor) -> Any:
        calls.append(name)
        scale = weight.abs().amax() / 7
        return lambda values, rows: (values / scale).round().clamp(-7, 7) * scale

    run(model, loop=LoopSettings(batch=4, learning_rate=3e-3, quantize_share=0.3, precision="fp32"), snap=snap)
    assert calls == list(linears_of(model))
    for module in linears_of(model).values():
        assert len(weight_of(module).unique()) <= 15


def test_bf16_runs_and_keeps_float_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    report = run(model, loop=LoopSettings(batch=4, learning_rate=3e-3, precision="bf16"), validation=text(4))
    assert report.precision == "bfloat16"
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert report.validation_loss < report.validation_loss_before + 0.05  # type: ignore[operator]


def test_cross_entropy_alone_needs_no_teacher() -> None:
    model = llama()
    linears = linears_of(model)
    loop = LoopSettings(batch=4, learning_rate=3e-3, kl_weight=0.0, precision="fp32")
    report = retrain(
        model, TextDistillation(text(), None, kl_weight=0.0), linears, masks_of(linears), Budget(tokens=1920),
        loop=loop, settings=AstSettings(), validation=text(8),
    )  # fmt: skip
    assert report.validation_loss < report.validation_loss_before - 0.5  # type: ignore[operator]


def test_the_hidden_state_loss_brings_the_blocks_nearer() -> None:
    found: dict[float, list[dict[str, float]]] = {1.0: [], 0.5: []}
    for weight, metrics in found.items():
        model, teacher = llama(), llama()
        linears = linears_of(model)
        objective = TextDistillation(text(), teacher, kl_weight=weight, distill="hidden")
        retrain(
            model, objective, linears, masks_of(linears), Budget(tokens=60 * 64), loop=FP32, settings=AstSettings(),
            progress=lambda _step, _total, step_metrics, into=metrics: into.append(dict(step_metrics)),  # type: ignore[misc]
        )  # fmt: skip
    far = [metrics["hidden"] for metrics in found[1.0]]
    assert sum(far[-10:]) < 0.7 * sum(far[:10])
    assert found[0.5][0]["total"] == pytest.approx(0.5 * found[0.5][0]["hidden"] + 0.5 * found[0.5][0]["ce"])
    teacher = llama()
    with pytest.raises(ValueError, match="accepted are kl, hidden"):
        TextDistillation(text(), teacher, distill="attention")
    with pytest.raises(ValueError, match="no teacher cache holds"):
        TextDistillation(text(), teacher, distill="hidden", cache="top-k")


def test_a_time_budget_ends_near_its_time() -> None:
    report = run(llama(), budget=Budget(seconds=2.0))
    assert 0.5 < report.seconds < 4.0 and report.steps > 4


def test_a_non_finite_loss_stops_before_the_weights_are_touched() -> None:
    model, teacher = llama(), llama()
    teacher.model.embed_tokens.weight.data[13] = float("nan")
    weights: list[torch.Tensor] = []

    def watch(step: int, total: int, metrics: Any) -> None:
        weights.append(model.model.layers[0].mlp.up_proj.weight.detach().clone())

    tokens = torch.full((12, 16), 2)
    tokens[-1] = 13
    with pytest.raises(DivergedError, match=r"at step \d, examples \[.*11.*\]: stopped"):
        run(model, teacher, tokens=tokens, progress=watch)
    assert not weights or torch.equal(model.model.layers[0].mlp.up_proj.weight, weights[-1])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "sgd"}, "accepted are ast, cast"),
        ({"tokens": torch.zeros(0, 16, dtype=torch.int64)}, "at least 2 tokens"),
        ({"tokens": torch.zeros(4, 1, dtype=torch.int64)}, "at least 2 tokens"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(llama(), **change)
    model = llama()
    with pytest.raises(ValueError, match="without a dense teacher"):
        TextDistillation(text(), None)
    with pytest.raises(ValueError, match="each sparse linear needs one"):
        retrain(
            model, TextDistillation(text(), model), linears_of(model), {}, Budget(tokens=64), loop=FP32,
            settings=AstSettings(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        lambda: LoopSettings(precision="fp8"), lambda: LoopSettings(train="head"), lambda: LoopSettings(kl_weight=2),
        lambda: LoopSettings(batch=4, micro_batch=3), lambda: LoopSettings(warmup=1.0), lambda: AstSettings(form="x"),
        lambda: LoopSettings(micro_batch=0), lambda: LoopSettings(batch=4, micro_batch=-2),
        lambda: LoopSettings(learning_rate=-1), lambda: LoopSettings(beta2=1.0), lambda: LoopSettings(clip=-1),
        lambda: AstSettings(mask_decay_ramp=0.0), lambda: LowRankSettings(init="best"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"given; accepted|must|shares"):
        settings()


KILL_AND_RESUME = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
import test_retraining as t
from compressor.retraining import loop as training

torch.set_num_threads(1)
training._CHECKPOINT_SHARE = 0.0  # after every step, however long writing takes

def child(work, pause, pipe):
    if (pid := os.fork()) != 0:
        return pid
    def tell(step, total, metrics):
        os.write(pipe, (str(step) + "\\n").encode())
        time.sleep(pause)
    model = t.llama()
    loop = t.LoopSettings(batch=4, learning_rate=3e-2, precision="bf16", checkpoint_minutes=0.0)
    t.run(model, loop=loop, work_dir=work, progress=tell)
    torch.save(model.state_dict(), work / "result.pt")
    os._exit(0)

whole, killed = Path(sys.argv[1]), Path(sys.argv[2])
ignored = os.open(os.devnull, os.O_WRONLY)
assert os.waitpid(child(whole, 0.0, ignored), 0)[1] == 0
reading, writing = os.pipe()
pid = child(killed, 0.05, writing)
with open(reading) as steps:
    while int(steps.readline()) < 17:
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
assert os.waitpid(child(killed, 0.0, sys.stdout.fileno()), 0)[1] == 0
"""


def test_a_killed_run_goes_on_and_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    script = KILL_AND_RESUME.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", script, str(whole), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert 15 <= int(done.stdout.split()[0]) <= 20, "it started over instead of going on"
    results = [torch.load(folder / "result.pt") for folder in (whole, killed)]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))
    assert len(list((killed / "snapshots").glob("step-*"))) == 2


def test_another_runs_snapshot_is_refused(tmp_path: Path) -> None:
    saving = LoopSettings(batch=4, learning_rate=3e-3, precision="fp32", checkpoint_minutes=0.0)
    run(llama(), loop=saving, work_dir=tmp_path)
    with pytest.raises(ValueError, match="another model, text or recipe"):
        run(llama(), loop=saving, work_dir=tmp_path, settings=AstSettings(mask_decay=1e-3))
    with pytest.raises(ValueError, match="another model, text or recipe"):
        run(llama(), loop=saving, work_dir=tmp_path, tokens=text() + 0 * 1 - 0 + (text() == 5).long())


def test_an_interrupted_quantised_share_goes_on_with_the_same_grids(tmp_path: Path) -> None:
    loop = LoopSettings(batch=4, learning_rate=3e-2, quantize_share=0.5, precision="fp32", checkpoint_minutes=0.0)

    def snap(_name: str, weight: torch.Tensor) -> Any:
        assert weight.device == training_device()
        scale = weight.abs().amax() / 7
        return lambda values, rows: (values / scale).round().clamp(-7, 7) * scale

    def interrupt(step: int, total: int, metrics: Any) -> None:
        if step == 21:
            raise KeyboardInterrupt

    whole, interrupted = llama(), llama()
    run(whole, loop=loop, snap=snap)
    with pytest.raises(KeyboardInterrupt):
        run(llama(), loop=loop, snap=snap, work_dir=tmp_path, progress=interrupt)
    run(interrupted, loop=loop, snap=snap, work_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), interrupted.parameters(), strict=True))


def test_weights_to_quantise_come_back_to_where_they_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.retraining.snapshots.load_file", lambda _file, device: {"a": device})
    assert Snapshots(tmp_path, "run").load_weights(torch.device("cuda", 1)) == {"a": "cuda:1"}


def test_a_half_written_snapshot_is_ignored(tmp_path: Path) -> None:
    saving = LoopSettings(batch=4, learning_rate=3e-3, precision="fp32", checkpoint_minutes=0.0)
    first = llama()
    run(first, loop=saving, work_dir=tmp_path)
    (tmp_path / "snapshots" / "step-00000099").mkdir()
    (tmp_path / "snapshots" / ".step-00000098.part").mkdir()
    (tmp_path / "snapshots" / ".step-00000097.old").mkdir()
    again = llama()
    run(again, loop=saving, work_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_snapshot_whose_removal_was_killed_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path, "run")
    for step in (1, 2):
        snapshots.save(step, {"a": torch.full((2,), step)}, {})

    def killed(folder: Path, **_: Any) -> None:
        if folder.is_dir():
            (folder / "state.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            snapshots.drop_newest()
    found = torch.zeros(2, dtype=torch.int64)
    snapshots.restore({"a": found})
    assert found.tolist() == [1, 1]
    snapshots.save(2, {"a": torch.full((2,), 2)}, {})
    assert [step.name for step in snapshots.steps()] == ["step-00000001", "step-00000002"]


def test_a_hidden_state_term_beside_kl_brings_the_blocks_nearer() -> None:
    """loop.hidden_weight: the same seed and steps end nearer to the teacher's blocks than KL alone."""
    far = {}
    for weight in (0.0, 3.0):
        model, teacher = llama(), llama()
        linears = linears_of(model)
        objective = TextDistillation(text(), teacher, kl_weight=1.0, hidden_weight=weight)
        retrain(model, objective, linears, masks_of(linears), Budget(tokens=60 * 64), loop=FP32, settings=AstSettings())
        ids = text()[:4]
        with torch.no_grad():
            states = [net.model(input_ids=ids, output_hidden_states=True).hidden_states[1:] for net in (model, teacher)]
        far[weight] = sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(*states, strict=True))
    assert far[3.0] < far[0.0]
    with pytest.raises(ValueError, match="hidden_weight -1"):
        TextDistillation(text(), llama(), hidden_weight=-1.0)
    with pytest.raises(ValueError, match="no teacher cache holds"):
        TextDistillation(text(), llama(), hidden_weight=1.0, cache="hidden")
