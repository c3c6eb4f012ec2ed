"""A run spread over processes, as `torchrun` or `accelerate launch` start them.

    ddp    every process holds all; gradients are averaged. Each does the same update, so masks stay the same: they are
           compared at every snapshot and at the end, and a difference raises.
    fsdp   blocks are sharded by FSDP2 along their rows: a process holds, updates and masks its rows of every weight,
           fp32 master and moments included. Groups of n:m lie inside rows, so every mask is chosen locally.
           Embeddings, head and low-rank branches are replicated as under ddp.

Processes share the file system of the work folder. Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from compressor import kernels
from compressor.calibration import is_conv1d
from compressor.kernels.training import sum_squares
from compressor.retraining.optimizers import Trained
from compressor.retraining.shards import is_sharded

STRATEGIES = ("auto", "ddp", "fsdp")
_BUCKET_BYTES = 25 << 20
# The others wait while the first downloads a model or rebuilds its blocks; one that dies is noticed all the same.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Distribution:
    """Which process this is, and how the model is spread."""

    rank: int = 0
    world: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def micro_batch(self, batch: int, wanted: int | None) -> int:
        """Examples of a batch that run at a time.

        Raises:
            ValueError: they cannot be shared out evenly.
        """
        size = wanted or max(1, batch // self.world)
        if batch % (size * self.world):
            raise ValueError(
                f"a batch of {batch} in micro-batches of {size} cannot be shared by {self.world} processes; give a "
                "batch that is a multiple of micro_batch times the processes"
            )
        return size

    def own(self, parts: list[Tensor]) -> list[Tensor]:
        """The micro-batches of this process."""
        return parts[self.rank :: self.world]

    def average_gradients(self, entries: Iterable[Trained]) -> None:
        """Of what every process holds whole; FSDP2 has averaged what it sharded."""
        if self.world == 1:
            return
        bucket: list[Trained] = []
        size = 0
        for entry in entries:
            if entry.gradient is None or is_sharded(entry.parameter):
                continue
            entry.gradient = entry.gradient.contiguous()
            if bucket and (size > _BUCKET_BYTES or entry.gradient.dtype != bucket[0].gradient.dtype):  # type: ignore[union-attr]
                _average(bucket, self.world)
                bucket, size = [], 0
            bucket.append(entry)
            size += entry.gradient.nbytes
        if bucket:
            _average(bucket, self.world)

    def gradient_norm(self, entries: Iterable[Trained]) -> float:
        """L2 norm over all gradients, those of other processes' shards included; NaN anywhere shows in it."""
        sums = {True: [torch.zeros(())], False: [torch.zeros(())]}
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        for entry in entries:
            if entry.gradient is not None:
                found[is_sharded(entry.parameter)].append(entry.gradient)
        for sharded, gradients in found.items():
            if gradients:
                sums[sharded] += _norms(gradients)
        squares = {
            sharded: torch.stack([norm.to(norms[-1].device) for norm in norms]).square().sum()
            for sharded, norms in sums.items()
        }
        if self.sharded:
            dist.all_reduce(squares[True])
        return float((squares[True] + squares[False].to(squares[True].device)).sqrt())

    @torch.no_grad()
    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Every process goes on with the first one's values: what each has computed may differ in the last bits."""
        if self.world == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().to(_device()).contiguous()
            dist.broadcast(sent.view(torch.uint8) if sent.dtype is torch.bool else sent, 0)
            tensor.copy_(sent)

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of each metric over the processes."""
        if self.world == 1:
            return dict(metrics)
        values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=_device())
        dist.all_reduce(values)
        return dict(zip(metrics, (values / self.world).tolist(), strict=True))

    def slowest(self, seconds: float) -> float:
        """The most of any process, so that all plan alike."""
        if self.world == 1:
            return seconds
        value = torch.tensor(seconds, dtype=torch.float64, device=_device())
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return float(value)

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def check_masks(self, entries: Iterable[Trained]) -> None:
        """Raise when a mask has lost its weight, or processes that hold the same weights hold different masks."""
        digest = hashlib.sha256()
        for entry in entries:
            if entry.mask is not None and entry.mask.shape != entry.visible.shape:
                raise RuntimeError(
                    f"{entry.name}: mask of {tuple(entry.mask.shape)} beside a weight of {tuple(entry.visible.shape)}; "
                    "the weights cannot be trusted to be sparse"
                )
            for kind, tensor in entry.state().items():  # PST's masks are no weight's own
                if kind.endswith("/mask"):
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        if self.world == 1 or self.sharded:
            return
        digests: list[str | None] = [None] * self.world
        dist.all_gather_object(digests, digest.hexdigest())
        if len(set(digests)) > 1:
            raise RuntimeError(f"masks differ between processes ({digests}); stop, and go on from the last snapshot")


@cache
def join() -> tuple[int, int]:
    """(rank, world) of this process; joins the group that the launcher made."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return state.process_index, state.num_processes


def main_first() -> AbstractContextManager[None]:
    """Inside, the first process goes before the others: it downloads and converts, they find what it left."""
    if join()[1] == 1:
        return nullcontext()
    from accelerate import PartialState

    context: AbstractContextManager[None] = PartialState().main_process_first()
    return context


def leave() -> None:
    """Ends the group, once this process's work is done; nothing may be asked of it after.

    A thread of gloo's that still lets go of a tensor while Python ends aborts the process; ending the group ends them.
    A process that failed does without, and so does every one under NCCL: there, to end a group may mean to wait for
    the others, of whom the first goes on alone for long.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def distribution(strategy: str = "auto") -> Distribution:
    """How this process takes part; alone where nothing launched it."""
    rank, world = join()
    fsdp = strategy == "fsdp" or (strategy == "auto" and os.environ.get("ACCELERATE_USE_FSDP", "") == "true")
    return Distribution(rank, world, sharded=world > 1 and fsdp)


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Shard the parameters of the blocks over all processes, along rows as [O, I]."""
    for block in blocks:
        turned = {id(module.weight) for module in block.modules() if is_conv1d(module)}
        # Each block is a root of its own, and roots would keep all rows after a forward pass without gradients.
        fully_shard(block, reshard_after_forward=True, shard_placement_fn=partial(_placement, turned))


def _placement(turned: set[int], parameter: nn.Parameter) -> Shard:
    return Shard(1) if id(parameter) in turned else Shard(0)


def _norms(gradients: list[Tensor]) -> Iterable[Tensor]:
    if kernels.available() and gradients[0].device.type == "cpu":
        return [torch.tensor(sum_squares(gradient), dtype=torch.float32).sqrt() for gradient in gradients]
    return torch._foreach_norm(gradients, 2, dtype=torch.float32)


def _average(bucket: list[Trained], world: int) -> None:
    gradients = [entry.gradient for entry in bucket if entry.gradient is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
