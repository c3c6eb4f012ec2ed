"""The training loop: batches in, one optimiser step at a time, watched, bounded and resumable.

The loop knows nothing of a method but three moments: before a step, at the update, and at the end. Weights, moments and
masks are fp32 and bool; the model itself runs in bf16 where the processor multiplies bf16 in hardware. Dropout is
off: at these budgets a compressed model has nothing to overfit with.

"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.masks import MaskShape
from compressor.precision import PRECISIONS
from compressor.retraining.distribution import STRATEGIES, Distribution
from compressor.retraining.objective import Objective
from compressor.retraining.optimizers import Trained
from compressor.retraining.rollback import DivergedError, Guard
from compressor.retraining.schedules import SCHEDULES, Plan, learning_rate
from compressor.retraining.snapshots import Snapshots
from compressor.retraining.teacher_cache import KINDS

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float]], None]

# Batches that are sorted by length together.
_POOL = 32
# Up to this many tokens in a block, plain attention is faster on a CPU than the fused kernel, whose backward is slow.
_SHORT_BLOCK = 512

_RATE_CUT = 0.5
# A snapshot is written at most so often that it takes a twentieth of the time between two.
_CHECKPOINT_SHARE = 20.0


@dataclass(frozen=True)
class LoopSettings:
    """What every method shares. Shares are of the budget.

    The defaults are for budgets of minutes, where steps are scarcer than tokens: after 100,000 tokens of SmolLM2-135M,
    400 steps of 256 tokens left a loss of 4.32 where 200 of 512 left 4.35 (benchmarks/results/retraining.json). Raise
    `batch` with the budget (the paper: 128 blocks of 1,024 tokens).

    Args:
        final_rate: what the schedule ("cosine", "linear", "constant") falls to, times learning_rate; over the last
            share `cooldown` it then goes linearly to 0.
        batch: blocks per optimiser step, run `micro_batch` at a time (all at once when None).
        kl_weight: a in a*KL + (1-a)*CE; 0 needs no teacher.
        distill: "kl", or "hidden" for the squared error of the blocks' outputs in its place.
        teacher_cache: what is kept on disk of the teacher, for the next student on the same text: "off", "hidden" (its
            last hidden states, exact) or "top-k" (its `teacher_top_k` most likely tokens, smaller).
        hidden_weight: of the squared error of the blocks' outputs, as a share of the teacher's, beside KL and CE.
        quantize_share: the last share of the budget, in which the forward sees the packed values.
        train: "blocks" (sparse weights, norms, biases) or "all" (embeddings and head too).
        checkpoint_minutes: between snapshots of the run, when there is a work folder; more where writing one takes
            over 5 % of that.
        rollbacks: how often a run whose loss is not finite or explodes goes back to a snapshot, each time at half the
            rate, before it stops.
        explosion: three losses in a row are bad above so many times the median of the steps before; 0 turns that off.
        seed: of the order of the examples; None: the recipe's, or 0.
        distribution: "ddp" or "fsdp" where a launcher started several processes; "auto": as the launcher was told.
        checkpoint_activations: compute each block again in the backward pass instead of keeping what is inside it.
    """

    learning_rate: float = 3e-4
    final_rate: float = 0.0
    warmup: float = 0.05
    schedule: str = "cosine"
    cooldown: float = 0.0
    batch: int = 1
    micro_batch: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    kl_weight: float = 0.5
    temperature: float = 1.0
    distill: str = "kl"
    hidden_weight: float = 0.0
    teacher_cache: str = "off"
    teacher_top_k: int = 64
    quantize_share: float = 0.0
    train: str = "blocks"
    precision: str = "auto"
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    rollbacks: int = 3
    explosion: float = 3.0
    distribution: str = "auto"
    checkpoint_activations: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} given; accepted are {', '.join(PRECISIONS)}")
        if self.train not in ("blocks", "all"):
            raise ValueError(f"train {self.train!r} given; accepted are blocks, all")
        if self.distribution not in STRATEGIES:
            raise ValueError(f"distribution {self.distribution!r} given; accepted are {', '.join(STRATEGIES)}")
        if self.teacher_cache not in KINDS or self.teacher_top_k < 1:
            raise ValueError(f"teacher_cache {self.teacher_cache!r} given; accepted are {', '.join(KINDS)}")
        if self.learning_rate <= 0 or self.final_rate < 0 or self.eps <= 0 or self.weight_decay < 0 or self.clip < 0:
            raise ValueError("learning_rate and eps must be above 0; final_rate, weight_decay and clip not below")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1 {self.beta1} and beta2 {self.beta2} given; they must lie in [0, 1)")
        if self.rollbacks < 0 or self.explosion < 0 or self.keep_checkpoints < 1:
            raise ValueError("rollbacks and explosion must not be negative, keep_checkpoints be at least 1")
        if self.batch < 1 or (self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch)):
            raise ValueError(f"batch {self.batch} must be a multiple of micro_batch {self.micro_batch}")
        if not 0 <= self.kl_weight <= 1 or self.temperature <= 0 or self.hidden_weight < 0:
            raise ValueError("kl_weight must lie in [0, 1], temperature be above 0 and hidden_weight not below")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} given; accepted are {', '.join(SCHEDULES)}")
        if min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown >= 1 or not 0 <= self.quantize_share < 1:
            raise ValueError("warmup, cooldown and quantize_share are shares of the budget, in [0, 1)")


def check_spread(
    spread: Distribution, settings: LoopSettings, shapes: Iterable[MaskShape] = (), *, for_task: bool = False
) -> None:
    """Raises ValueError where the processes of a launcher cannot share a run."""
    spread.micro_batch(settings.batch, settings.micro_batch)
    if not spread.sharded:
        return
    if for_task:
        raise ValueError("fine-tuning for a task is not sharded: give loop.distribution=ddp, or one process")
    if settings.quantize_share:
        raise ValueError("quantize_share needs all rows of a weight, which fsdp divides; use ddp, or quantize_share 0")
    whole = next((shape for shape in shapes if not shape.by_row), None)
    if whole is not None:
        raise ValueError(f"a {whole} mask compares weights of the whole layer, which fsdp divides; use ddp")


class Method(Protocol):
    """What differs from method to method."""

    @property
    def trained(self) -> list[Trained]: ...

    def before_step(self, step: int) -> dict[str, float]: ...

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]: ...

    def weights(self) -> dict[str, Tensor]: ...

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None: ...

    def finish(self) -> None: ...

    def detach(self) -> None: ...


@dataclass
class Run:
    """One training run in progress."""

    model: nn.Module
    objective: Objective
    method: Method
    settings: LoopSettings
    plan: Plan
    snapshots: Snapshots | None = None
    metrics_file: Path | None = None
    progress: Progress | None = None
    distribution: Distribution = field(default_factory=Distribution)
    step: int = 0
    quantized: bool = False
    trained_tokens: int = 0
    last: dict[str, float] = field(default_factory=dict)
    guard: Guard = field(init=False)
    _orders: dict[int, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        record = None if self.snapshots is None else self.snapshots.folder / "rollbacks.json"
        self.guard = Guard(
            self.settings.explosion, self.settings.rollbacks, _RATE_CUT, record, writes=self.distribution.main
        )

    def train(self) -> None:
        """From the newest snapshot, or the start, to the end of the budget."""
        self._resume()
        if self.snapshots is not None and self.step == 0:
            self._save()
        resumed = self.step
        saved, pause = time.monotonic(), 60 * self.settings.checkpoint_minutes
        while not self.plan.done(self.step):
            started = time.monotonic()
            if not self.quantized and self._in_quantized_share():
                self._start_quantized()
            try:
                self._one_step(started)
            except DivergedError as error:
                self._go_back(error)
                continue
            due = self.distribution.slowest(time.monotonic() - saved) >= pause
            if self.snapshots is not None and due and not self.plan.done(self.step):
                began = time.monotonic()
                self._save()
                saved = time.monotonic()
                pause = max(pause, _CHECKPOINT_SHARE * self.distribution.slowest(saved - began))
        self.distribution.check_masks(self.method.trained)
        if self.snapshots is not None and self.step > resumed:
            self._save()  # what comes after may be killed too, and must not cost the whole run

    def _go_back(self, error: DivergedError) -> None:
        """Take up the last good snapshot at a lower rate."""
        snapshots = self.snapshots
        manifest = None if snapshots is None else snapshots.latest()
        older = self.guard.record(error, self.step, manifest)
        assert snapshots is not None and manifest is not None
        if older and len(snapshots.steps()) > 1 and not manifest["quantized"]:
            snapshots.drop_newest()
        for entry in self.method.trained:
            entry.gradient = None
        spent = self.plan.spent_seconds
        self._resume()
        self.plan.spent_seconds = spent
        log.warning("%s: back to step %d at %g of the rate", error, self.step, self.guard.rate_factor)

    def _in_quantized_share(self) -> bool:
        share = self.settings.quantize_share
        return share > 0 and self.plan.progress(self.step) >= 1.0 - share

    def _start_quantized(self) -> None:
        """Fix the packed grids to the weights as they are now; a resumed run must find the very same grids."""
        weights = self.method.weights()
        if self.snapshots is not None:
            self.snapshots.save_weights(weights)
        self.method.quantize_from(weights)
        self.quantized = True
        if self.snapshots is not None:
            self._save()  # going back must not cross this point

    def _one_step(self, started: float) -> None:
        settings, step = self.settings, self.step
        metrics = self.method.before_step(step)
        examples = self._examples_of(step)
        loss = self.distribution.mean(self._forward_backward(examples))
        self.distribution.average_gradients(self.method.trained)
        norm = self.distribution.gradient_norm(self.method.trained)
        self.guard.check(step, loss["total"], norm, examples.tolist())
        progress = self.plan.progress(step + 0.5)
        rate = self.guard.rate_factor * learning_rate(
            progress,
            settings.learning_rate,
            settings.warmup,
            settings.final_rate,
            settings.schedule,
            settings.cooldown,
        )
        scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        metrics |= self.method.update(step, progress, rate, scale)
        self.step += 1
        self.trained_tokens += examples.numel() * self.objective.tokens
        self._report(step, started, {**loss, "gradient_norm": norm, "learning_rate": rate, **metrics})

    def _report(self, step: int, started: float, metrics: dict[str, float]) -> None:
        seconds = self.distribution.slowest(time.monotonic() - started)
        self.plan.took(step, seconds)
        tokens = self.settings.batch * self.objective.tokens
        metrics |= {"tokens": self.trained_tokens, "tokens_per_second": tokens / seconds}
        self.last = {**self.last, **metrics}
        if self.metrics_file is not None and self.distribution.main:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        if self.progress is not None and self.distribution.main:
            self.progress(self.step, self.plan.total, metrics)

    def _forward_backward(self, examples: Tensor) -> dict[str, float]:
        """Gradients of one step's loss, moved onto the trained entries."""
        share = self.distribution.micro_batch(self.settings.batch, self.settings.micro_batch)
        everyones = list(examples.split(share))
        terms = sum(self.objective.size(part) for part in everyones)
        parts, means = self.distribution.own(everyones), Counter[str]()
        for part in parts:
            weight = self.distribution.world * self.objective.size(part) / terms  # processes are averaged afterwards
            found = self.objective.backward(self.model, part, weight)
            means.update({name: value * weight for name, value in found.items()})
            for entry in self.method.trained:
                entry.take_gradient(several=len(parts) > 1)
        return dict(means)

    def _examples_of(self, step: int) -> Tensor:
        """Numbers of a step's examples: a new order for every pass over them, from the seed alone."""
        first = step * self.settings.batch
        count = self.objective.count
        places = range(first, first + self.settings.batch)
        orders = {epoch: self._order(epoch, count) for epoch in {place // count for place in places}}
        return torch.stack([orders[place // count][place % count] for place in places])

    def _order(self, epoch: int, count: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {epoch: self._new_order(epoch, count)}
        return self._orders[epoch]

    def _new_order(self, epoch: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.settings.seed or 0) * 100_003 + epoch)
        order = torch.randperm(count, generator=generator)
        lengths = self.objective.lengths
        return order if lengths is None else by_length(order, torch.tensor(lengths), self.settings.batch, generator)

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor for entry in self.method.trained for name, tensor in entry.state().items()}

    def _save(self) -> None:
        assert self.snapshots is not None
        record = {
            "plan": self.plan.state(),
            "trained_tokens": self.trained_tokens,
            "quantized": self.quantized,
            "losses": self.guard.losses,
            "last": self.last,
        }
        self.distribution.check_masks(self.method.trained)
        self.snapshots.save(self.step, self._state(), record)

    def _resume(self) -> None:
        manifest = None if self.snapshots is None else self.snapshots.latest()
        if self.distribution.main:
            _cut_metrics(self.metrics_file, 0 if manifest is None else manifest["step"])
        if manifest is None or self.snapshots is None:
            return
        self.snapshots.restore(self._state())
        for entry in self.method.trained:
            entry.publish()
        self.quantized = manifest["quantized"]
        if self.quantized:
            self.method.quantize_from(self.snapshots.load_weights(next(self.model.parameters()).device))
        self.step, self.trained_tokens = manifest["step"], manifest["trained_tokens"]
        self.guard.losses, self.last = manifest["losses"], manifest.get("last", {})  # older snapshots have none
        for name, value in manifest["plan"].items():
            setattr(self.plan, name, value)
        log.info("going on from step %d of %d", self.step, self.plan.total)


def by_length(order: Tensor, lengths: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """An order in which the examples of a batch are about as long: pools of many batches, each sorted, then its batches
    shuffled. So little is padded, and which examples meet still changes from pass to pass.
    """
    batches: list[Tensor] = []
    for pool in order.split(batch * _POOL):
        *found, last = pool[lengths[pool].argsort(stable=True)].split(batch)
        whole = [*found, last] if len(last) == batch else found
        batches += [whole[place] for place in torch.randperm(len(whole), generator=generator)]
    rest = [] if len(last) == batch else [last]  # of the last pool: a short batch inside would shift those after it
    return torch.cat([*batches, *rest])


def _cut_metrics(file: Path | None, steps: int) -> None:
    """Drop the lines of steps that will be run again."""
    if file is not None and file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))


def training_device() -> torch.device:
    """This process's accelerator, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def checkpointed(blocks: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Keep of each block only what goes in, and compute the rest again in the backward pass."""
    if not wanted:
        yield
        return
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def plain_attention(model: nn.Module, length: int) -> Iterator[None]:
    """Use plain attention for short blocks on a CPU, and put back what was there."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if before != "sdpa" or not on_cpu or length > _SHORT_BLOCK:
        yield
        return
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]


def identity_of(
    model: nn.Module, masks: Mapping[str, Tensor], examples: Iterable[Tensor], record: Mapping[str, Any]
) -> str:
    """Hash of everything that decides a run's result: weights, masks, examples, settings and budget."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode())
    tensors = {**dict(model.state_dict()), **{f"{name}/mask": mask for name, mask in masks.items()}}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    for tensor in examples:
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
