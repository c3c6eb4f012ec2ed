"""Every refusal that can be known beforehand, and an estimate of size, memory, disk and time.

Runs before anything long: reads the configuration and shapes, never the weights, but for one layer that is tried.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from compressor.awq import check_awq
from compressor.calibration import blocks_of
from compressor.checkpoint import MAX_SHARD_BYTES, Checkpoint, read_json
from compressor.compressed_linear import linear_shape
from compressor.data import ACCEPTED, NAMED, check_suffix, is_hub_id
from compressor.formats import make_format
from compressor.formats.low_rank import low_rank_spec
from compressor.machine import available_memory
from compressor.masks import MaskShape
from compressor.models import (
    block_linears,
    check_weights,
    fetch_model,
    is_bare_encoder,
    is_classifier,
    load_tokenizer,
    name_of,
    skeleton,
)
from compressor.precision import compute_dtype
from compressor.quantizers import rtn
from compressor.recipe import Recipe, TaskSection, check_given_task, matches, parse_budget
from compressor.retraining.distribution import distribution
from compressor.retraining.loop import check_spread, training_device
from compressor.retraining.schedules import FEW_STEPS
from compressor.scheme import Scheme
from compressor.tasks import Task, load_task
from compressor.tasks.metrics import check_metrics

log = logging.getLogger(__name__)

SERVED = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")
"""Model types that the torch runtime serves by its own modules."""
ENCODERS = ("bert", "roberta")
"""Model types whose encoders and classifiers the torch runtime serves by its own modules."""
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"
)  # fmt: skip
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
"""Names of the embeddings that positions are learned in."""
_TOKENS_OF_A_WORD = 1.5
_CLEARLY = 2.0
"""An estimated time may be off by so much."""
_GROUP_SIZES = (128, 64, 32)
_STREAMING_BYTES = 8e8
"""Imports and blocks of rows of a run that never holds the model."""


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model.

    Args:
        folder: the dense model.
        model_type: transformers' name of the architecture.
        schemes: {module: scheme} of everything that is packed.
        shapes: {linear: shape of its mask} of everything that is pruned.
        parameters: of the dense model.
        dense_bytes: of the dense model on disk.
        packed_bytes: of the packed weights.
        memory_bytes: estimated peak while compressing.
        disk_bytes: needed for output, resume and scratch files.
        seconds: estimated time of all that trains, or None without that or where it is not known.
        notes: things worth knowing before the start.
        task: what the model is fine-tuned for, where the recipe names a task.
    """

    folder: Path
    model_type: str
    schemes: dict[str, Scheme]
    shapes: dict[str, MaskShape]
    parameters: int
    dense_bytes: int
    packed_bytes: int
    memory_bytes: int
    disk_bytes: int
    seconds: float | None
    notes: tuple[str, ...]
    task: Task | None = None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Of the head that the task brings, as `skeleton` wants them."""
        return None if self.task is None else self.task.head_labels

    def with_linears(self, linears: Mapping[str, nn.Module], recipe: Recipe) -> Plan:
        """The plan for another recipe, which treats the same linears differently."""
        schemes = self.schemes | linear_schemes(linears, recipe)
        return replace(self, schemes=schemes, shapes=mask_shapes(linears, recipe))


def check(folder: Path, recipe: Recipe, out: Path, *, low_memory: bool = False) -> Plan:
    """Checks recipe, model and machine against each other; with `low_memory`, for a run that never holds the model.

    Raises:
        ValueError: the model, or one of its layers, cannot take the recipe.
        MemoryError: too little memory or disk; names what is needed and what is there.
    """
    from compressor.layer_by_layer import scratch_bytes

    check_given_task(recipe)
    source = Checkpoint.open(folder)
    if source.packed:
        raise ValueError(f"{folder} is a compressed checkpoint already. Give the dense model that it was made from.")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}). Copy the tokenizer files of the model into it."
        )
    _check_text(recipe)
    task = read_task(recipe)
    if task is not None:
        check_metrics(task.metrics)
    model = skeleton(folder, None if task is None else task.head_labels)
    _check_length(model, recipe)
    linears = block_linears(model)
    _check_targets(linears, recipe)
    linears = {name: module for name, module in linears.items() if not recipe.ignores(name)}
    if not linears:
        raise ValueError("the recipe's 'ignore' leaves no layer to compress")
    if recipe.quantization.transform is not None:
        check_awq(model.config)
    _check_trainable(folder, model, recipe, task)
    schemes = linear_schemes(linears, recipe) | embedding_schemes(model, recipe)
    _check_weights(source, model, new_head=task is not None and task.head_labels is not None, low_memory=low_memory)
    shapes = mask_shapes(linears, recipe)
    _check_retraining(model, recipe, {name: linear_shape(linears[name]) for name in shapes}, shapes)
    plan = _estimate(folder, model, schemes, shapes, recipe)
    if task is not None:
        taught = check_teacher(folder, recipe, task)
        seconds = _task_seconds(recipe, task, plan.parameters, taught=taught is not None)
        plan = replace(plan, task=task, seconds=seconds, notes=(*plan.notes, *([taught] if taught else [])))
    plan = replace(plan, notes=(*plan.notes, *_budget_notes(recipe, task, plan.parameters)))
    if low_memory:
        calibration = _block_bytes(model, linears) if recipe.uses_text else 0
        memory = int(_STREAMING_BYTES + plan.dense_bytes / 8) + calibration
        disk = plan.disk_bytes + scratch_bytes(model, linears, recipe)
        plan = replace(plan, memory_bytes=memory, disk_bytes=disk)
    _check_machine(plan, out)
    return plan


def _check_trainable(folder: Path, model: Any, recipe: Recipe, task: Task | None) -> None:
    """Raises ValueError where training needs a language model and the folder holds another."""
    if not (is_classifier(model.config.architectures) or is_bare_encoder(model.config)):
        return
    retrained = recipe.retraining is not None and not recipe.fine_tunes
    if retrained or recipe.quantization.scales is not None:
        raise ValueError(
            f"recipe {recipe.name!r} trains a language model on text, and {folder} holds a "
            f"{model.config.architectures[0]}. Take a one-shot recipe, or give --one-shot too; to fine-tune it, a "
            "recipe pst-... with --task NAME."
        )
    if task is not None and task.head_labels is None:
        raise ValueError(
            f"task {task.name!r} has a language model write, and {folder} holds a {model.config.architectures[0]}. "
            "Give a causal language model, or a task with classes."
        )


def _check_retraining(
    model: Any, recipe: Recipe, sizes: Mapping[str, tuple[int, int]], shapes: Mapping[str, MaskShape]
) -> None:
    """Raises ValueError for what retraining refuses, before all that precedes it."""
    if recipe.retraining is None:
        return
    settings, loop = recipe.retraining, recipe.retraining.loop
    check_spread(distribution(loop.distribution), loop, shapes.values(), for_task=recipe.fine_tunes)
    vocabulary = int(model.config.vocab_size)
    if loop.teacher_cache == "top-k" and loop.teacher_top_k > vocabulary:
        raise ValueError(f"teacher_top_k {loop.teacher_top_k} given; the vocabulary has {vocabulary} tokens")
    parts = settings.cast.row_parts if settings.method == "cast" else 0
    for name, (_, in_features) in sizes.items():
        if parts and in_features % parts:
            raise ValueError(f"row_parts {parts} given; {name} has {in_features} inputs to divide")


def _check_weights(source: Checkpoint, model: Any, *, new_head: bool, low_memory: bool) -> None:
    """Raises ValueError where weights of the model are not there, or not where a run that never holds it looks."""
    shapes = {name: source.shape_of(name) for name in source.names()}
    source.close()
    check_weights(source.folder, model, shapes, new_head=new_head)
    names = [name for name, _ in model.named_parameters()] if low_memory else []
    absent = [name for name in names if source.stored_name(name, model.base_model_prefix) not in shapes]
    if absent:
        raise ValueError(
            f"--low-memory reads tensors by the model's own names, and {source.folder} has no {absent[0]} (and "
            f"{len(absent) - 1} more). Leave --low-memory out, or save the model again with save_pretrained."
        )


def read_task(recipe: Recipe) -> Task | None:
    """The recipe's task with its examples, as many as it wants."""
    if recipe.task is None:
        return None
    task = load_task(recipe.task.name, recipe.task.source)
    return task.limited(recipe.task.train_examples, recipe.task.test_examples, recipe.seed)


