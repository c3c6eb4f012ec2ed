"""Calibration: what a linear's inputs look like on real text.

`calibrate` runs the whole model and keeps one number per input feature. `calibrate_blocks` walks
the transformer blocks one at a time, so that a Hessian exists for one block only and a solver may change the
block's weights before the next block sees its output. Both accept nn.Linear and transformers' Conv1D, whose
weight is transposed; `weight_of` gives either as [O, I].

Shapes: O out_features, I in_features, T tokens of a batch, B x L token ids of a batch.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor.precision import widened

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass
class LayerStats:
    """Sums over the calibration tokens of one linear's input x [T, I]."""

    input_norm: Tensor  # [I] float32: L2 norm of each feature over all tokens
    tokens: int
    hessian: Tensor | None = None  # [I, I] float32: sum of x x^T, only when asked for

    def to_cpu(self) -> "LayerStats":
        """The same on the CPU."""
        return LayerStats(self.input_norm.cpu(), self.tokens, None if self.hessian is None else self.hessian.cpu())


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, whose weight is stored [I, O]; told by its name so that transformers is not imported."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """A linear's weight as [O, I], sharing memory with the module's parameter."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_conv1d(module) else weight


@dataclass
class _Sums:
    """Running sums of one input, and the input that was added last."""

    squares: Tensor
    gram: Tensor | None
    tokens: int = 0
    latest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.squares += x_TI.square().sum(dim=0)
        self.tokens += x_TI.shape[0]
        self.latest = x
        if self.gram is not None:
            self.gram.addmm_(x_TI.t(), x_TI)


@dataclass
class _Recorder:
    """Forward hooks that add up x^2, and x x^T on demand.

    Query, key and value read the same tensor: they share one record, so it is worked through and solved for once.
    """

    hessian: bool
    sums: dict[str, _Sums] = field(default_factory=dict)
    newest: _Sums | None = None

    @torch.no_grad()
    def add(self, name: str, x: Tensor) -> None:
        if name not in self.sums:
            shared = self.newest is not None and self.newest.latest is x
            self.sums[name] = self.newest if shared and self.newest is not None else self._empty(x)
        self.newest = self.sums[name]
        if self.newest.latest is not x:
            self.newest.add(x)

    def _empty(self, x: Tensor) -> _Sums:
        width, zeros = x.shape[-1], x.new_zeros
        gram = zeros(width, width, dtype=torch.float32) if self.hessian else None
        return _Sums(zeros(width, dtype=torch.float32), gram)

    def stats(self) -> dict[str, LayerStats]:
        """One LayerStats per input; linears that read the same one hold the same object."""
        records: dict[int, LayerStats] = {}
        for name, sums in self.sums.items():
            sums.latest = None
            if not bool(torch.isfinite(sums.squares).all()):
                raise ValueError(f"inputs of {name} are not finite on the calibration text; is the model intact?")
            records.setdefault(id(sums), LayerStats(sums.squares.sqrt(), sums.tokens, sums.gram))
        return {name: records[id(sums)] for name, sums in self.sums.items()}


@contextmanager
def _recording(linears: Mapping[str, nn.Module], hessian: bool) -> Iterator[_Recorder]:
    recorder = _Recorder(hessian)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: recorder.add(name, args[0])

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in linears.items()]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(
    model: nn.Module,
    token_batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    *,
    progress: Progress | None = None,
) -> dict[str, LayerStats]:
    """Input norms of every linear, from whole forward passes over token batches [B, L]."""
    batches = _checked(token_batches)
    with (
        evaluating(model),
        _widened_one_by_one(_blocks_if_any(model, linears)),
        _recording(linears, hessian=False) as recorder,
    ):
        for done, batch in enumerate(batches, start=1):
            _body(model)(input_ids=batch.to(_device(model)), use_cache=False)
            if progress is not None:
                progress(done, len(batches))
        stats = recorder.stats()
    return _complete(stats, linears)


