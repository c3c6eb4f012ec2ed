"""Layer-wise reconstruction: block after block learns to give the dense block's output, before end-to-end distillation.

Block number i of the sparse model is run on what the sparse blocks before it give, and trained towards what the dense
block gives on what the dense blocks before give, so each also makes up for the errors of those before it:

    min  mean over tokens of || block(x_sparse) - block_dense(x_dense) ||^2 / || block_dense(x_dense) ||^2

Token by token, because the next block reads each through a norm of its own, and because in many models one token's
hidden state is a hundred times as large as the others' (SmolLM2-135M's first: 0.998 of a text's energy).

No head, no teacher pass for the whole depth, one block's activations at a time: a pass over the text costs about
half of a pass of distillation, and memory is bounded by the hidden states of the samples.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.calibration import BlockCall, blocks_of, calls_of_blocks, weight_of
from compressor.output import sync
from compressor.precision import compute_dtype
from compressor.retraining.distribution import Distribution
from compressor.retraining.loop import plain_attention, training_device
from compressor.retraining.optimizers import AdamSettings, Trained, Transform, adam_steps, train_dense, train_linear
from compressor.retraining.schedules import learning_rate

log = logging.getLogger(__name__)

# The variance comes from the momentum, not from the gradient: on the noise of single texts steps are some times larger
# than Adam's, and ReconstructionSettings.learning_rate is tuned with that.
_ADAM = AdamSettings(form="decoupled")
# Tensors whose root mean square is below, such as biases of zero, move as if it were this.
_LEAST = 1e-3

Report = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class ReconstructionSettings:
    """How each block is trained.

    Args:
        samples: blocks of text, `batch` at a time.
        passes: over the samples.
        learning_rate: Adam's, as a share of a tensor's root mean square: the weights of one model may be ten times as
            large as those of another.
    """

    samples: int = 32
    passes: int = 4
    batch: int = 2
    learning_rate: float = 5e-3
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if min(self.samples, self.passes, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError("samples, passes, batch and learning_rate of reconstruction must be above 0")
        if not 0 <= self.warmup < 1 or self.clip < 0:
            raise ValueError("warmup of reconstruction must lie in [0, 1), clip not be negative (0: off)")


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    linears: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    tokens_NL: Tensor,
    settings: ReconstructionSettings,
    *,
    grids: Mapping[str, Transform] | None = None,
    precision: str = "auto",
    kept: KeptBlocks | None = None,
    report: Report | None = None,
) -> list[tuple[float, float]]:
    """Train the blocks of a pruned model in place; masks stay as they are, and a block that came out worse stays too.

    Args:
        linears: the sparse linears by name; `masks` [O, I] under the same names.
        grids: by the same names, what a block is to see of the linear's weight (straight-through): its packed values.
        tokens_NL: blocks of text, at least `settings.samples`.
        kept: where each block is kept once it is trained; those that are there already are taken as they are.
        report: called after every block with its number, how many there are, and the error before and after.

    Returns:
        For each block, the relative error of its output before and after.
    """
    batches = list(tokens_NL[: settings.samples].split(settings.batch))
    device = training_device()
    names = blocks_of(teacher, {name: teacher.get_submodule(name) for name in linears})
    if kept is not None and (done := kept.load_all(model, names)) is not None:
        return done
    errors = []
    with (
        computing_in(model, device, compute_dtype(precision, device)) as trained,
        computing_in(teacher, device, compute_dtype(precision, device)),
        plain_attention(model, tokens_NL.shape[1]),
        plain_attention(teacher, tokens_NL.shape[1]),
    ):
        with torch.no_grad():
            recorded = [calls_of_blocks(teacher, list(names.values()), batch) for batch in batches]
        sparse = dense = [hidden for hidden, _ in recorded]
        for index, (name, dense_block) in enumerate(names.items()):
            block, own = model.get_submodule(name), [calls[index] for _, calls in recorded]
            with torch.no_grad():
                dense = [call.run(dense_block, hidden) for call, hidden in zip(own, dense, strict=True)]
            inside = {linear: module for linear, module in linears.items() if linear.startswith(name + ".")}
            found = None if kept is None else kept.load(name, block)
            if found is not None:
                (start, end), changed = found
                _, sparse = _outputs(block, own, sparse, dense)
                trained.update(changed)
                errors.append((start, end))
                continue
            entries = _entries(name, block, inside, masks, grids or {})
            given = sparse
            start, sparse = _outputs(block, own, given, dense)
            end = start
            if inside:
                before = [entry.parameter.detach().clone() for entry in entries]
                _train(block, entries, own, given, dense, settings)
                end, sparse = _outputs(block, own, given, dense)
                if not end <= start:
                    log.warning("%s came out worse and is left as it was; lower reconstruction's learning_rate", name)
                    for entry, values in zip(entries, before, strict=True):
                        entry.parameter.data.copy_(values)
                    end, sparse = _outputs(block, own, given, dense)
                trained.update(entry.parameter for entry in entries)
            if kept is not None:
                kept.save(name, block, [entry.parameter for entry in entries if inside], (start, end))
            errors.append((start, end))
            if report is not None:
                report(index + 1, len(names), {"before": start, "after": end})
    return errors


@dataclass(frozen=True)
class KeptBlocks:
    """Trained blocks on disk, a file each, whole or not at all: a run that is killed goes on with the next block.

    Args:
        identity: of everything that decides what comes out; files of another are not looked at.
    """

    folder: Path
    identity: str

    def save(self, name: str, block: nn.Module, trained: Collection[nn.Parameter], errors: tuple[float, float]) -> None:
        """Keep what was trained of a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = {id(parameter) for parameter in trained}
        tensors = {key: p.detach().cpu().contiguous() for key, p in block.named_parameters() if id(p) in wanted}
        scratch = self._file(name).with_suffix(".part")
        save_file(tensors, scratch, metadata={"identity": self.identity, "errors": json.dumps(errors)})
        sync(scratch)
        os.replace(scratch, self._file(name))

    @torch.no_grad()
    def load(self, name: str, block: nn.Module) -> tuple[tuple[float, float], list[nn.Parameter]] | None:
        """Put a block's parameters back; its errors before and after, and which they are. None where none is kept."""
        if not self._holds(name):
            return None
        with safe_open(self._file(name), framework="pt") as file:
            changed = []
            for key in file.keys():  # noqa: SIM118 (no mapping)
                changed.append(block.get_parameter(key))
                changed[-1].copy_(file.get_tensor(key))
            start, end = json.loads(file.metadata()["errors"])
        return (start, end), changed

    def load_all(self, model: nn.Module, names: Iterable[str]) -> list[tuple[float, float]] | None:
        """Put all blocks back and give their errors, where every one is kept."""
        if not all(self._holds(name) for name in names):
            return None
        found = [self.load(name, model.get_submodule(name)) for name in names]
        return [errors for errors, _ in filter(None, found)]

    def _holds(self, name: str) -> bool:
        if not self._file(name).is_file():
            return False
        with safe_open(self._file(name), framework="pt") as file:
            return bool(file.metadata()["identity"] == self.identity)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def computing_in(net: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[set[Tensor]]:
    """Inside, parameters lie on `device` in `dtype`; buffers keep theirs, for rotary frequencies must not be rounded.

    Afterwards those put into the set given are as they became, and all others as they were, to the bit.
    """
    trained: set[Tensor] = set()
    parameters = {parameter: parameter.data for parameter in net.parameters()}
    buffers = {buffer: buffer.device for buffer in net.buffers()}
    net.eval().requires_grad_(False)
    for parameter, data in parameters.items():
        parameter.data = data.to(device, dtype)
    for buffer in buffers:
        buffer.data = buffer.data.to(device)
    try:
        yield trained
    finally:
        for parameter, data in parameters.items():
            parameter.data = parameter.data.to(data.device, data.dtype) if parameter in trained else data
        for buffer, home in buffers.items():
            buffer.data = buffer.data.to(home)
        net.requires_grad_(True)


def _entries(
    prefix: str,
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    grids: Mapping[str, Transform],
) -> list[Trained]:
    """The sparse weights of a block and whatever else of it trains: norms and biases, not its dense linears."""
    sparse = {id(module.weight): name for name, module in linears.items()}
    entries = [
        train_linear(name, module, masks[name].to(weight_of(module).device, copy=True).contiguous(), _ADAM)
        for name, module in linears.items()
    ]
    for entry in entries:
        entry.transform = grids.get(entry.name)
        entry.publish()
    others = [(name, p) for name, p in block.named_parameters() if id(p) not in sparse and p.dim() == 1]
    return entries + [train_dense(f"{prefix}.{name}", parameter, _ADAM) for name, parameter in others]


def _train(
    block: nn.Module,
    entries: list[Trained],
    calls: list[BlockCall],
    inputs: list[Tensor],
    targets: list[Tensor],
    settings: ReconstructionSettings,
) -> None:
    alone, total = Distribution(), settings.passes * len(calls)
    sizes = [max(float(entry.masked().square().mean().sqrt()), _LEAST) for entry in entries]
    for entry in entries:
        entry.parameter.requires_grad_(True)
    step = 0
    for number in range(settings.passes):
        for place in torch.randperm(len(calls), generator=torch.Generator().manual_seed(number)).tolist():
            _relative(calls[place].run(block, inputs[place]), targets[place]).backward()
            for entry in entries:
                entry.take_gradient(several=False)
            norm = alone.gradient_norm(entries)
            rate = learning_rate((step + 0.5) / total, settings.learning_rate, settings.warmup, 0.0)
            step += 1
            scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
            for entry, size in zip(entries, sizes, strict=True):
                adam_steps([entry], _ADAM, step=step, rate=rate * size, decay=0.0, scale=scale)
    for entry in entries:
        entry.parameter.requires_grad_(False)


def _relative(output: Tensor, target: Tensor) -> Tensor:
    """Squared error as a share of the target's energy [..., H], in fp32: the mean over tokens."""
    target = target.float()
    energy = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - target).square().sum(-1) / energy).mean()


@torch.no_grad()
def _outputs(
    block: nn.Module, calls: list[BlockCall], inputs: list[Tensor], targets: list[Tensor]
) -> tuple[float, list[Tensor]]:
    """Mean relative error of a block's outputs, and the outputs."""
    outputs = [call.run(block, hidden) for call, hidden in zip(calls, inputs, strict=True)]
    shares = [float(_relative(output, target)) for output, target in zip(outputs, targets, strict=True)]
    return sum(shares) / len(shares), outputs