def check_teacher(folder: Path, recipe: Recipe, task: Task) -> str | None:
    """What there is to know of the teacher that a task's model is distilled from; None where it has none.

    Raises:
        ValueError: a teacher that is not fine-tuned for the task, or reads other tokens.
    """
    assert recipe.task is not None and recipe.retraining is not None
    name, labels = recipe.task.teacher, task.head_labels
    if recipe.retraining.loop.kl_weight == 0:
        if name is not None:
            raise ValueError(f"task.teacher {name!r} given, and loop.kl_weight 0 leaves it out: leave out one of them")
        return None
    if name is None:
        if labels is None or _classes(folder) != max(1, len(labels)):
            return None
        return "the model's head fits the task: if it knows the task, it is its own teacher (loop.kl_weight=0: none)"
    teacher = fetch_model(name)
    if labels is not None and (classes := _classes(teacher)) != max(1, len(labels)):
        has = f"a head for {classes} classes" if classes else "no head for classes"
        raise ValueError(
            f"teacher {name} has {has}, the task has {max(1, len(labels))}: give one that is fine-tuned for it"
        )
    sizes = [read_json(where / "config.json").get("vocab_size") for where in (teacher, folder)]
    if labels is None and sizes[0] != sizes[1]:
        raise ValueError(f"teacher {name} has a vocabulary of {sizes[0]}, {folder} one of {sizes[1]}; they must agree")
    text = " ".join(example.text for example in task.train[:8])
    if load_tokenizer(teacher)(text)["input_ids"] != load_tokenizer(folder)(text)["input_ids"]:
        raise ValueError(f"teacher {name} reads other tokens than {folder}; give one that was made from the same model")
    return f"the model is distilled from {name} (loop.kl_weight {recipe.retraining.loop.kl_weight:g})"


