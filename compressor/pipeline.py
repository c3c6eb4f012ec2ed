"""The stages of a compression, in order. `compress()` is the table of contents.

In memory the model itself passes from stage to stage; on disk there is `OUT`, which appears whole at the end, and a
work folder beside it from which an interrupted retraining goes on.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from compressor import retraining
from compressor.awq import apply_awq
from compressor.calibration import IN_MEMORY, LayerStats, Residence, calibrate, calibrate_blocks, weight_of
from compressor.checkpoint import CheckpointWriter, copy_companions
from compressor.data import TextBlocks, is_hub_id, load_text
from compressor.formats import make_format
from compressor.formats.low_rank import pack_low_rank
from compressor.interrupted import check_work_folder, claim_work_folder
from compressor.model_card import model_card
from compressor.models import block_linears, fetch_model, load_model, load_tokenizer
from compressor.output import OutputFolder
from compressor.preflight import Plan, check, tokens_within
from compressor.pruning import most_sensitive, prune, sensitivities
from compressor.quantizers import NEED_HESSIAN, QUANTIZERS, IntegerGrid
from compressor.recipe import Recipe, Retraining, parse_budget
from compressor.retraining import TextDistillation, reconstruction, text_loss
from compressor.retraining.distribution import join, main_first
from compressor.retraining.loop import identity_of, training_device
from compressor.retraining.optimizers import Transform
from compressor.retraining.reconstruction import ReconstructionSettings
from compressor.retraining.scales import ScaleSettings, train_scales
from compressor.scheme import QuantizationConfig, Scheme
from compressor.solvers import by_input
from compressor.sparse_model import Report, Result, SparseModel, watched, work_folder
from compressor.task_stage import fine_tune

log = logging.getLogger(__name__)

_STREAM_MARGIN = 4.0
"""So many times what a budget of time is estimated to train on is read of a stream."""


def compress(name: str, recipe: Recipe, out: str | Path, *, force: bool = False, report: Report) -> Result:
    """Compresses a model into the folder `out`.

    Args:
        name: a folder, a GGUF file, a hub id or `pypi:NAME`.
        recipe: what to do.
        out: the folder to make; an existing one is replaced with `force`.
        report: called with progress.

    Raises:
        ValueError, OSError, MemoryError: before any long work, with a sentence that says what to do.
    """
    rank, _ = join()
    if rank:  # of several processes, the first writes
        result, *_ = _train(name, recipe, Path(os.path.abspath(out)), report=_silent)
        return result
    with OutputFolder(out, force=force) as output:
        result, sparse, text = _train(name, recipe, output.path, report)
        transform(sparse, recipe, result.plan, text, report)
        quantize(sparse, recipe, text, result, report)
        sparse.to_cpu()
        save(sparse, name, recipe, output, result, report)
    shutil.rmtree(work_folder(output.path), ignore_errors=True)
    return result


def _train(name: str, recipe: Recipe, out: Path, report: Report) -> tuple[Result, SparseModel, TextBlocks | None]:
    """The stages in which every process of a launcher takes part."""
    torch.manual_seed(recipe.seed)
    report("fetch", 0, 1, {})
    with main_first():
        folder = fetch_model(name)
    report("fetch", 1, 1, {})
    with main_first():
        result = Result(out, check(folder, recipe, out))
        work = work_folder(out)
        if result.plan.task is not None:
            check_work_folder(work, recipe, result.plan)
            claim_work_folder(work, recipe, result.plan)
    if result.plan.task is not None:
        return result, fine_tune(result, recipe, report), None
    with main_first():
        tokens = check_work_folder(work, recipe, result.plan, tokens_needed(recipe, result.plan))
        text = read_text(folder, recipe, result, tokens)
        claim_work_folder(work, recipe, result.plan, tokens)
    model = near(load_model(folder))
    choose_dense(model, recipe, result, text, report)
    sparse = sparsify(model, recipe, result.plan, text, report)
    reconstruct(sparse, folder, recipe, text, result, report)
    retrain(sparse, folder, recipe, text, result, report)
    return result, sparse, text


def near(model: Any) -> Any:
    """The model on the accelerator, if there is one with room for it, its gradients' sums and a teacher beside it."""
    device = training_device()
    if device.type == "cpu":
        return model
    size = sum(parameter.nbytes for parameter in model.parameters())
    return model.to(device) if 3 * size < torch.cuda.mem_get_info(device)[0] else model


