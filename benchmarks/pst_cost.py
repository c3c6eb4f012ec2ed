"""What a step of PST costs in memory and time beside movement pruning and dense fine-tuning of the same encoder.

    python -m benchmarks.pst_cost METHOD

is the process whose peak memory is measured: BERT-base's geometry with random weights, batches of 32 sentences of 64
tokens, two steps. Times of the methods alternate in one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

METHODS = ("pst", "movement", "dense")
_STEPS, _ROUNDS = 2, 3
_BATCH, _LENGTH = 32, 64


def memory_row() -> dict[str, Any]:
    """Peak memory above the imports by method, and what trains."""
    memory = {method: _peak_bytes(method) for method in METHODS}
    return {
        "arm": "memory",
        "kind": "cost",
        "peak_bytes": memory,
        "figures": {
            "peak_memory_vs_movement": memory["pst"] / memory["movement"],
            "peak_memory_vs_dense": memory["pst"] / memory["dense"],
            "trainable_share_bert_base_r4": trainable_share(4),
            "trainable_share_bert_base_r8": trainable_share(8),
        },
    }


def time_row() -> dict[str, Any]:
    """Seconds of a step by method."""
    runs = {method: _run(method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(-1, _ROUNDS):
        for method, run in runs.items():
            begun = time.perf_counter()
            run._one_step(time.monotonic())
            if number >= 0:
                seconds[method].append(time.perf_counter() - begun)
    medians = {method: median(found) for method, found in seconds.items()}
    return {
        "arm": "step time",
        "kind": "cost",
        "seconds": seconds,
        "figures": {"step_time_vs_movement": medians["pst"] / medians["movement"]},
    }


def trainable_share(rank: int) -> float:
    """What trains of BERT-base under PST, the head included, over all its parameters."""
    from benchmarks.pst_arms import PstArm, settings_of
    from compressor.models import block_linears
    from compressor.retraining.pst_layer import scored_parts

    model = _bert("meta")
    terms = replace(settings_of(PstArm("pst", "2:4", 0))[2], weight_rank=rank, score_rank=rank).terms
    linears, generator = block_linears(model), torch.Generator()
    parts = [part for name, module in linears.items() for part in scored_parts(name, module, terms, generator)]
    trained = sum(factor.master.numel() for part in parts for factor in part.factors.values())
    trained += sum(parameter.numel() for parameter in model.classifier.parameters())
    return trained / sum(parameter.numel() for parameter in model.parameters())


def _bert(device: str) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    with torch.device(device):
        return BertForSequenceClassification(BertConfig()).to(torch.bfloat16)


def _run(method: str) -> Any:
    """A run of the loop, ready to step."""
    from benchmarks.pst_arms import PstArm, settings_of
    from compressor.models import block_linears
    from compressor.retraining import Budget
    from compressor.retraining.task_objectives import LabelledSentences
    from compressor.retraining.task_training import TaskRun, start
    from compressor.tasks.encoding import Labelled

    name, loop, settings = settings_of(PstArm(method, "2:4", 0))
    model = _bert("cpu")
    head = frozenset(f"classifier.{part}" for part in ("weight", "bias"))
    ids = torch.randint(1000, 20_000, (4 * _BATCH, _LENGTH)).tolist()
    encoded = Labelled(ids, None, torch.randint(0, 2, (4 * _BATCH,)), _LENGTH, 0, regression=False)
    budget = Budget(tokens=1000 * _BATCH * _LENGTH)
    what = TaskRun(name, settings=settings, head=head)
    run, _ = start(
        model, LabelledSentences(encoded), block_linears(model), budget, what, loop=replace(loop, batch=_BATCH)
    )
    return run


def _peak_bytes(method: str) -> int:
    done = subprocess.run([sys.executable, "-m", __spec__.name, method], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"memory of {method} could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def main(method: str) -> int:
    """Prints the bytes above the imports that two steps take at most."""
    from benchmarks.measure import status_bytes

    torch.randn(64, 64) @ torch.randn(64, 64)
    import transformers.models.bert  # noqa: F401

    before = status_bytes("VmRSS")
    run = _run(method)
    for _ in range(_STEPS):
        run._one_step(time.monotonic())
    print(json.dumps(status_bytes("VmHWM") - before))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
