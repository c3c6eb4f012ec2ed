"""The stages of a compression, in order. `compress()` is the table of contents.

In memory the model itself passes from stage to stage; on disk there is `OUT`, which appears whole at the end, and a
work folder beside it from which an interrupted retraining goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from compressor.calibration import LayerStats, calibrate, weight_of
from compressor.checkpoint import CheckpointWriter
from compressor.criteria import CRITERIA
from compressor.data import TextBlocks, load_text
from compressor.formats import make_format
from compressor.formats.low_rank import pack_low_rank
from compressor.masks import n_m_mask
from compressor.model_card import model_card
from compressor.models import block_linears, fetch_model, load_model, load_tokenizer
from compressor.output import OutputFolder
from compressor.preflight import Plan, check
from compressor.quantizers import QUANTIZERS
from compressor.recipe import Recipe
from compressor.scheme import QuantizationConfig

log = logging.getLogger(__name__)

Report = Callable[[str, int, int, dict[str, Any]], None]
"""`report(stage, done, total, figures)`: called as a stage goes on."""


@dataclass
class Result:
    """What came out, and what is written on the model card."""

    out: Path
    plan: Plan
    stored_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None


@dataclass
class SparseModel:
    """A model whose linears hold sparse weights, with the low-rank branches that were trained beside them."""

    model: Any
    stats: dict[str, LayerStats]
    masks: dict[str, Tensor]
    low_rank: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


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
    with OutputFolder(out, force=force) as output:
        torch.manual_seed(recipe.seed)
        folder = fetch_model(name)
        result = Result(output.path, check(folder, recipe, output.path))
        text = read_text(folder, recipe, result)
        sparse = sparsify(load_model(folder), recipe, result.plan, text, report)
        retrain(sparse, folder, recipe, text, work_folder(output.path), result, report)
        save(sparse, name, recipe, output, result, report)
    shutil.rmtree(work_folder(output.path), ignore_errors=True)
    return result


def work_folder(out: Path) -> Path:
    """Where an interrupted retraining is resumed from."""
    return out.with_name(f".{out.name}.work")


def read_text(folder: Path, recipe: Recipe, result: Result) -> TextBlocks | None:
    """The text of calibration and retraining as token blocks, where a stage needs it."""
    if not recipe.uses_text:
        return None
    settings = recipe.text
    tokenizer = load_tokenizer(folder)
    limit = None if recipe.retraining else settings.length * recipe.sparsity.samples if recipe.sparsity else None
    text = load_text(
        settings.source, tokenizer, length=settings.length, seed=recipe.seed, field=settings.field, max_tokens=limit
    )
    result.text = asdict(text.report)
    return text


def sparsify(model: Any, recipe: Recipe, plan: Plan, text: TextBlocks | None, report: Report) -> SparseModel:
    """Calibrates, and prunes every planned linear in one shot by the recipe's criterion."""
    linears = {name: module for name, module in block_linears(model).items() if name in plan.schemes}
    if recipe.sparsity is None:
        return SparseModel(model, {}, {})
    stats: dict[str, LayerStats] = {}
    if text is not None:
        batches = text.blocks[: recipe.sparsity.samples].split(8)
        stats = calibrate(model, batches, linears, progress=lambda done, total: report("calibrate", done, total, {}))
    score = CRITERIA[recipe.sparsity.criterion]
    masks: dict[str, Tensor] = {}
    for done, (name, module) in enumerate(linears.items(), start=1):
        masks[name] = n_m_mask(score(weight_of(module).float(), stats[name] if stats else None))
        report("sparsify", done, len(linears), {})
    if recipe.retraining is None:
        with torch.no_grad():
            for name, module in linears.items():
                weight_of(module).mul_(masks[name])
    return SparseModel(model, stats, masks)


def stored_tensors(sparse: SparseModel, plan: Plan, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its stored name, each packed as it is asked for."""
    model, packed = sparse.model, set()
    for name, scheme in plan.schemes.items():
        module = model.get_submodule(name)
        weight = (module.weight if isinstance(module, nn.Embedding) else weight_of(module)).detach()
        fmt = make_format(scheme)
        quantized = QUANTIZERS[recipe.quantization.quantizer](weight, sparse.stats.get(name), scheme)
        for key, tensor in fmt.pack(quantized).items():
            yield f"{name}.{key}", tensor
        if scheme.low_rank is not None:
            for key, tensor in pack_low_rank(scheme.low_rank, *sparse.low_rank[name]).items():
                yield f"{name}.{key}", tensor
        packed.add(f"{name}.weight")
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for name, tensor in model.state_dict().items():
        if name not in packed and name != tied:
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def save(sparse: SparseModel, name: str, recipe: Recipe, output: OutputFolder, result: Result, report: Report) -> None:
    """Quantises, packs and writes tensor by tensor, with tokenizer, recipe and model card beside."""
    start = time.monotonic()
    writer = CheckpointWriter(output)
    total = sum(1 for _ in sparse.model.state_dict())
    for done, (key, tensor) in enumerate(stored_tensors(sparse, result.plan, recipe), start=1):
        writer.add(key, tensor)
        report("pack", min(done, total), total, {})
    copy_companions(result.plan.folder, writer.folder)
    metrics = work_folder(output.path) / "metrics.jsonl"
    if metrics.is_file():
        shutil.copy(metrics, writer.folder / "metrics.jsonl")
    result.stored_bytes = writer.total_bytes
    result.figures["pack_seconds"] = round(time.monotonic() - start, 1)
    record = recipe.model_dump(mode="json", exclude_none=True)
    (writer.folder / "recipe.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
    (writer.folder / "README.md").write_text(model_card(name, recipe, result.plan, result.figures, result.text))
    writer.finish(config_of(sparse.model, result.plan))


def config_of(model: Any, plan: Plan) -> dict[str, Any]:
    """`config.json` of the checkpoint: the model's own with the record of what is packed."""
    config = json.loads(json.dumps(model.config.to_dict()))
    config["dtype"] = "bfloat16"
    config["quantization_config"] = QuantizationConfig.from_schemes(plan.schemes).to_dict()
    return config


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings; weights, indices and records stay behind."""
    for file in sorted(source.iterdir()):
        own = file.name in ("config.json", "manifest.json", "recipe.yaml") or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and not own:
            shutil.copyfile(file, target / file.name)