def _silent(_stage: str, _done: int, _total: int, _figures: dict[str, Any]) -> None:
    """Only the first process tells what goes on."""


def read_text(folder: Path, recipe: Recipe, result: Result, tokens: int | None) -> TextBlocks | None:
    """The text of calibration and retraining as token blocks, at most so many tokens, where a stage needs it."""
    if not recipe.uses_text:
        return None
    settings = recipe.text
    tokenizer = load_tokenizer(folder)
    text = load_text(
        settings.source, tokenizer, length=settings.length, seed=recipe.seed, field=settings.field, max_tokens=tokens
    )
    result.text = asdict(text.report)
    training_blocks(text, recipe)  # too short a text is said now, not after hours
    return text


def training_blocks(text: TextBlocks, recipe: Recipe) -> Tensor:
    """The blocks that stages may train on [n, L]: all but those held out, where any are."""
    holds_out = recipe.retraining is not None or recipe.quantization.scales is not None
    return text.split(held_out(recipe))[0] if holds_out else text.blocks


def tokens_needed(recipe: Recipe, plan: Plan) -> int | None:
    """The most tokens to read of the text; None for all of it."""
    blocks, length = blocks_needed(recipe), recipe.text.length
    if recipe.retraining is None:
        return length * blocks
    budget, batch = parse_budget(recipe.retraining.budget), recipe.retraining.loop.batch
    if not is_hub_id(recipe.text.source) or budget.epochs is not None:
        return None  # a file has an end, and which of its blocks are held out follows from it
    if budget.seconds is not None:
        trained = _STREAM_MARGIN * tokens_within(budget.seconds, recipe, plan.parameters)
    else:
        trained = float(budget.tokens or 0)
    return length * (max(blocks, math.ceil(trained / (batch * length)) * batch) + held_out(recipe))


def blocks_needed(recipe: Recipe) -> int:
    """Blocks of text that calibration reads."""
    settings = recipe.quantization
    trained = [stage.samples for stage in (recipe.reconstruction, settings.reconstruction, settings.scales) if stage]
    needed = max(*trained, settings.samples, recipe.sparsity.samples if recipe.sparsity else 1)
    return needed + (held_out(recipe) if settings.scales else 0)


def held_out(recipe: Recipe) -> int:
    """Blocks of text that nothing trains on."""
    return (recipe.retraining or Retraining()).validation_blocks


def choose_dense(
    model: Any,
    recipe: Recipe,
    result: Result,
    text: TextBlocks | None,
    report: Report,
    residence: Residence = IN_MEMORY,
) -> None:
    """Leaves the most sensitive linears dense, where the recipe gives them a share of the weights."""
    settings, plan = recipe.sparsity, result.plan
    if settings is None or text is None or settings.dense_share == 0:
        return
    linears = {name: module for name, module in block_linears(model).items() if name in plan.schemes}
    batches = list(training_blocks(text, recipe)[: settings.samples].split(8))
    found = sensitivities(
        model,
        batches,
        linears,
        plan.shapes,
        settings.criterion,
        lambda stage, done, total: report(stage, done, total, {}),
        residence,
    )
    sizes = {name: weight_of(module).numel() for name, module in linears.items()}
    names = most_sensitive(found, sizes, settings.dense_share)
    result.plan = plan.with_linears(linears, recipe.keeping_dense(names))
    result.figures["kept_dense"] = ", ".join(names) or "none: every layer is larger than the share"


def sparsify(model: Any, recipe: Recipe, plan: Plan, text: TextBlocks | None, report: Report) -> SparseModel:
    """Calibrates, and prunes every planned linear in one shot by the recipe's criterion."""
    if recipe.sparsity is None:
        return SparseModel(model, {}, {})
    linears = {name: module for name, module in block_linears(model).items() if name in plan.schemes}
    settings = recipe.sparsity
    batches = [] if text is None else list(training_blocks(text, recipe)[: settings.samples].split(8))
    masks, stats = prune(
        model,
        batches,
        linears,
        plan.shapes,
        settings.criterion,
        lambda stage, done, total: report(stage, done, total, {}),
    )
    return SparseModel(model, stats, masks)


