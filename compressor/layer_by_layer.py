"""Calibrated pruning and rounding of a model larger than memory: one block at a time is read from its shards.

The stages are those of the pipeline, on a model whose weights are on the meta device; what calibration asks for is
read when a block's turn comes and dropped after it. Pruned blocks wait in a scratch folder beside OUT until they are
rounded and packed. Hidden states stay in the model's dtype, in files of that folder where they are large. Bytes are
those of the run in memory.

Peak: what lies around the blocks (the embedding) while hidden states are begun, then one block, the statistics of one
block (a Hessian takes 4 I^2 bytes, and three times that while it is inverted) and one batch of hidden states.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.calibration import HiddenStates, LayerStats, Residence, blocks_of, calibrate_blocks, weight_of
from compressor.checkpoint import Checkpoint
from compressor.data import TextBlocks
from compressor.formats import make_format
from compressor.models import auto_class, block_linears, name_of, quiet_transformers
from compressor.pipeline import blocks_needed, choose_dense, round_block
from compressor.preflight import Plan
from compressor.pruning import score_mask
from compressor.quantizers import NEED_HESSIAN
from compressor.recipe import Recipe
from compressor.solvers import SOLVERS, solve_block, without_hessians
from compressor.sparse_model import Report, Result, SparseModel

_LARGE_BYTES = 1 << 28
"""Hidden states above this lie on disk."""
_PACKED_WEIGHTS = 1 << 19
"""Weights that are packed at a time."""


class BlocksOnDisk(Residence):
    """A model without weights, whose blocks are read from their shards for as long as they are used.

    Args:
        folder: the dense model.
        scratch: an existing folder for pruned blocks and hidden states.
        hidden_bytes: of the hidden states of the whole calibration text.
    """

    def __init__(self, folder: Path, scratch: Path, hidden_bytes: int = 0) -> None:
        self.source, self.scratch = Checkpoint.open(folder), scratch
        self.model = _without_weights(folder)
        self.linears = block_linears(self.model)
        self.masked: dict[str, Any] = {}
        """{linear: function} that prunes a weight [O, I] as it is read."""
        self.keeps = False
        """Whether changes to a block are written down when its turn is over."""
        self._spool = scratch if hidden_bytes > _LARGE_BYTES else None
        self._prefixes = tuple(f"{name}." for name in blocks_of(self.model, self.linears))

    def hidden_states(self) -> HiddenStates:
        return HiddenStates(self._spool)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Everything but the blocks and the head, which no block needs."""
        head = f"{name_of(self.model, self.model.get_output_embeddings())}."
        names = [name for name, _ in self.model.named_parameters() if not name.startswith((*self._prefixes, head))]
        for name in names:
            self._set(self.model, name, self._read(name))
        yield
        self._drop(self.model, names)

    @contextmanager
    def block(self, prefix: str, block: nn.Module) -> Iterator[None]:
        names, changed = [name for name, _ in block.named_parameters()], self.scratch / f"{prefix}.safetensors"
        if changed.is_file():
            pruned = Checkpoint(self.scratch, {}, dict.fromkeys(names, changed))
            for name in names:
                self._set(block, name, pruned.tensor(name))
                pruned.close()
        else:
            for name in names:
                self._set(block, name, self._read(f"{prefix}.{name}"))
        self._mask(prefix)
        yield
        if self.keeps:
            save_file({name: block.get_parameter(name).data for name in names}, changed)
        self._drop(block, names)

    def _mask(self, prefix: str) -> None:
        for name, masked in self.masked.items():
            if name.startswith(f"{prefix}."):
                weight = weight_of(self.linears[name])
                with torch.no_grad():
                    weight.mul_(masked(name, weight))

    def _read(self, name: str) -> Tensor:
        tensor = self.source.tensor(self.source.stored_name(name, self.model.base_model_prefix))
        self.source.close()  # pages of an open file count as memory
        dtype = self.model.config.dtype
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def _set(self, root: nn.Module, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _drop(self, root: nn.Module, names: Iterable[str]) -> None:
        for name in names:
            self._set(root, name, torch.empty_like(root.get_parameter(name), device="meta"))
        _give_back()


def _give_back() -> None:
    """Hands free memory that the C library keeps, a few blocks of it, back to the system; glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _without_weights(folder: Path) -> Any:
    """The model with parameters on the meta device and buffers, such as rotary frequencies, as they are."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with quiet_transformers(), init_empty_weights(include_buffers=False):
        config = AutoConfig.from_pretrained(folder)
        return auto_class(config).from_config(config).eval()


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside OUT that is gone afterwards."""
    folder = out.with_name(f".{out.name}.blocks")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def packed_linears(
    result: Result, recipe: Recipe, text: TextBlocks, scratch: Path, report: Report
) -> Iterator[tuple[str, Tensor]]:
    """Ranks and prunes at once; then, as they are asked for, rounds and packs the blocks: their tensors by name."""
    disk = BlocksOnDisk(result.plan.folder, scratch, _hidden_bytes(result.plan, text))
    choose_dense(disk.model, recipe, result, text, report, disk)
    stats = _prune(disk, recipe, result.plan, text, report)
    return _packed(disk, stats, recipe, result.plan, text, report)


def scratch_bytes(model: Any, linears: Mapping[str, nn.Module], recipe: Recipe) -> int:
    """Of the pruned blocks and hidden states that will wait on disk."""
    if not recipe.uses_text:
        return 0
    itemsize = (model.config.dtype or torch.float32).itemsize
    hidden = blocks_needed(recipe) * recipe.text.length * int(model.config.hidden_size) * itemsize
    size = hidden if hidden > _LARGE_BYTES else 0
    if recipe.sparsity is not None and recipe.sparsity.criterion in SOLVERS:
        blocks = blocks_of(model, linears).values()
        size += itemsize * sum(p.numel() for block in blocks for p in block.parameters())
    return size


def _hidden_bytes(plan: Plan, text: TextBlocks) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(plan.folder)
    return text.blocks.numel() * int(config.hidden_size) * (config.dtype or torch.float32).itemsize


def _prune(
    disk: BlocksOnDisk, recipe: Recipe, plan: Plan, text: TextBlocks, report: Report
) -> Mapping[str, LayerStats]:
    """Prunes, or prepares pruning as weights are read; returns the statistics without Hessians."""
    if recipe.sparsity is None:
        return {}
    criterion, linears = recipe.sparsity.criterion, _planned(disk, plan)
    batches = list(text.blocks[: recipe.sparsity.samples].split(8))
    solver = criterion in SOLVERS
    kept: dict[str, LayerStats] = {}
    disk.keeps = solver
    for stats in calibrate_blocks(disk.model, batches, linears, hessian=solver, residence=disk):
        if solver:
            solve_block(linears, stats, plan.shapes, criterion)
        kept |= without_hessians(stats)
        report("prune", len(kept), len(linears), {})
    disk.keeps = False
    if not solver:
        disk.masked = dict.fromkeys(
            plan.shapes, lambda name, weight: score_mask(name, weight, kept[name], plan.shapes[name], criterion)
        )
    return kept


@torch.no_grad()
def _packed(
    disk: BlocksOnDisk,
    stats: Mapping[str, LayerStats],
    recipe: Recipe,
    plan: Plan,
    text: TextBlocks,
    report: Report,
) -> Iterator[tuple[str, Tensor]]:
    linears, done = _planned(disk, plan), 0
    for names, scales in _rounded(disk, linears, recipe, plan, text):
        for name in names:
            weight = weight_of(linears[name])
            height = max(1, _PACKED_WEIGHTS // weight.shape[1])
            blocks = [
                _pack_rows(disk, stats, scales, name, slice(start, start + height), plan, recipe)
                for start in range(0, weight.shape[0], height)
            ]
            for key in blocks[0]:
                yield f"{name}.{key}", torch.cat([block[key] for block in blocks])
        done += len(names)
        report("pack", done, len(linears), {})


def _pack_rows(
    disk: BlocksOnDisk,
    stats: Mapping[str, LayerStats],
    scales: Mapping[str, Tensor],
    name: str,
    rows: slice,
    plan: Plan,
    recipe: Recipe,
) -> dict[str, Tensor]:
    """Packing takes tens of bytes a weight for a moment: rows, which are independent, take turns."""
    scheme = plan.schemes[name]
    fixed = {name: scales[name][rows]} if name in scales else {}
    part = SparseModel(disk.model, dict(stats), {}, scales=fixed)
    return make_format(scheme).pack(part.quantize(name, weight_of(disk.linears[name])[rows], scheme))


def _rounded(
    disk: BlocksOnDisk, linears: Mapping[str, nn.Module], recipe: Recipe, plan: Plan, text: TextBlocks
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Block after block, while it is in memory: the names of its linears, and their scales where they are decided."""
    settings = recipe.quantization
    if settings.quantizer in NEED_HESSIAN:
        batches = list(text.blocks[: settings.samples].split(8))
        for stats in calibrate_blocks(disk.model, batches, linears, hessian=True, residence=disk):
            yield list(stats), round_block(linears, stats, plan.schemes, settings.quantizer)
        return
    for prefix, block in blocks_of(disk.model, linears).items():
        with disk.block(prefix, block):
            yield [name for name in linears if name.startswith(f"{prefix}.")], {}


def _planned(disk: BlocksOnDisk, plan: Plan) -> dict[str, nn.Module]:
    return {name: module for name, module in disk.linears.items() if name in plan.schemes}