class HiddenStates:
    """Hidden states of the calibration text by batch, in memory, or in files of a folder where one is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._held = folder, dict[int, Tensor]()

    def __getitem__(self, batch: int) -> Tensor:
        if self._folder is None:
            return self._held[batch]
        hidden: Tensor = torch.load(self._folder / f"hidden-{batch}.pt", weights_only=True)
        return hidden

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        if self._folder is None:
            self._held[batch] = hidden
        else:
            torch.save(hidden, self._folder / f"hidden-{batch}.pt")


class Residence:
    """Where weights and hidden states are between uses: in memory all along, unless a subclass says otherwise."""

    def outside(self) -> AbstractContextManager[None]:
        """While what lies around the blocks is used."""
        return nullcontext()

    def block(self, prefix: str, block: nn.Module) -> AbstractContextManager[None]:
        """While one block is used."""
        return nullcontext()

    def hidden_states(self) -> HiddenStates:
        return HiddenStates()


IN_MEMORY = Residence()


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    token_batches: Iterable[Tensor],
    linears: Mapping[str, nn.Module],
    *,
    hessian: bool = False,
    residence: Residence = IN_MEMORY,
) -> Iterator[dict[str, LayerStats]]:
    """Statistics block by block. A block is run again after the caller has taken its statistics, so changes
    made to its weights in between reach the blocks behind it. Memory: the hidden states of the
    calibration text and one block's sums."""
    batches = _checked(token_batches)
    blocks = blocks_of(model, linears)
    first = next(iter(blocks))
    hidden = residence.hidden_states()
    calls: list[list[BlockCall]] = []
    with evaluating(model), _widened_one_by_one(blocks.values()):
        with residence.outside(), residence.block(first, blocks[first]):
            for number, batch in enumerate(batches):
                hidden[number], recorded = calls_of_blocks(model, list(blocks.values()), batch)
                calls.append(recorded)
        for index, (prefix, block) in enumerate(blocks.items()):
            inside = {name: module for name, module in linears.items() if name.startswith(prefix + ".")}
            with residence.block(prefix, block):
                if inside:
                    with _recording(inside, hessian) as recorder:
                        for number, call in enumerate(calls):
                            call[index].run(block, hidden[number])
                        stats = recorder.stats()
                    yield _complete(stats, inside)
                for number, call in enumerate(calls):
                    hidden[number] = call[index].run(block, hidden[number])


def _checked(token_batches: Iterable[Tensor]) -> list[Tensor]:
    batches = list(token_batches)
    if not batches or not all(batch.numel() for batch in batches):
        raise ValueError("no calibration tokens given; give calibration text, or use the criterion 'magnitude'")
    return batches


def _complete(stats: dict[str, LayerStats], linears: Mapping[str, nn.Module]) -> dict[str, LayerStats]:
    missing = sorted(linears.keys() - stats.keys())
    if missing:
        raise ValueError(f"no calibration token reached {', '.join(missing[:3])}: leave these layers dense")
    return {name: stats[name] for name in linears}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; the mode the model was in comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _body(model: nn.Module) -> nn.Module:
    """The model without its head: statistics of the blocks do not need logits."""
    body = getattr(model, "base_model", model)
    assert isinstance(body, nn.Module)
    return body


def blocks_of(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The transformer blocks: the members of the longest list of modules that holds the linears."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(linear.startswith(name + ".") for linear in linears)
    }
    if not lists:
        raise ValueError("no list of transformer blocks found in this model; calibrate it as a whole")
    name = max(lists, key=lambda key: len(lists[key]))
    outside = [linear for linear in linears if not linear.startswith(name + ".")]
    if outside:
        raise ValueError(f"{outside[0]} lies outside the blocks {name}: leave it dense")
    return {f"{name}.{index}": block for index, block in enumerate(lists[name])}


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: masks and positions may differ from block to block."""

    rest: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden, *self.rest, **self.keywords)
        return _first(output)


def calls_of_blocks(model: nn.Module, blocks: list[nn.Module], batch: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """What the first block is given, and how each is called, in a pass in which all but the first only hand on."""
    calls: list[BlockCall] = []
    given: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keywords = dict(kwargs)
        hidden = args[0] if args else keywords.pop("hidden_states")
        given.append(hidden)
        calls.append(BlockCall(args[1:], keywords))

    def skip(output: Any) -> Callable[..., Any]:
        return lambda hidden_states, *_rest, **_keywords: (
            (hidden_states,) if isinstance(output, tuple) else hidden_states
        )

    def skip_the_others(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        for block in blocks[1:]:
            block.forward = skip(output)

    forwards = [block.__dict__.get("forward") for block in blocks[1:]]
    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    handles.append(blocks[0].register_forward_hook(skip_the_others))
    try:
        _body(model)(input_ids=batch.to(_device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in zip(blocks[1:], forwards, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
    if len(calls) != len(blocks):
        raise ValueError(f"{len(calls)} of the {len(blocks)} blocks were run; calibrate this model as a whole")
    return given[0], calls


def _floats_as(dtype: torch.dtype, parts: Any) -> Any:
    """Nested arguments or results with all their floating-point tensors in a dtype."""

    def converted(part: Any) -> Any:
        return part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part

    return tree_map(converted, parts)


def _blocks_if_any(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterable[nn.Module]:
    try:
        return blocks_of(model, linears).values()
    except ValueError:  # such a model runs as it is
        return ()


@contextmanager
def _widened_one_by_one(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, each block is widened while it runs, and its output rounded to the dtype of its input."""

    def run(block: nn.Module, *given: Any, **keywords: Any) -> Any:
        forward = type(block).forward
        with widened(block) as dtype:
            if dtype is None:
                return forward(block, *given, **keywords)
            own = next(part.dtype for part in (*given, *keywords.values()) if isinstance(part, Tensor))
            given, keywords = _floats_as(dtype, (given, keywords))
            return _floats_as(own, forward(block, *given, **keywords))

    chosen = list(blocks)
    for block in chosen:
        block.forward = partial(run, block)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


def _first(output: Any) -> Tensor:
    """A block returns its hidden states, alone or first in a tuple."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
