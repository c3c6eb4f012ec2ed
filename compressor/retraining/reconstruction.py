"""Layer-wise reconstruction: block after block learns to give the dense block's output, before end-to-end distillation.

Block number i of the sparse model is run on what the sparse blocks before it give, and trained towards what the dense
block gives on what the dense blocks before give, so each also makes up for the errors of those before it:

    min  || block(x_sparse) - block_dense(x_dense) ||^2 / || block_dense(x_dense) ||^2

No head, no teacher pass for the whole depth, one block's activations at a time: a pass over the text costs about
half of a pass of distillation, and memory is bounded by the hidden states of the samples.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.calibration import BlockCall, blocks_of, calls_of_blocks, weight_of
from compressor.retraining.distribution import Distribution
from compressor.retraining.loop import compute_dtype, training_device
from compressor.retraining.optimizers import AdamSettings, Trained, adam_steps, train_dense, train_linear
from compressor.retraining.schedules import learning_rate

log = logging.getLogger(__name__)

Report = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class ReconstructionSettings:
    """How each block is trained.

    Args:
        samples: blocks of text, `batch` at a time.
        passes: over the samples.
    """

    samples: int = 32
    passes: int = 4
    batch: int = 2
    learning_rate: float = 3e-4
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if min(self.samples, self.passes, self.batch) < 1 or self.learning_rate <= 0:
            raise ValueError("samples, passes, batch and learning_rate of reconstruction must be above 0")


def reconstruct(
    model: nn.Module,
    teacher: nn.Module,
    linears: Mapping[str, nn.Module],
    masks: Mapping[str, Tensor],
    tokens_NL: Tensor,
    settings: ReconstructionSettings,
    *,
    precision: str = "auto",
    report: Report | None = None,
) -> list[tuple[float, float]]:
    """Train the blocks of a pruned model in place; masks stay as they are.

    Args:
        linears: the sparse linears by name; `masks` [O, I] under the same names.
        tokens_NL: blocks of text, at least `settings.samples`.
        report: called after every block with its number, how many there are, and the error before and after.

    Returns:
        For each block, the relative error of its output before and after.
    """
    batches = list(tokens_NL[: settings.samples].split(settings.batch))
    before, home, device = next(model.parameters()).dtype, next(model.parameters()).device, training_device()
    dtype = compute_dtype(precision, device)
    for net in (model, teacher):
        net.eval().requires_grad_(False).to(device, dtype)
    names = blocks_of(teacher, {name: teacher.get_submodule(name) for name in linears})
    with torch.no_grad():
        recorded = [calls_of_blocks(teacher, list(names.values()), batch) for batch in batches]
    sparse = dense = [hidden for hidden, _ in recorded]
    errors = []
    for index, (name, dense_block) in enumerate(names.items()):
        block, own = model.get_submodule(name), [calls[index] for _, calls in recorded]
        with torch.no_grad():
            dense = [call.run(dense_block, hidden) for call, hidden in zip(own, dense, strict=True)]
        inside = {linear: module for linear, module in linears.items() if linear.startswith(name + ".")}
        entries = _entries(name, block, inside, masks)
        start = _error(block, own, sparse, dense)
        if inside:
            _train(block, entries, own, sparse, dense, settings)
        with torch.no_grad():
            errors.append((start, _error(block, own, sparse, dense)))
            sparse = [call.run(block, hidden) for call, hidden in zip(own, sparse, strict=True)]
        if report is not None:
            report(index + 1, len(names), {"before": errors[-1][0], "after": errors[-1][1]})
    for net in (model, teacher):
        net.to(home, before).requires_grad_(True)
    return errors


def _entries(
    prefix: str, block: nn.Module, linears: Mapping[str, nn.Module], masks: Mapping[str, Tensor]
) -> list[Trained]:
    """The sparse weights of a block and whatever else of it trains: norms and biases, not its dense linears."""
    adam = AdamSettings()
    sparse = {id(module.weight): name for name, module in linears.items()}
    entries = [
        train_linear(name, module, masks[name].to(weight_of(module).device, copy=True), adam)
        for name, module in linears.items()
    ]
    for entry in entries:
        entry.publish()
    others = [(name, p) for name, p in block.named_parameters() if id(p) not in sparse and p.dim() == 1]
    return entries + [train_dense(f"{prefix}.{name}", parameter, adam) for name, parameter in others]


def _train(
    block: nn.Module,
    entries: list[Trained],
    calls: list[BlockCall],
    inputs: list[Tensor],
    targets: list[Tensor],
    settings: ReconstructionSettings,
) -> None:
    adam, alone, total = AdamSettings(), Distribution(), settings.passes * len(calls)
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
            adam_steps(entries, adam, step=step, rate=rate, decay=0.0, scale=min(1.0, settings.clip / (norm + 1e-6)))
    for entry in entries:
        entry.parameter.requires_grad_(False)


def _relative(output: Tensor, target: Tensor) -> Tensor:
    """Squared error as a share of the target's energy, in fp32."""
    target = target.float()
    return (output.float() - target).square().sum() / target.square().sum()


@torch.no_grad()
def _error(block: nn.Module, calls: Iterable[BlockCall], inputs: list[Tensor], targets: list[Tensor]) -> float:
    pairs = zip(calls, inputs, targets, strict=True)
    shares = [float(_relative(call.run(block, hidden), target)) for call, hidden, target in pairs]
    return sum(shares) / len(shares)
