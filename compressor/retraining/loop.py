"""The training loop: batches in, one optimiser step at a time, watched, bounded and resumable.

The loop knows nothing of a method but three moments: before a step, at the update, and at the end. Weights, moments and
masks are fp32 and bool; the model itself runs in bf16 where the processor multiplies bf16 in hardware. Dropout is
off: at these budgets a compressed model has nothing to overfit with.

"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.low_rank import LowRankBranch
from compressor.retraining.objective import Objective
from compressor.retraining.optimizers import Trained, gradient_norm
from compressor.retraining.schedules import Plan, learning_rate
from compressor.retraining.snapshots import Snapshots

log = logging.getLogger(__name__)

Progress = Callable[[int, int, Mapping[str, float]], None]
PRECISIONS = ("auto", "fp32", "bf16")

# Up to this many tokens in a block, plain attention is faster on a CPU than the fused kernel, whose backward is slow.
_SHORT_BLOCK = 512


@dataclass(frozen=True)
class LoopSettings:
    """What every method shares. Shares are of the budget.

    The defaults are for budgets of minutes, where steps are scarcer than tokens: from the same start, 24 steps of 512
    tokens did about what 20 steps of 1,024 did. Raise `batch` with the budget (the paper: 128 blocks of 1,024 tokens).

    Args:
        batch: blocks per optimiser step, run `micro_batch` at a time (all at once when None).
        kl_weight: a in a*KL + (1-a)*CE; 0 needs no teacher.
        quantize_share: the last share of the budget, in which the forward sees the packed values.
        train: "blocks" (sparse weights, norms, biases) or "all" (embeddings and head too).
        checkpoint_minutes: between snapshots of the run, when there is a work folder.
    """

    learning_rate: float = 3e-4
    final_rate: float = 0.0
    warmup: float = 0.05
    batch: int = 2
    micro_batch: int | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    kl_weight: float = 1.0
    temperature: float = 1.0
    quantize_share: float = 0.0
    train: str = "blocks"
    precision: str = "auto"
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} given; accepted are {', '.join(PRECISIONS)}")
        if self.train not in ("blocks", "all"):
            raise ValueError(f"train {self.train!r} given; accepted are blocks, all")
        if self.batch < 1 or (self.micro_batch is not None and self.batch % self.micro_batch):
            raise ValueError(f"batch {self.batch} must be a multiple of micro_batch {self.micro_batch}")
        if not 0 <= self.kl_weight <= 1 or self.temperature <= 0:
            raise ValueError("kl_weight must lie in [0, 1] and temperature be above 0")
        if not 0 <= self.warmup < 1 or not 0 <= self.quantize_share < 1:
            raise ValueError("warmup and quantize_share are shares of the budget, in [0, 1)")


class Method(Protocol):
    """What differs from method to method."""

    branches: dict[str, LowRankBranch]
    """Low-rank branches trained beside the sparse weights, by linear."""

    @property
    def trained(self) -> list[Trained]: ...

    def before_step(self, step: int) -> dict[str, float]: ...

    def update(self, step: int, progress: float, rate: float, scale: float) -> dict[str, float]: ...

    def weights(self) -> dict[str, Tensor]: ...

    def quantize_from(self, weights: Mapping[str, Tensor]) -> None: ...

    def finish(self) -> None: ...

    def detach(self) -> None: ...


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite; raised before the weights are touched."""


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
    step: int = 0
    quantized: bool = False
    trained_tokens: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def train(self) -> None:
        """From the newest snapshot, or the start, to the end of the budget."""
        self._resume()
        saved = time.monotonic()
        while not self.plan.done(self.step):
            started = time.monotonic()
            if not self.quantized and self._in_quantized_share():
                self._start_quantized()
            self._one_step(started)
            due = time.monotonic() - saved >= 60 * self.settings.checkpoint_minutes
            if self.snapshots is not None and due and not self.plan.done(self.step):
                self._save()
                saved = time.monotonic()

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

    def _one_step(self, started: float) -> None:
        settings, step = self.settings, self.step
        metrics = self.method.before_step(step)
        examples = self._examples_of(step)
        loss = self._forward_backward(examples)
        norm = gradient_norm(self.method.trained)
        if not math.isfinite(loss["total"]) or not math.isfinite(norm):
            raise NonFiniteError(
                f"loss {loss['total']}, gradient norm {norm} at step {step}, examples {examples.tolist()}: stopped "
                "before the update; lower learning_rate, or look at that text"
            )
        progress = self.plan.progress(step + 0.5)
        rate = learning_rate(progress, settings.learning_rate, settings.warmup, settings.final_rate)
        scale = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip else 1.0
        metrics |= self.method.update(step, progress, rate, scale)
        self.step += 1
        self.trained_tokens += examples.numel() * self.objective.tokens
        self._report(step, started, {**loss, "gradient_norm": norm, "learning_rate": rate, **metrics})

    def _report(self, step: int, started: float, metrics: dict[str, float]) -> None:
        seconds = time.monotonic() - started
        self.plan.took(step, seconds)
        tokens = self.settings.batch * self.objective.tokens
        metrics |= {"tokens": self.trained_tokens, "tokens_per_second": tokens / seconds}
        self.last = {**self.last, **metrics}
        if self.metrics_file is not None:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps({"step": self.step, **metrics}) + "\n")
        if self.progress is not None:
            self.progress(self.step, self.plan.total, metrics)

    def _forward_backward(self, examples: Tensor) -> dict[str, float]:
        """Gradients of one step's loss, moved onto the trained entries."""
        parts = examples.split(self.settings.micro_batch or self.settings.batch)
        found: list[dict[str, float]] = []
        for part in parts:
            found.append(self.objective.backward(self.model, part, 1.0 / len(parts)))
            if not math.isfinite(found[-1]["total"]):
                return found[-1]
            for entry in self.method.trained:
                entry.take_gradient(several=len(parts) > 1)
        return {name: fmean(metrics[name] for metrics in found) for name in found[0]}

    def _examples_of(self, step: int) -> Tensor:
        """Numbers of a step's examples: a new order for every pass over them, from the seed alone."""
        first = step * self.settings.batch
        count = self.objective.count
        places = range(first, first + self.settings.batch)
        orders = {epoch: self._order(epoch, count) for epoch in {place // count for place in places}}
        return torch.stack([orders[place // count][place % count] for place in places])

    def _order(self, epoch: int, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch))

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor for entry in self.method.trained for name, tensor in entry.state().items()}

    def _save(self) -> None:
        assert self.snapshots is not None
        record = {
            "plan": self.plan.state(),
            "trained_tokens": self.trained_tokens,
            "quantized": self.quantized,
        }
        self.snapshots.save(self.step, self._state(), record)

    def _resume(self) -> None:
        manifest = None if self.snapshots is None else self.snapshots.latest()
        _cut_metrics(self.metrics_file, 0 if manifest is None else manifest["step"])
        if manifest is None or self.snapshots is None:
            return
        self.snapshots.restore(self._state())
        for entry in self.method.trained:
            entry.publish()
        self.quantized = manifest["quantized"]
        if self.quantized:
            self.method.quantize_from(self.snapshots.load_weights())
        self.step, self.trained_tokens = manifest["step"], manifest["trained_tokens"]
        for name, value in manifest["plan"].items():
            setattr(self.plan, name, value)
        log.info("going on from step %d of %d", self.step, self.plan.total)


def _cut_metrics(file: Path | None, steps: int) -> None:
    """Drop the lines of steps that will be run again."""
    if file is not None and file.exists():
        lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
        file.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= steps))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 where the processor multiplies it in hardware, else fp32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


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


def identity_of(model: nn.Module, masks: Mapping[str, Tensor], objective: Objective, record: Mapping[str, Any]) -> str:
    """Hash of everything that decides a run's result: weights, masks, examples, settings and budget."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode())
    tensors = {**dict(model.state_dict()), **{f"{name}/mask": mask for name, mask in masks.items()}}
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    for tensor in objective.identity():
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