def reconstruct(
    sparse: SparseModel, folder: Path, recipe: Recipe, text: TextBlocks | None, result: Result, report: Report
) -> None:
    """Trains each sparse block towards the dense one, where the recipe wants it; a killed run does so only once."""
    settings = recipe.reconstruction
    if settings is None or text is None:
        return
    with main_first():
        start, end = _reconstructed(sparse, load_model(folder), settings, recipe, text, result, report)
    result.figures |= {"block_error_one_shot": start, "block_error_reconstructed": end}


def _reconstructed(
    sparse: SparseModel,
    teacher: Any,
    settings: ReconstructionSettings,
    recipe: Recipe,
    text: TextBlocks,
    result: Result,
    report: Report,
    grids: Mapping[str, Transform] | None = None,
) -> tuple[float, float]:
    """Mean relative error of the blocks before and after; what a killed run has trained is taken up as it is."""
    stage = "reconstruct" if grids is None else "rebuild"
    masks = sparse.masks if grids is None else {name: sparse.mask_of(name) for name in grids}
    precision = recipe.retraining.loop.precision if recipe.retraining else "auto"
    examples = training_blocks(text, recipe)[: settings.samples]
    scales = [sparse.scales[name] for name in sorted(sparse.scales)]
    record = {stage: asdict(settings), "precision": precision}
    identity = identity_of(sparse.model, masks, [examples, *scales], record)
    errors = reconstruction.reconstruct(
        sparse.model,
        teacher,
        {name: sparse.model.get_submodule(name) for name in masks},
        masks,
        examples,
        settings,
        grids=grids,
        precision=precision,
        kept=reconstruction.KeptBlocks(work_folder(result.out) / stage, identity),
        report=lambda done, total, figures: report(stage, done, total, _rounded_all(figures)),
    )
    return round(fmean(start for start, _ in errors), 4), round(fmean(end for _, end in errors), 4)


def _rounded_all(figures: Mapping[str, float]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items()}


