"""Compression that never holds the model: one weight after another, in blocks of rows, from the dense shards to OUT.

For one-shot recipes. Where decisions need calibration text, the blocks of the model are read one at a time instead
(layer_by_layer.py). Rows are independent in every format and in rounding to
nearest, so blocks of them are pruned, rounded and packed alone; a file is mapped only while one weight is read, for
mapped pages count as memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import is_conv1d
from compressor.checkpoint import Checkpoint
from compressor.formats import make_format
from compressor.layer_by_layer import packed_linears, scratch_folder
from compressor.masks import MaskShape
from compressor.models import block_linears, fetch_model, skeleton
from compressor.output import OutputFolder
from compressor.pipeline import config_of, read_text, save_tensors, tokens_needed
from compressor.preflight import Plan, check
from compressor.pruning import score_mask
from compressor.quantizers import rtn
from compressor.recipe import Recipe, check_streamable
from compressor.scheme import Scheme
from compressor.sparse_model import Report, Result

_M_MMAP_THRESHOLD = -3  # of malloc.h
_BLOCK_WEIGHTS = 1 << 22
"""Weights that are worked on at a time: 16 MiB in float32, and a few times that while scales are searched."""


def compress_streaming(name: str, recipe: Recipe, out: str | Path, *, force: bool = False, report: Report) -> Result:
    """As `pipeline.compress`, in the memory of a few blocks of rows, or of one block of the model with its statistics.

    Raises:
        ValueError, OSError, MemoryError: before any long work, with a sentence that says what to do.
    """
    check_streamable(recipe)
    _give_freed_memory_back()
    with OutputFolder(out, force=force) as output, scratch_folder(output.path) as scratch:
        folder = fetch_model(name)
        result = Result(output.path, check(folder, recipe, output.path, low_memory=True))
        text = read_text(folder, recipe, result, tokens_needed(recipe, result.plan))
        linears = None if text is None else packed_linears(result, recipe, text, scratch, report)
        tensors = stored_tensors(result.plan, recipe, linears, report)
        save_tensors(tensors, config_of(skeleton(folder), result.plan), name, recipe, output, result)
    return result


def _give_freed_memory_back() -> None:
    """glibc would learn from the first large tensor to keep the next ones after they are freed: blocks' worth."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def stored_tensors(
    plan: Plan, recipe: Recipe, linears: Iterable[tuple[str, Tensor]] | None, report: Report
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its stored name; `linears` are those that calibration has packed."""
    source = Checkpoint.open(plan.folder)
    model = skeleton(plan.folder)
    left = plan.schemes
    if linears is not None:
        yield from linears
        left = {name: scheme for name, scheme in left.items() if name not in block_linears(model)}
    for done, (name, scheme) in enumerate(left.items(), start=1):
        if linears is None:
            report("pack", done, len(left), {})
        turned = is_conv1d(model.get_submodule(name))
        shape = plan.shapes.get(name)
        whole = turned or not (shape is None or shape.by_row)
        weights = _row_blocks(source, source.stored_name(f"{name}.weight", model.base_model_prefix), whole)
        blocks = [_pack(name, rows.t() if turned else rows, scheme, shape, recipe) for rows in weights]
        for key in blocks[0]:
            yield f"{name}.{key}", torch.cat([block[key] for block in blocks])
        source.close()
    for name in model.state_dict():
        stored = source.stored_name(name, model.base_model_prefix)
        packed = name.removesuffix(".weight") in plan.schemes
        if stored in source.shards and not packed and name not in model.all_tied_weights_keys:
            tensor = source.tensor(stored)
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            source.close()


def _row_blocks(source: Checkpoint, name: str, whole: bool) -> Iterator[Tensor]:
    """A stored weight in blocks of rows, float32; whole where rows depend on each other, or GPT-2 stores [I, O]."""
    shape = source.shape_of(name)
    step = shape[0] if whole else max(1, _BLOCK_WEIGHTS // shape[1])
    for start in range(0, shape[0], step):
        yield source.rows(name, start, min(start + step, shape[0])).float()


def _pack(name: str, weight: Tensor, scheme: Scheme, shape: MaskShape | None, recipe: Recipe) -> dict[str, Tensor]:
    if shape is not None and recipe.sparsity is not None:
        weight = weight * score_mask(name, weight, None, shape, recipe.sparsity.criterion)
    return make_format(scheme).pack(rtn(weight, None, scheme))
