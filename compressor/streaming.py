"""Compression that never holds the model: one weight after another, in blocks of rows, from the dense shards to OUT.

For one-shot recipes whose decisions need no calibration text. Rows are independent in every format and in rounding to
nearest, so blocks of them are pruned, rounded and packed alone; a file is mapped only while one weight is read, for
mapped pages count as memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration import is_conv1d
from compressor.checkpoint import Checkpoint
from compressor.criteria import CRITERIA
from compressor.formats import make_format
from compressor.masks import n_m_mask
from compressor.models import fetch_model, skeleton
from compressor.output import OutputFolder
from compressor.pipeline import Report, Result, config_of, save_tensors
from compressor.preflight import Plan, check
from compressor.quantizers import rtn
from compressor.recipe import Recipe, check_streamable
from compressor.scheme import Scheme

_BLOCK_WEIGHTS = 1 << 22
"""Weights that are worked on at a time: 16 MiB in float32, and a few times that while scales are searched."""


def compress_streaming(name: str, recipe: Recipe, out: str | Path, *, force: bool = False, report: Report) -> Result:
    """As `pipeline.compress`, in the memory of a few blocks of rows.

    Raises:
        ValueError, OSError, MemoryError: before any long work, with a sentence that says what to do.
    """
    check_streamable(recipe)
    with OutputFolder(out, force=force) as output:
        folder = fetch_model(name)
        result = Result(output.path, check(folder, recipe, output.path, low_memory=True))
        tensors = stored_tensors(result.plan, recipe, report)
        save_tensors(tensors, config_of(skeleton(folder), result.plan), name, recipe, output, result)
    return result


def stored_tensors(plan: Plan, recipe: Recipe, report: Report) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its stored name."""
    source = Checkpoint.open(plan.folder)
    model = skeleton(plan.folder)
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    for done, (name, scheme) in enumerate(plan.schemes.items(), start=1):
        report("pack", done, len(plan.schemes), {})
        turned = is_conv1d(model.get_submodule(name))
        blocks = [_pack(rows, scheme, recipe) for rows in _row_blocks(source, f"{name}.weight", turned)]
        for key in blocks[0]:
            yield f"{name}.{key}", torch.cat([block[key] for block in blocks])
        source.close()
    for name in source.names():
        if name.removesuffix(".weight") not in plan.schemes and name != tied:
            tensor = source.tensor(name)
            yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            source.close()


def _row_blocks(source: Checkpoint, name: str, turned: bool) -> Iterator[Tensor]:
    """A weight [O, I] in blocks of rows, float32. GPT-2 stores it as [I, O]: it is read whole."""
    shape = source.shape_of(name)
    step = max(1, _BLOCK_WEIGHTS // shape[1])
    if turned:
        yield source.tensor(name).t().float()
        return
    for start in range(0, shape[0], step):
        yield source.rows(name, start, min(start + step, shape[0])).float()


def _pack(weight: Tensor, scheme: Scheme, recipe: Recipe) -> dict[str, Tensor]:
    fmt = make_format(scheme)
    if fmt.sparse and recipe.sparsity is not None:
        weight = weight * n_m_mask(CRITERIA[recipe.sparsity.criterion](weight, None))
    return fmt.pack(rtn(weight, None, scheme))