def retrain(
    sparse: SparseModel, folder: Path, recipe: Recipe, text: TextBlocks | None, result: Result, report: Report
) -> None:
    """Trains the sparse model against the dense one and resumes an interrupted run; without retraining, just prunes."""
    if recipe.retraining is None or text is None:
        with torch.no_grad():
            for name, mask in sparse.masks.items():
                weight_of(sparse.model.get_submodule(name)).mul_(mask)
        return
    settings, plan = recipe.retraining, result.plan
    tokens, validation = text.split(settings.validation_blocks)
    linears = {name: sparse.model.get_submodule(name) for name in sparse.masks}
    teacher: Any = load_model(folder).to(training_device())
    report("evaluate", 0, 1, {})
    dense_loss = text_loss(teacher, validation)
    report("evaluate", 1, 1, {"dense loss": dense_loss})
    if settings.loop.kl_weight == 0 and settings.loop.hidden_weight == 0:
        teacher = None  # nothing is distilled: its memory is free
    outcome = retraining.retrain(
        sparse.model,
        TextDistillation(
            tokens,
            teacher,
            kl_weight=settings.loop.kl_weight,
            temperature=settings.loop.temperature,
            cache=settings.loop.teacher_cache,
            top_k=settings.loop.teacher_top_k,
            distill=settings.loop.distill,
            hidden_weight=settings.loop.hidden_weight,
        ),
        linears,
        sparse.masks,
        parse_budget(settings.budget).resolved(len(tokens), tokens.shape[1], settings.loop.batch),
        loop=recipe.loop,
        settings=settings.ast if settings.method == "ast" else settings.cast,
        method=settings.method,
        validation=validation,
        work_dir=work_folder(result.out),
        shapes=plan.shapes,
        snap=lambda name, weight: sparse.snap_to_grid(name, weight, plan.schemes[name]),
        progress=lambda step, total, metrics: report("retrain", step, total, watched(metrics)),
    )
    sparse.low_rank = outcome.low_rank
    result.figures |= {
        "retraining_tokens": outcome.tokens,
        "retraining_seconds": round(outcome.seconds),
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "precision": outcome.precision,
        "validation_loss_dense": round(dense_loss, 4),
        "validation_loss_one_shot": _rounded(outcome.validation_loss_before),
        "validation_loss_retrained": _rounded(outcome.validation_loss),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def transform(sparse: SparseModel, recipe: Recipe, plan: Plan, text: TextBlocks | None, report: Report) -> None:
    """Scales inputs where the recipe wants it; the grids that retraining saw do not fit the new weights any more."""
    if recipe.quantization.transform is None or text is None:
        return
    linears = {name: module for name, module in block_linears(sparse.model).items() if name in plan.schemes}
    batches = list(training_blocks(text, recipe)[: recipe.quantization.samples].split(8))
    sparse.stats = apply_awq(
        sparse.model, batches, linears, plan.schemes, lambda done, total: report("scale", done, total, {})
    )
    sparse.scales.clear()


def quantize(sparse: SparseModel, recipe: Recipe, text: TextBlocks | None, result: Result, report: Report) -> None:
    """Finds the grids of the linears where that takes text, and trains what is on them where the recipe wants it."""
    settings = recipe.quantization
    if text is None:
        return
    with sparse.branches_attached():
        trained = settings.reconstruction is not None or settings.scales is not None
        unrounded: Any = copy.deepcopy(sparse.model) if trained else None
        calibrate_quantizer(sparse, recipe, result.plan, text, report)
        if settings.reconstruction is not None:
            examples = training_blocks(text, recipe)[: settings.samples]
            grids = rounding_grids(sparse, unrounded, result.plan, examples)
            if grids:  # none where the recipe leaves all layers with integers out
                start, end = _reconstructed(
                    sparse, unrounded, settings.reconstruction, recipe, text, result, report, grids
                )
                result.figures |= {"block_error_rounded": start, "block_error_rebuilt": end}
        if settings.scales is not None:
            _train_scales(sparse, unrounded, settings.scales, recipe, text, result, report)


def _train_scales(
    sparse: SparseModel,
    unrounded: Any,
    settings: ScaleSettings,
    recipe: Recipe,
    text: TextBlocks,
    result: Result,
    report: Report,
) -> None:
    """Trains the scales of all integers end to end, so that the model gives what it gave before it was rounded."""
    grids, dtypes = {}, {}
    for name, module in block_linears(sparse.model).items():
        if name in result.plan.schemes:
            grid = sparse.grid_of(name, weight_of(module).detach(), result.plan.schemes[name])
            if isinstance(grid, IntegerGrid):
                grids[name], dtypes[name] = grid, sparse.scales[name].dtype
    if not grids:
        return
    tokens, validation = text.split(held_out(recipe))
    scales, before, after = train_scales(
        sparse.model,
        TextDistillation(tokens, unrounded, kl_weight=1.0),
        {name: sparse.model.get_submodule(name) for name in grids},
        grids,
        dtypes,
        settings,
        loop=recipe.retraining.loop if recipe.retraining else None,
        seed=recipe.seed + 1,  # retraining began with the blocks of the seed itself
        validation=validation,
        work_dir=work_folder(result.out) / "scales",
        progress=lambda step, total, metrics: report("scales", step, total, watched(metrics)),
    )
    sparse.scales |= scales
    result.figures |= {"validation_loss_rounded": _rounded(before), "validation_loss_packed": _rounded(after)}


@torch.no_grad()
def rounding_grids(sparse: SparseModel, unrounded: nn.Module, plan: Plan, tokens_NL: Tensor) -> dict[str, Transform]:
    """The grid of every linear that has one; its weight is put back to what it was before it was rounded."""
    linears = {
        name: module
        for name, module in block_linears(sparse.model).items()
        if name in plan.schemes and make_format(plan.schemes[name]).scaled
    }
    for name, module in linears.items():
        weight_of(module).copy_(weight_of(unrounded.get_submodule(name)))
    if not sparse.scales:  # what calibration saw before retraining is not what these layers see now
        sparse.stats = sparse.stats | calibrate(sparse.model, tokens_NL.split(8), linears)
    return {
        name: sparse.grid_of(name, weight_of(module).detach(), plan.schemes[name]) for name, module in linears.items()
    }


@torch.no_grad()
def calibrate_quantizer(sparse: SparseModel, recipe: Recipe, plan: Plan, text: TextBlocks, report: Report) -> None:
    """Rounds block after block where the quantiser needs Hessians; each sees the rounded ones before it."""
    left = plan.schemes.keys() - sparse.scales.keys()  # the others are on the grid that they were trained on
    linears = {name: module for name, module in block_linears(sparse.model).items() if name in left}
    if recipe.quantization.quantizer not in NEED_HESSIAN or not linears:
        return
    batches = list(training_blocks(text, recipe)[: recipe.quantization.samples].split(8))
    done = 0
    for stats in calibrate_blocks(sparse.model, batches, linears, hessian=True):
        sparse.scales |= round_block(linears, stats, plan.schemes, recipe.quantization.quantizer)
        done += len(stats)
        report("quantise", done, len(linears), {})


def round_block(
    linears: Mapping[str, nn.Module], stats: Mapping[str, LayerStats], schemes: Mapping[str, Scheme], quantizer: str
) -> dict[str, Tensor]:
    """Rounds the linears of one block in place; returns their scales. Those of one input and scheme go together."""
    scales: dict[str, Tensor] = {}
    for layer, names in by_input(stats):
        for scheme in dict.fromkeys(schemes[name] for name in names):
            alike = [name for name in names if schemes[name] == scheme]
            weights = [weight_of(linears[name]).detach() for name in alike]
            heights = [weight.shape[0] for weight in weights]
            rounded = QUANTIZERS[quantizer](torch.cat(weights), layer, scheme)
            for weight, values in zip(weights, rounded.dequantized().split(heights), strict=True):
                weight.copy_(values)
            if rounded.scale is not None:
                scales |= dict(zip(alike, rounded.scale.split(heights), strict=True))
    return scales


def stored_tensors(sparse: SparseModel, plan: Plan, report: Report) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its stored name, each packed as it is asked for."""
    model, packed = sparse.model, set()
    for done, (name, scheme) in enumerate(plan.schemes.items(), start=1):
        report("pack", done, len(plan.schemes), {})
        module = model.get_submodule(name)
        weight = (module.weight if isinstance(module, nn.Embedding) else weight_of(module)).detach()
        for key, tensor in make_format(scheme).pack(sparse.quantize(name, weight, scheme)).items():
            yield f"{name}.{key}", tensor
        if scheme.low_rank is not None:
            branch = sparse.low_rank[name]
            for key, tensor in pack_low_rank(scheme.low_rank, branch.s.detach(), branch.x).items():
                yield f"{name}.{key}", tensor
        packed.add(f"{name}.weight")
    for name, tensor in model.state_dict().items():
        if name not in packed and name not in model.all_tied_weights_keys:
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def save(sparse: SparseModel, name: str, recipe: Recipe, output: OutputFolder, result: Result, report: Report) -> None:
    """Quantises, packs and writes the model."""
    tensors = stored_tensors(sparse, result.plan, report)
    save_tensors(tensors, config_of(sparse.model, result.plan), name, recipe, output, result)


def save_tensors(
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    name: str,
    recipe: Recipe,
    output: OutputFolder,
    result: Result,
) -> None:
    """Writes tensors as they come, one at a time, with tokenizer, recipe and model card beside."""
    start = time.monotonic()
    writer = CheckpointWriter(output)
    for key, tensor in tensors:
        writer.add(key, tensor)
    copy_companions(result.plan.folder, writer.folder)
    metrics = work_folder(output.path) / "metrics.jsonl"
    if recipe.retraining is not None and metrics.is_file():
        shutil.copy(metrics, writer.folder / "metrics.jsonl")
    result.stored_bytes = writer.total_bytes
    result.figures["pack_seconds"] = round(time.monotonic() - start, 1)
    record = recipe.model_dump(mode="json", exclude_none=True)
    (writer.folder / "recipe.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    (writer.folder / "README.md").write_text(model_card(name, recipe, result.plan, result.figures, result.text))
    if recipe.quantization.kv_cache_dtype is not None:
        packed = {**config["quantization_config"], "kv_cache_dtype": recipe.quantization.kv_cache_dtype}
        config = {**config, "quantization_config": packed}
    writer.finish(config)


def config_of(model: Any, plan: Plan) -> dict[str, Any]:
    """`config.json` of the checkpoint: the model's own with the record of what is packed."""
    config = json.loads(json.dumps(model.config.to_dict()))
    config["dtype"] = "bfloat16"
    for key in ("auto_map", "custom_pipelines"):  # of Python files that are not copied
        config.pop(key, None)
    plain = [name for name in block_linears(model) if name not in plan.schemes]
    config["quantization_config"] = QuantizationConfig.from_schemes(plan.schemes, plain=plain).to_dict()
    return config
