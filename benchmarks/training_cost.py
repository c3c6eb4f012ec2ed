"""What a retraining step costs: against distilling the same dense model, and our loop against Hugging Face's Trainer.

    python -m benchmarks.training_cost parts
    python -m benchmarks.training_cost memory|trainer|loop ...

The first says what the kernels of training give; the others are the processes that measure what needs one of its own.
Steps of the two kinds alternate in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

_GROUP = 10  # steps that are timed as one: a mask refresh falls into each group
_GROUPS = 3
_BATCH = 2
_LENGTH = 256
_STEPS = 6
# What a run holds, without the holes in the heap, which differ by 100 MB from one order of allocations to another.
_NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def cost_rows(folder: Path, windows: Tensor) -> list[dict[str, Any]]:
    """The figures as rows of the record."""
    tokens = windows.flatten()[: 64 * _LENGTH].view(-1, _LENGTH)
    ours, dense = step_seconds(folder, tokens)
    memory = {kind: _child("memory", kind, str(folder), **_NO_HOLES)["peak_bytes"] for kind in ("dense", "ast")}
    speeds: dict[str, list[float]] = {"trainer": [], "loop": []}
    for _ in range(_GROUPS):
        for kind, found in speeds.items():
            found.append(_child(kind, str(folder))["tokens_per_second"])
    figures = {
        "step_time_vs_dense_kd": median(ours) / median(dense),
        "peak_memory_above_dense_kd_bytes": memory["ast"] - memory["dense"],
        "tokens_per_s_vs_hf_trainer": median(speeds["loop"]) / median(speeds["trainer"]),
    }
    seconds = {"ours": ours, "dense": dense}
    parts = step_parts()
    return [
        {
            "arm": "cost",
            "kind": "cost",
            "figures": figures,
            "seconds": seconds,
            "memory": memory,
            "parts": parts,
            **speeds,
        }
    ]


def step_parts() -> dict[str, dict[str, float]]:
    """Of what a step does beside matrix products: milliseconds by our kernels and by torch's operators, in turns.

    Adam with AST's decay and the mask's refresh over 10 layers of SmolLM2's size, the loss over 64 tokens of its
    vocabulary; bytes are those that must move at least once, their rate is set against the rate of reading alone.
    """
    from benchmarks.kernels import read_rate
    from compressor import kernels
    from compressor.masks import n_m_mask
    from compressor.retraining.ast import Ast, AstSettings
    from compressor.retraining.distillation import _loss_and_slope
    from compressor.retraining.optimizers import AdamSettings, adam_steps

    torch.manual_seed(0)
    linears = {str(i): nn.Linear(576, 1536, bias=False).to(torch.bfloat16) for i in range(40)}
    masks = {name: n_m_mask(module.weight.detach().float().abs()) for name, module in linears.items()}
    method = Ast(linears, masks, {}, AstSettings(), AdamSettings(), torch.bfloat16)
    weights = sum(module.weight.numel() for module in linears.values())
    student, teacher = torch.randn(2, 64, 49152).to(torch.bfloat16)
    labels = torch.randint(0, 49152, (64,))

    def adam() -> None:
        for entry in method.trained:
            entry.gradient = entry.visible
        adam_steps(method.trained, method.adam, step=1, rate=1e-9, decay=1e-4)

    parts: dict[str, tuple[Callable[[], object], float]] = {
        # gradient and mask in, weight and moments in and out, what the forward sees out
        "adam": (adam, weights * (2 + 1 + 6 * 4 + 2)),
        "refresh": (lambda: method.before_step(method.settings.refresh_every), weights * (4 + 2 + 2)),
        "loss": (lambda: _loss_and_slope(student, teacher, labels, 0.5, 1.0, 1.0), 3 * student.nbytes),
    }
    rate, found, there = read_rate(1 << 28), {}, kernels.available
    try:
        for name, (run, moved) in parts.items():
            times: dict[str, list[float]] = {"kernel": [], "torch": []}
            for turn in range(2 * (1 + _STEPS)):
                kernels.available = there if turn % 2 == 0 else lambda: False
                start = time.perf_counter()
                run()
                times["kernel" if turn % 2 == 0 else "torch"].append(time.perf_counter() - start)
            ours, theirs = (median(times[kind][1:]) for kind in ("kernel", "torch"))
            found[name] = {
                "ms": 1e3 * ours,
                "torch_ms": 1e3 * theirs,
                "torch_over_ours": theirs / ours,
                "bytes_per_s": moved / ours,
                "share_of_read_rate": moved / ours / rate,
            }
    finally:
        kernels.available = there
    return found


def step_seconds(folder: Path, tokens: Tensor) -> tuple[list[float], list[float]]:
    """Seconds of a step, by group: AST with masks, decay and refresh, and dense distillation of the same weights."""
    runs = {kind: _run(folder, tokens, sparse=kind == "ours") for kind in ("ours", "dense")}
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    for group in range(-1, _GROUPS):
        for kind, run in runs.items():
            start = time.perf_counter()
            for _ in range(_GROUP if group >= 0 else 2):
                run._one_step(time.monotonic())
            if group >= 0:
                found[kind].append((time.perf_counter() - start) / _GROUP)
    return found["ours"], found["dense"]


def _run(folder: Path, tokens: Tensor, *, sparse: bool) -> Any:
    """A run of the loop, ready to step: the same weights train, as sparse ones or as dense ones."""
    from compressor.calibration import weight_of
    from compressor.masks import n_m_mask
    from compressor.models import block_linears, load_model
    from compressor.precision import compute_dtype
    from compressor.retraining import Budget, LoopSettings, TextDistillation
    from compressor.retraining.ast import Ast, AstSettings
    from compressor.retraining.loop import Run
    from compressor.retraining.optimizers import AdamSettings
    from compressor.retraining.schedules import Plan

    model, teacher = load_model(folder), load_model(folder)
    loop = LoopSettings(batch=_BATCH, kl_weight=1.0)
    dtype = compute_dtype("auto", torch.device("cpu"))
    linears = block_linears(model)
    weights = {id(module.weight) for module in linears.values()}
    norms = {name: p for name, p in model.named_parameters() if p.dim() == 1 and id(p) not in weights}
    model.eval().requires_grad_(False).to(dtype)
    masks = {name: n_m_mask(weight_of(module).detach().float().abs()) for name, module in linears.items()}
    plain: dict[str, nn.Parameter] = {f"{name}.weight": module.weight for name, module in linears.items()}  # type: ignore[misc]
    method = Ast(
        linears if sparse else {},
        masks if sparse else {},
        norms if sparse else norms | plain,
        AstSettings(),
        AdamSettings(),
        dtype,
    )
    for entry in method.trained:
        entry.parameter.requires_grad_(True)
    objective = TextDistillation(tokens, teacher)
    objective.prepare(model, dtype)
    model.set_attn_implementation("eager")
    plan = Plan(Budget(tokens=1000 * _BATCH * _LENGTH), _BATCH * _LENGTH)
    return Run(model, objective, method, loop, plan)


def _child(*arguments: str, **variables: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training_cost", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    if done.returncode:
        raise ValueError(f"{' '.join(arguments[:2])} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _memory(kind: str, folder: str) -> dict[str, float]:
    from benchmarks.measure import status_bytes

    run = _run(Path(folder), torch.arange(8 * _LENGTH).view(-1, _LENGTH), sparse=kind == "ast")
    for _ in range(2):
        run._one_step(time.monotonic())
    return {"peak_bytes": status_bytes("VmHWM")}


def _loop(folder: str) -> dict[str, float]:
    """Plain cross-entropy on every weight, no teacher, no masks."""
    from compressor.models import load_model
    from compressor.precision import compute_dtype
    from compressor.retraining import Budget, LoopSettings, TextDistillation
    from compressor.retraining.ast import Ast, AstSettings
    from compressor.retraining.loop import Run
    from compressor.retraining.optimizers import AdamSettings
    from compressor.retraining.schedules import Plan

    model = load_model(Path(folder))
    dtype = compute_dtype("auto", torch.device("cpu"))
    model.eval().to(dtype)
    method = Ast({}, {}, dict(model.named_parameters()), AstSettings(), AdamSettings(), dtype)
    objective = TextDistillation(torch.arange(64 * _LENGTH).view(-1, _LENGTH), None, kl_weight=0.0)
    objective.prepare(model, dtype)
    model.set_attn_implementation("eager")
    plan = Plan(Budget(tokens=1000 * _BATCH * _LENGTH), _BATCH * _LENGTH)
    run = Run(model, objective, method, LoopSettings(batch=_BATCH, kl_weight=0.0), plan)
    seconds = []
    for _ in range(2 + _STEPS):
        start = time.perf_counter()
        run._one_step(time.monotonic())
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": _BATCH * _LENGTH / median(seconds[2:])}


def _trainer(folder: str) -> dict[str, float]:
    """The same by Hugging Face's Trainer in bf16 autocast, with its fused AdamW."""
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    from compressor.models import load_model
    from compressor.precision import compute_dtype

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
            times.append(time.perf_counter())

    model = load_model(Path(folder), torch.float32)
    blocks = torch.arange(64 * _LENGTH).view(-1, _LENGTH)
    rows = [{"input_ids": row, "labels": row} for row in blocks]
    bf16 = compute_dtype("auto", torch.device("cpu")) is torch.bfloat16
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=_BATCH, max_steps=3 + _STEPS, use_cpu=True, bf16=bf16,
            optim="adamw_torch_fused", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    seconds = [after - before for before, after in pairwise(times[2:])]
    return {"tokens_per_second": _BATCH * _LENGTH / median(seconds)}


if __name__ == "__main__":
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "parts": step_parts,
        "memory": _memory,
        "loop": _loop,
        "trainer": _trainer,
    }
    print(json.dumps(kinds[sys.argv[1]](*sys.argv[2:])))