def _classes(folder: Path) -> int:
    """Outputs of a classifier's head, as transformers counts them; 0 for another model."""
    config = read_json(folder / "config.json")
    return len(config.get("id2label") or (0, 1)) if is_classifier(config.get("architectures")) else 0


def _check_text(recipe: Recipe) -> None:
    source = recipe.text.source
    there = source in NAMED or Path(source).expanduser().is_file() or ("/" in source and is_hub_id(source))
    if recipe.uses_text and not there:
        raise ValueError(f"text {source!r} is not there; accepted: {ACCEPTED}")
    if recipe.uses_text:
        check_suffix(source)


def _check_length(model: nn.Module, recipe: Recipe) -> None:
    """Learned positions end; those that are computed, such as rotary ones, do not."""
    embeddings = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    lengths = {"text.length": recipe.text.length} if recipe.uses_text else {}
    if recipe.task is not None:
        lengths["task.length"] = recipe.task.length
    for embedding in embeddings:
        # RoBERTa counts from behind the row for padding, OPT from a row of its own.
        before = getattr(embedding, "offset", 0 if embedding.padding_idx is None else embedding.padding_idx + 1)
        positions = embedding.num_embeddings - before
        for key, length in lengths.items():
            if length > positions:
                raise ValueError(f"{key} {length} given, and the model has {positions} positions: give no more")


def _check_targets(names: Iterable[str], recipe: Recipe) -> None:
    """Refuses targets that are no layer: a name with a mistake would leave the layer as all others are."""
    names = list(names)
    kept = recipe.sparsity.keep_dense if recipe.sparsity is not None else ()
    given = {
        "ignore": recipe.ignore,
        "keep_dense": tuple(target for target in kept if not target.startswith("auto:")),
        "overrides": tuple(target for override in recipe.overrides for target in override.layers),
    }
    for key, targets in given.items():
        for target in targets:
            if not any(matches([target], name) for name in names):
                raise ValueError(
                    f"{key} {target!r} is none of the {len(names)} layers: {', '.join(names[:3])}, ... "
                    "Give whole names, or patterns of them such as 're:.*v_proj'"
                )


