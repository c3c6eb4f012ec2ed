"""The stage that fine-tunes for a task while it prunes, and says how well the model that will be packed does."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.calibration import weight_of
from compressor.masks import TWO_OF_FOUR
from compressor.models import block_linears, fetch_model, load_classifier, load_model, load_tokenizer
from compressor.preflight import Plan
from compressor.recipe import Recipe, TaskSection, parse_budget
from compressor.retraining.distribution import join
from compressor.retraining.loop import training_device
from compressor.retraining.pst_layer import part_names
from compressor.retraining.rows_and_heads import Structures
from compressor.retraining.task_objectives import Teacher, objective_for
from compressor.retraining.task_training import FinetuningReport, TaskRun, finetune
from compressor.sparse_model import Report, Result, SparseModel, watched, work_folder
from compressor.tasks import Task
from compressor.tasks.encoding import Answers, Labelled, encode
from compressor.tasks.evaluation import evaluate, predict

_PROBED = 512  # training examples that tell whether a teacher knows the task


def fine_tune(result: Result, recipe: Recipe, report: Report) -> SparseModel:
    """Fine-tunes the planned model for the planned task, rounds it to what is packed, and tests that."""
    plan, settings, section = result.plan, recipe.retraining, recipe.task
    task = plan.task
    assert settings is not None and section is not None and task is not None
    tokenizer = load_tokenizer(plan.folder)
    model, head, fine_tuned = _load(plan.folder, task)
    encoded = encode(tokenizer, task, task.train, section.length)
    if isinstance(encoded, Labelled):
        model.config.pad_token_id = encoded.padding  # where decoders look for a text's end
    teacher = _teacher(recipe, task, model if fine_tuned else None, encoded, result)
    linears = {name: module for name, module in block_linears(model).items() if name in plan.schemes}
    sparse = SparseModel(model, {}, {})
    outcome = finetune(
        model,
        objective_for(encoded, section.label_smoothing, teacher),
        _pruned(linears, plan, recipe),
        parse_budget(settings.budget),
        _task_run(linears, model, plan, recipe, head),
        loop=recipe.loop,
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


def _load(folder: Path, task: Task) -> tuple[Any, frozenset[str], bool]:
    """A model, the names of its head's parameters where the task brings one, and whether it came with that head."""
    if task.head_labels is None:
        return load_model(folder), frozenset(), False
    return load_classifier(folder, task.head_labels)


def _teacher(
    recipe: Recipe, task: Task, fine_tuned: Any | None, encoded: Labelled | Answers, result: Result
) -> Teacher | None:
    """The recipe's, or the dense model itself where it is fine-tuned for this very task already."""
    assert recipe.retraining is not None and recipe.task is not None
    loop, name = recipe.retraining.loop, recipe.task.teacher
    if loop.kl_weight == 0 or (name is None and fine_tuned is None):
        return None
    model: Any = copy.deepcopy(fine_tuned) if name is None else _load(fetch_model(name), task)[0]
    if isinstance(encoded, Labelled):
        model.config.pad_token_id = encoded.padding
    if isinstance(encoded, Labelled) and not _knows(model, encoded):
        if name is not None:
            raise ValueError(f"teacher {name} does no better than one answer to everything: it knows another task")
        result.figures["teacher"] = "none: the model's own head knows another task"
        return None
    result.figures["teacher"] = name or "the model itself, dense"
    return Teacher(model, loop.kl_weight, loop.temperature)


def _knows(model: Any, encoded: Labelled) -> bool:
    """Whether a model does clearly better on some training examples than the best single answer to all of them."""
    places = range(0, len(encoded.ids), -(-len(encoded.ids) // _PROBED))  # files may be sorted by class
    types = None if encoded.types is None else [encoded.types[place] for place in places]
    ids, labels = [encoded.ids[place] for place in places], encoded.labels[list(places)]
    model.to(training_device())
    answers = torch.tensor(predict(model, replace(encoded, ids=ids, types=types, labels=labels)))
    if encoded.regression:
        return bool((answers - labels).square().mean() < 0.9 * labels.var(correction=0))
    missed = 1.0 - float(labels.bincount().max()) / len(labels)
    return float((answers != labels).float().mean()) < 0.9 * missed


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
    """The task's metrics on its test examples, and on at most as many of those that were held out for choosing.

    The latter are left out where answers are written, which takes long.
    """
    model.to(training_device())
    figures: dict[str, Any] = {}
    splits = {"validation": task.validation[: len(task.test)], "test": task.test}
    if task.kind == "generation" or not task.validation:
        del splits["validation"]
    for split, examples in splits.items():
        report(split, 0, 1, {})
        started = time.monotonic()
        found = evaluate(model, tokenizer, task, examples, length=section.length, beams=section.beams)
        report(split, 1, 1, found)
        figures |= {f"{split}_{name}": round(value, 4) for name, value in found.items()}
    if task.kind == "classification":  # what one answer to everything would get: a rate too high ends there
        commonest = Counter(example.label for example in task.test).most_common(1)[0][1]
        figures["test_share_of_commonest_class"] = round(commonest / len(task.test), 4)
    return {**figures, "test_examples": len(task.test), "test_seconds": round(time.monotonic() - started)}


def _examples_used(task: Task) -> dict[str, Any]:
    return {"source": task.name, "examples": len(task.train), "sha256": task.sha256(), "licence": task.licence}
