"""The stage that fine-tunes for a task while it prunes, and says how well the model that will be packed does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.calibration import weight_of
from compressor.masks import TWO_OF_FOUR
from compressor.models import block_linears, load_classifier, load_model, load_tokenizer
from compressor.preflight import Plan
from compressor.recipe import Recipe, TaskSection, parse_budget
from compressor.retraining.distribution import join
from compressor.retraining.pst_layer import part_names
from compressor.retraining.rows_and_heads import Structures
from compressor.retraining.task_objectives import objective_for
from compressor.retraining.task_training import FinetuningReport, TaskRun, finetune
from compressor.sparse_model import Report, Result, SparseModel, watched, work_folder
from compressor.tasks import Task
from compressor.tasks.encoding import encode
from compressor.tasks.evaluation import evaluate


def fine_tune(result: Result, recipe: Recipe, report: Report) -> SparseModel:
    """Fine-tunes the planned model for the planned task, rounds it to what is packed, and tests that."""
    plan, settings, section = result.plan, recipe.retraining, recipe.task
    task = plan.task
    assert settings is not None and section is not None and task is not None
    tokenizer = load_tokenizer(plan.folder)
    model, head = _load(plan, task)
    linears = {name: module for name, module in block_linears(model).items() if name in plan.schemes}
    sparse = SparseModel(model, {}, {})
    outcome = finetune(
        model,
        objective_for(encode(tokenizer, task, task.train, section.length), section.label_smoothing),
        _pruned(linears, plan, recipe),
        parse_budget(settings.budget),
        _task_run(linears, model, plan, recipe, head),
        loop=settings.loop,
        work_dir=work_folder(result.out),
        snap=lambda name, weight: sparse.snap_to_grid(name, weight, plan.schemes[name]),
        progress=lambda step, total, metrics: report("fine-tune", step, total, watched(metrics)),
    )
    _round(sparse, linears, plan)
    result.figures |= _training_figures(outcome, task)
    result.text = _examples_used(task)
    if not join()[0]:
        result.figures |= _tested(model, tokenizer, task, section, report)
    return sparse


def _load(plan: Plan, task: Task) -> tuple[Any, frozenset[str]]:
    """The model and the names of the parameters that the task brings: the head of a classifier."""
    if task.head_labels is None:
        return load_model(plan.folder), frozenset()
    return load_classifier(plan.folder, task.head_labels)


def _pruned(linears: Mapping[str, nn.Module], plan: Plan, recipe: Recipe) -> dict[str, nn.Module]:
    """The linears that a mask falls on; heads and neurons span all of them."""
    assert recipe.retraining is not None
    whole = recipe.retraining.heads_and_neurons is not None or recipe.retraining.method == "dense"
    return {name: module for name, module in linears.items() if whole or name in plan.shapes}


def _task_run(
    linears: Mapping[str, nn.Module], model: Any, plan: Plan, recipe: Recipe, head: frozenset[str]
) -> TaskRun:
    settings = recipe.retraining
    assert settings is not None
    shape = next(iter(plan.shapes.values()), TWO_OF_FOUR)
    structures = None
    names = [part for name, module in linears.items() for part in part_names(name, module)]
    if settings.heads_and_neurons is not None:
        structures = Structures.of(names, model.config, settings.heads_and_neurons)
    return TaskRun(settings.method, shape, structures, settings.pst, head)


@torch.no_grad()
def _round(sparse: SparseModel, linears: Mapping[str, nn.Module], plan: Plan) -> None:
    """Puts the values that will be packed into the model, so that what is tested is what is served."""
    for name, module in linears.items():
        weight = weight_of(module)
        rounded = sparse.quantize(name, weight.detach(), plan.schemes[name])
        weight.copy_(rounded.dequantized())
        if rounded.scale is not None:
            sparse.scales[name] = rounded.scale


def _training_figures(outcome: FinetuningReport, task: Task) -> dict[str, Any]:
    return {
        "task": task.name,
        "fine-tuning_steps": outcome.steps,
        "fine-tuning_seconds": round(outcome.seconds),
        "precision": outcome.precision,
        "trained_parameters": f"{outcome.trained_parameters:,} ({outcome.trained_share:.2%} of the model's)",
        "optimizer_state": f"{outcome.optimizer_bytes / 1e6:.1f} MB",
    }


def _tested(model: Any, tokenizer: Any, task: Task, section: TaskSection, report: Report) -> dict[str, Any]:
    """The task's metrics on its test examples."""
    report("test", 0, 1, {})
    started = time.monotonic()
    found = evaluate(model, tokenizer, task, task.test, length=section.length, beams=section.beams)
    report("test", 1, 1, found)
    figures = {f"test_{name}": round(value, 4) for name, value in found.items()}
    if task.kind == "classification":  # what one answer to everything would get: a rate too high ends there
        commonest = Counter(example.label for example in task.test).most_common(1)[0][1]
        figures["test_share_of_commonest_class"] = round(commonest / len(task.test), 4)
    return {**figures, "test_examples": len(task.test), "test_seconds": round(time.monotonic() - started)}


def _examples_used(task: Task) -> dict[str, Any]:
    return {"source": task.name, "examples": len(task.train), "sha256": task.sha256(), "licence": task.licence}