def linear_schemes(linears: Mapping[str, nn.Module], recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of each linear; raises ValueError naming every layer that cannot take it."""
    shapes = {name: linear_shape(module) for name, module in linears.items()}
    group_size = _group_size(recipe.quantization.group_size, [in_features for _, in_features in shapes.values()])
    schemes: dict[str, Scheme] = {}
    problems: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        wanted = recipe.overridden(name, "group_size")
        scheme = recipe.scheme(group_size if wanted is None else _group_size(wanted, [shape[1]]), name)
        schemes[name] = scheme
        try:
            make_format(scheme).check(*shape)
            if scheme.low_rank is not None:
                low_rank_spec(scheme.low_rank, *shape)
            if (mask := recipe.mask_shape(name)) is not None:
                mask.check_width(shape[1])
        except ValueError as error:
            problems.setdefault(str(error), []).append(name)
    if problems:
        lines = [f"{names[0]} (one of {len(names)} such layers): {why}" for why, names in problems.items()]
        raise ValueError(
            "; ".join(lines) + ". Choose another quantization.group_size, or leave these layers dense with 'ignore'."
        )
    return schemes


def mask_shapes(names: Iterable[str], recipe: Recipe) -> dict[str, MaskShape]:
    """The shape of the mask of each linear that is pruned."""
    shapes = {name: recipe.mask_shape(name) for name in names}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _group_size(wanted: int | str, in_features: list[int]) -> int:
    if isinstance(wanted, int):
        return wanted
    fitting = [size for size in _GROUP_SIZES if all(features % size == 0 for features in in_features)]
    return -1 if wanted == "row" or not fitting else fitting[0]


def embedding_schemes(model: nn.Module, recipe: Recipe) -> dict[str, Scheme]:
    """The schemes of embedding and LM head; a tied head has none of its own."""
    if recipe.quantization.embeddings == "dense":
        return {}
    get = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}  # type: ignore[operator]
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    names = [name_of(model, get["input"])] + ([] if tied else [name_of(model, get["output"])])
    return {name: Scheme("int8") for name in names if name is not None}


def _estimate(
    folder: Path, model: nn.Module, schemes: dict[str, Scheme], shapes: dict[str, MaskShape], recipe: Recipe
) -> Plan:
    modules = {name: model.get_submodule(name) for name in schemes}
    parameters = sum(p.numel() for p in model.parameters())
    packed = packed_weights = 0.0
    for name, scheme in schemes.items():
        shape = _shape(modules[name])
        packed += make_format(scheme).bits_per_weight(*shape) * shape[0] * shape[1] / 8
        if scheme.low_rank is not None:
            spec = low_rank_spec(scheme.low_rank, *shape)
            packed += sum(dtype.itemsize * size[0] * size[1] for size, dtype in spec.values())
        packed_weights += shape[0] * shape[1]
    packed += (parameters - packed_weights) * 2
    shards = set(Checkpoint.open(folder).shards.values())
    dense_bytes = sum(shard.stat().st_size for shard in shards)
    trained = recipe.retraining is not None
    small = recipe.retraining is not None and recipe.retraining.method in ("pst", "lora-magnitude")
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    # Trained: fp32 weight, gradient, two moments, a bf16 teacher; logits come in chunks. Else: fp32 weights.
    # Where only small matrices train: the frozen weight and what the forward sees of it, the mask, a teacher.
    state, kept = (3 * compute_dtype("auto", training_device()).itemsize + 1, 1.5) if small else (4 * 4 + 2 + 2, 13)
    # Where scales alone train: weight, gradient and teacher in the dtype that computes, the weight as it came if that
    # is another, and the grid value.
    computing = compute_dtype("auto", training_device()).itemsize
    scaled = 3 * computing + (2 if computing > 2 else 0) + 1
    size, logits = (state, 3) if trained else (scaled, 3) if recipe.quantization.scales is not None else (6, 0)
    memory = parameters * size + 2048 * vocabulary * 4 * logits + 5e8
    # The last shard is written beside the file in which its tensors waited.
    disk = packed + min(packed, MAX_SHARD_BYTES) + (parameters * kept * 3 if trained else 0)
    notes = []
    config: Any = model.config
    model_type = str(config.model_type)
    own = ENCODERS if is_classifier(config.architectures) or is_bare_encoder(config) else SERVED
    if model_type not in own:
        notes.append(
            f"the torch runtime serves {model_type!r} through transformers' modules, slower than those that it has "
            f"modules of its own for ({', '.join(own)})"
        )
    if parameters < 5e8 and recipe.sparsity is not None and not trained:
        notes.append("a model this small loses much of its quality in one shot; a recipe with retraining wins it back")
    notes += _sparsity_notes(schemes, shapes, recipe)
    return Plan(
        folder, model_type, schemes, shapes, parameters, dense_bytes, int(packed), int(memory), int(disk),
        _seconds(recipe, parameters), tuple(notes),
    )  # fmt: skip


def _sparsity_notes(schemes: Mapping[str, Scheme], shapes: Mapping[str, MaskShape], recipe: Recipe) -> list[str]:
    notes = []
    densely = [name for name, shape in shapes.items() if not shape.fits_24]
    if densely:
        patterns = ", ".join(sorted({str(shapes[name]) for name in densely}))
        formats = ", ".join(sorted({schemes[name].format for name in densely}))
        notes.append(
            f"{len(densely)} layers pruned to {patterns} are stored as {formats}, zeros among the values: the sparse "
            "formats hold 2:4 and sparser patterns such as 1:4, which are smaller and faster"
        )
    if recipe.sparsity is not None and recipe.sparsity.dense_share > 0:
        notes.append(
            f"the most sensitive layers, at most {recipe.sparsity.dense_share:.1%} of the weights, are left dense once "
            "calibration has ranked them; sizes are estimated without them"
        )
    return notes


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return linear_shape(module)


def _seconds(recipe: Recipe, parameters: int) -> float | None:
    """Time of all that trains: the budget itself, or operations over a measured rate."""
    rebuilt = [settings for settings in (recipe.reconstruction, recipe.quantization.reconstruction) if settings]
    if not recipe.trains_on_text:
        return None
    # Of a weight and token: forward and backward in each pass (6), and three forwards (2) of student or teacher.
    operations = float(sum(settings.samples * (6 * settings.passes + 6) for settings in rebuilt) * recipe.text.length)
    if recipe.quantization.scales is not None:
        operations += 8 * recipe.quantization.scales.samples * recipe.text.length
    seconds = 0.0
    if recipe.retraining is not None:
        budget = parse_budget(recipe.retraining.budget)
        if budget.tokens is None and budget.seconds is None:
            return None  # passes over a text that is not read yet have no known length
        seconds = budget.seconds or 0.0
        # Forward and backward of the student (6) and the teacher's forward (2).
        operations += 8 * (budget.tokens or 0)
    return seconds + operations * parameters / _training_rate(recipe)


def tokens_within(seconds: float, recipe: Recipe, parameters: int) -> float:
    """Tokens that retraining is estimated to train on in so many seconds."""
    return seconds * _training_rate(recipe) / (8 * parameters)


def _budget_notes(recipe: Recipe, task: Task | None, parameters: int) -> list[str]:
    """What there is to know of passes over a hub's data set, and of a budget of time that few steps fit into.

    Of time on a CPU only: small products tell too little of an accelerator.

    Raises:
        ValueError: not one step fits.
    """
    if recipe.retraining is None:
        return []
    budget, loop = parse_budget(recipe.retraining.budget), recipe.retraining.loop
    if budget.epochs is not None and task is None and is_hub_id(recipe.text.source):
        return [
            f"a budget of {recipe.retraining.budget} reads all of the data set {recipe.text.source!r} before training; "
            "one in tokens or time reads as much as it trains on"
        ]
    if budget.seconds is None or training_device().type != "cpu":
        return []
    step = loop.batch * (recipe.text.length if task is None or recipe.task is None else _tokens_of(task, recipe.task))
    world = distribution(loop.distribution).world
    seconds = budget.seconds * step / (world * tokens_within(budget.seconds, recipe, parameters))
    if seconds > _CLEARLY * budget.seconds:
        raise ValueError(
            f"budget {recipe.retraining.budget} given; here a step of {step:,} tokens takes about {seconds:.1f} s. "
            f"Give {FEW_STEPS * seconds:.0f}s or more, or a smaller retraining.loop.batch."
        )
    if FEW_STEPS * seconds > budget.seconds:
        return [f"about {budget.seconds / seconds:.1f} steps of {step:,} tokens fit into the budget, too few"]
    return []


def _tokens_of(task: Task, section: TaskSection) -> int:
    """Tokens of a task's examples, as their words suggest."""
    words = fmean(
        len(f"{example.text} {example.pair or ''} {' '.join(example.references[:1])}".split()) for example in task.train
    )
    return min(section.length, math.ceil(_TOKENS_OF_A_WORD * words))


def _task_seconds(recipe: Recipe, task: Task, parameters: int, *, taught: bool) -> float | None:
    """As `_seconds`, for examples as long as their words suggest."""
    if recipe.retraining is None or recipe.task is None:
        return None
    budget = parse_budget(recipe.retraining.budget)
    budget = budget.resolved(len(task.train), _tokens_of(task, recipe.task), recipe.retraining.loop.batch)
    operations = 8 if taught else 6
    return budget.seconds if budget.tokens is None else budget.tokens * parameters * operations / _training_rate(recipe)


def _training_rate(recipe: Recipe) -> float:
    """Operations a second that training reaches: a share of the best of five 1024 x 1024 products in its dtype."""
    device = training_device()
    dtype = compute_dtype(recipe.retraining.loop.precision if recipe.retraining else "auto", device)
    a = torch.randn(1024, 1024, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    # SmolLM2-135M: products in fp32 reach more of their peak than those of matrix units, which the rest then holds up.
    return 2 * 1024**3 / best * (1 / 3 if dtype is torch.float32 else 1 / 8)


def _block_bytes(model: nn.Module, linears: Mapping[str, nn.Module]) -> int:
    """What calibration of one block holds: its weights in fp32, a Hessian and its inverse, the embedding before."""
    blocks = blocks_of(model, linears).values()
    block = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    widest = max(linear_shape(module)[1] for module in linears.values())
    outside = sum(p.numel() for p in model.parameters()) - len(blocks) * block
    kept = 2 if compute_dtype("auto", torch.device("cpu")) == torch.float32 else 0  # beside what is widened
    return (4 + kept) * block + 16 * widest**2 + 2 * outside


def _check_machine(plan: Plan, out: Path) -> None:
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.disk_bytes:
        raise MemoryError(
            f"{parent} has {free / 1e9:.1f} GB free, about {plan.disk_bytes / 1e9:.1f} GB are needed "
            "(output and resume files). Free some space, or name a folder on another disk with --out."
        )
    available = available_memory()
    if available < plan.memory_bytes:
        raise MemoryError(
            f"{available / 1e9:.1f} GB of memory are available, about {plan.memory_bytes / 1e9:.1f} GB are needed. "
            "Use a recipe without retraining (one-shot-...), a smaller model, or a machine with more memory."
        )


def try_one_layer(plan: Plan) -> str:
    """Prunes, quantises, packs and unpacks one real layer; returns a sentence with its shape, size and error."""
    checkpoint = Checkpoint.open(plan.folder)
    # A folder of an encoder without a head lacks the encoder's own name in front.
    stored = {
        name: key
        for name in plan.shapes or plan.schemes
        for key in (f"{name}.weight", f"{name.partition('.')[2]}.weight")
        if key in checkpoint.shards
    }
    if not stored:
        return "no layer could be tried: the stored names differ from the model's"
    name, key = next(iter(stored.items()))
    scheme = plan.schemes[name]
    weight = checkpoint.tensor(key).float()
    if type(skeleton(plan.folder, plan.labels).get_submodule(name)).__name__ == "Conv1D":
        weight = weight.t().contiguous()
    fmt = make_format(scheme)
    pruned = weight * plan.shapes[name].mask(weight.abs()) if name in plan.shapes else weight
    tensors = fmt.pack(rtn(pruned, None, scheme))
    fmt.validate(tensors)
    error = float((fmt.unpack(tensors).float() - pruned).norm() / pruned.norm())
    bits = fmt.bits_per_weight(*weight.shape)
    return f"{name} {list(weight.shape)}: {fmt.name}, {bits:.2f} bits a weight, rounding error {error:.1%}"
