"""Recipes: what a compression does, as data.

A recipe is a YAML file of a few sections; leaving a section out leaves its stage out. Those in `compressor/recipes/`
are given by name. `--set section.key=value` changes one entry. Unknown keys are refused with the accepted ones named.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compressor.criteria import CRITERIA, WITHOUT_TEXT
from compressor.masks import MaskShape
from compressor.quantizers import NEED_HESSIAN, QUANTIZERS
from compressor.retraining import METHODS, AstSettings, Budget, CastSettings, LoopSettings, LowRankSettings
from compressor.retraining.pst import PstSettings
from compressor.retraining.reconstruction import ReconstructionSettings
from compressor.retraining.scales import ScaleSettings
from compressor.retraining.task_methods import METHODS as TASK_METHODS
from compressor.scheme import LowRank, Scheme
from compressor.solvers import SOLVERS
from compressor.tasks import TASKS, TaskSource

RECIPES = files("compressor") / "recipes"
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|tok|ktok|Mtok|Gtok|epochs?)")
_SHARE = re.compile(r"auto:(\d{1,2}(?:\.\d+)?)\s*%")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_TOKENS = {"tok": 1, "ktok": 10**3, "Mtok": 10**6, "Gtok": 10**9}


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says which entry and what is accepted."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=_Section)
Values = Literal["int4", "int8", "fp8", "bfloat16", "float16"]
_INTEGERS = {"int4", "int8"}
_SCALED = {*_INTEGERS, "fp8"}


def _did_you_mean(given: str, accepted: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_name(section: S, key: str, given: str, accepted: Sequence[str]) -> S:
    if given not in accepted:
        raise ValueError(f"no {key} {given!r}{_did_you_mean(given, accepted)}; accepted: {', '.join(accepted)}")
    return section


def _check_targets(targets: Iterable[str]) -> None:
    for target in targets:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{target!r} is no regular expression: {error}") from None


def _pattern_text(value: Any) -> Any:
    """YAML reads a bare 2:4 as a number of base 60."""
    return f"{value // 60}:{value % 60}" if isinstance(value, int) else value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def matches(targets: Iterable[str], name: str) -> bool:
    """Whether one of the targets, names or `re:` patterns of a whole name, is this name."""
    return any(
        bool(re.fullmatch(target[3:], name)) if target.startswith("re:") else target == name for target in targets
    )


class Text(_Section):
    """The text for calibration and retraining."""

    source: str = "default"
    """`default` (general prose out of pinned packages), a .txt, .jsonl or .parquet file, or a hub dataset id."""
    field: str = "text"
    """The field that holds the text, in jsonl, parquet and datasets."""
    length: int = Field(default=256, ge=8)
    """Tokens of a block."""


class Sparsity(_Section):
    """The starting mask."""

    pattern: str = "2:4"
    """`2:4`, another n:m, or unstructured, the share of each layer that is pruned: `50%`. Weights of which more than
    two of four are kept are stored in a dense format, their zeros among them."""
    criterion: str = "wanda"
    """Which weights count: `magnitude`, `wanda`, a solver that also updates the kept weights, or `given`: the model is
    pruned already, and its zeros stay."""
    samples: int = Field(default=64, ge=1)
    """Blocks of text that calibration reads."""
    keep_dense: tuple[str, ...] = ()
    """Layers that are not pruned: names, `re:` patterns, or `auto:5%`, the most sensitive ones that together hold at
    most this share of the weights."""

    _pattern = field_validator("pattern", mode="before")(_pattern_text)
    _targets = field_validator("keep_dense", mode="before")(_one_or_several)

    @model_validator(mode="after")
    def _known(self) -> Sparsity:
        MaskShape.parse(self.pattern)
        _check_targets(target for target in self.keep_dense if not target.startswith("auto:"))
        for target in self.keep_dense:
            if target.startswith("auto:") and not _SHARE.fullmatch(target):
                raise ValueError(f"keep_dense {target!r} is not understood; write a share such as auto:5%")
        return _check_name(self, "criterion", self.criterion, [*CRITERIA, *SOLVERS])

    @property
    def dense_share(self) -> float:
        """The share of weights that sensitivity may keep dense."""
        shares = [float(match[1]) / 100 for target in self.keep_dense if (match := _SHARE.fullmatch(target))]
        return max(shares, default=0.0)


class Override(_Section):
    """What is different for some layers. Of several overrides of a layer the first that says something counts."""

    layers: tuple[str, ...]
    """Names, or `re:` patterns that match a whole name."""
    sparsity: str | None = None
    """Another pattern, or `dense`: not pruned."""
    values: Values | None = None
    """How their weights are stored."""
    group_size: int | Literal["auto", "row"] | None = None

    _pattern = field_validator("sparsity", mode="before")(_pattern_text)

    @model_validator(mode="after")
    def _known(self) -> Override:
        _check_targets(self.layers)
        if self.sparsity not in (None, "dense"):
            MaskShape.parse(str(self.sparsity))
        return self


class Retraining(_Section):
    """How the sparse model is trained against the dense one."""

    method: str = "ast"
    budget: str = "10m"
    """Wall time (`90s`, `10m`, `2h`), tokens (`500ktok`, `2Mtok`) or passes over the text, or the task's examples (`3
    epochs`). Schedules are fractions of it."""
    validation_blocks: int = Field(default=16, ge=1)
    """Blocks of the text that are held out, to measure the loss before and after."""
    loop: LoopSettings = LoopSettings()
    """What every method shares: rates, batch, distillation, precision."""
    ast: AstSettings = AstSettings()
    """What AST adds: mask decay and refresh, the low-rank branch."""
    cast: CastSettings = CastSettings()
    """What CAST adds: its L1 decay, the row scales."""
    pst: PstSettings = PstSettings()
    """What PST adds: ranks, the score's terms, how sparsity grows (for the methods compared with it, too)."""
    heads_and_neurons: float | None = Field(default=None, gt=0, lt=1)
    """PST only: drop this share of each block's heads and MLP neurons, in place of a sparsity section."""

    @model_validator(mode="after")
    def _known(self) -> Retraining:
        parse_budget(self.budget)
        return _check_name(self, "method", self.method, [*METHODS, *TASK_METHODS])

    def check_read(self) -> None:
        """Raises ValueError for settings of another method, which would do nothing."""
        method, defaults = self.method, {"ast": AstSettings(), "cast": CastSettings(), "pst": PstSettings()}
        for key, default in defaults.items():
            if getattr(self, key) != default and key != ("pst" if method in TASK_METHODS else method):
                raise ValueError(
                    f"retraining.{key} says nothing to method {method!r}: leave it out (--set retraining.{key}={{}})"
                )
        if self.heads_and_neurons is not None and method not in ("pst", "lora-magnitude"):
            raise ValueError(f"heads_and_neurons are dropped by pst only, not by {method!r}")

    @property
    def low_rank(self) -> LowRank | None:
        """The stored form of the low-rank branch."""
        branch = self.ast.low_rank if self.method == "ast" else None
        if branch is None:
            return None
        return LowRank(branch.segment, "int8" if branch.int8 else "bfloat16", branch.projection)


class TaskSection(_Section):
    """The task that the model is fine-tuned for while it is pruned."""

    name: str
    """A packaged task, one of GLUE's, `e2e`, or `custom` for files of one's own."""
    source: TaskSource = TaskSource()
    """Where a task that is not packaged has its examples, and in which fields."""
    teacher: str | None = None
    """A dense model that is fine-tuned for the task and reads the same tokens; it is distilled by `loop.kl_weight` and
    `loop.temperature`. Left out, a model that is fine-tuned for the task already is its own teacher."""
    length: int = Field(default=128, ge=8)
    """The most tokens of an example, its answer included."""
    train_examples: int | None = Field(default=None, ge=1)
    """At most so many are trained on, chosen by the seed."""
    test_examples: int | None = Field(default=None, ge=1)
    """At most so many are tested on."""
    beams: int = Field(default=4, ge=1)
    """Of the search that writes answers."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Of written answers."""

    @model_validator(mode="after")
    def _known(self) -> TaskSection:
        return _check_name(self, "task", self.name, TASKS)


class Quantization(_Section):
    """How the weights are stored."""

    values: Values = "int4"
    group_size: int | Literal["auto", "row"] = "auto"
    """Inputs that share one scale. `auto`: the largest of 128, 64, 32 that divides every layer's in_features."""
    quantizer: str = "rtn"
    """`rtn` rounds to nearest; `gptq` makes up for rounding errors with calibration text and keeps the mask;
    `gptq-act-order` does so from the most active input to the least."""
    transform: Literal["awq"] | None = None
    """`awq` scales the inputs of linears first, so that the most active ones round finer."""
    samples: int = Field(default=64, ge=1)
    """Blocks of text that a quantiser reads, if it reads any."""
    reconstruction: ReconstructionSettings | None = None
    """Train the rounded weights of each block on their grid, so that it gives what it gave before it was rounded."""
    scales: ScaleSettings | None = None
    """Train the scales of weights that became integers end to end, last of all, to give what the model gave before."""
    embeddings: Literal["int8", "dense"] = "int8"
    """How embeddings and LM head are stored; they are never pruned."""
    kv_cache_dtype: Literal["bfloat16", "int8", "fp8"] | None = None
    """How a server is to keep keys and values, unless it is told otherwise."""

    low_rank: Literal["trained", "int4", "int8", "bfloat16"] = "trained"
    """How the low-rank branch is stored; `trained`: as training saw it."""

    @model_validator(mode="after")
    def _known(self) -> Quantization:
        return _check_name(self, "quantizer", self.quantizer, list(QUANTIZERS))


# Of the loop's settings those that a task's examples have no use for.
_OF_TEXT = ("train", "distill", "hidden_weight", "teacher_cache")


class Recipe(_Section):
    """One compression, from the starting mask to the stored form."""

    name: str = "custom"
    description: str = ""
    seed: int = 0
    text: Text = Text()
    task: TaskSection | None = None
    ignore: tuple[str, ...] = ()
    """Layers that stay dense: names, or `re:` patterns that match a whole name."""
    sparsity: Sparsity | None = None
    reconstruction: ReconstructionSettings | None = None
    """Train each block to give the dense block's output, before or instead of retraining."""
    retraining: Retraining | None = None
    quantization: Quantization = Quantization()
    overrides: tuple[Override, ...] = ()
    """What is different for some layers."""

    _targets = field_validator("ignore", mode="before")(_one_or_several)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._check_task()
        if self.retraining is not None:
            self.retraining.check_read()
        if self.retraining is not None and self.sparsity is None and not self.fine_tunes:
            raise ValueError("retraining needs a sparsity section: it trains a sparse model")
        if self.reconstruction is not None and self.sparsity is None:
            raise ValueError("reconstruction needs a sparsity section: it trains a sparse model")
        if self.quantization.transform is not None and self.retraining and self.retraining.low_rank is not None:
            raise ValueError(
                "quantization.transform scales inputs that a low-rank branch reads too; leave one of them out"
            )
        if any(override.sparsity not in (None, "dense") for override in self.overrides) and self.sparsity is None:
            raise ValueError("an override of sparsity needs a sparsity section, which says how to prune")
        self._check_grids()
        _check_targets(self.ignore)
        return self

    def _check_grids(self) -> None:
        """What trains on packed grids needs some."""
        values = {self.quantization.values, *(override.values for override in self.overrides)} - {None}
        for key, fitting in (("reconstruction", _SCALED), ("scales", _INTEGERS)):
            if getattr(self.quantization, key) is not None and not values & fitting:
                raise ValueError(
                    f"quantization.{key} trains on the grids of {' or '.join(sorted(fitting))}, but values are "
                    f"{' and '.join(sorted(map(str, values)))}: add --set quantization.{key}=null"
                )

    def _check_task(self) -> None:
        method = self.retraining.method if self.retraining is not None else None
        if self.task is None:
            return  # recipes leave the task to the command line; `check_given_task` is for later
        if method not in TASK_METHODS:
            raise ValueError(
                f"task {self.task.name!r} given, but retraining.method is {method!r}; methods that fine-tune for a "
                f"task: {', '.join(TASK_METHODS)} (recipes pst-...)"
            )
        assert self.retraining is not None
        silent = [key for key in _OF_TEXT if getattr(self.retraining.loop, key) != getattr(LoopSettings(), key)]
        if silent:
            raise ValueError(f"retraining.loop.{silent[0]} says something of training on text only; leave it out")
        if self.text != Text():
            raise ValueError(
                "the text section says something of text, and with a task its examples are all that is read: leave it "
                "out, and name a file of yours as task.source.path"
            )
        self._check_pruned_for_task(str(method))
        settings = self.quantization
        trained = any((self.reconstruction, settings.reconstruction, settings.scales))
        if settings.quantizer != "rtn" or settings.transform is not None or trained:
            raise ValueError(
                "with a task weights are rounded to nearest, on grids that the last part of fine-tuning has seen "
                "(retraining.loop.quantize_share); leave quantizer, transform, reconstruction and scales out"
            )

    def _check_pruned_for_task(self, method: str) -> None:
        whole = self.retraining is not None and self.retraining.heads_and_neurons is not None
        if method == "dense" or whole:
            if self.sparsity is not None:
                raise ValueError(
                    "leave the sparsity section out: method 'dense' prunes nothing, and heads_and_neurons "
                    "says itself what is pruned"
                )
        elif self.sparsity is None:
            raise ValueError(f"retraining.method {method!r} needs a sparsity section: it trains a sparse model")
        if self.sparsity is not None and self.sparsity.criterion != Sparsity().criterion:
            raise ValueError(f"method {method!r} chooses masks by a score of its own: leave sparsity.criterion out")
        if self.sparsity is not None and self.sparsity.dense_share:
            raise ValueError("keep_dense auto ranks layers by text; with a task name the layers instead")
        if len({str(override.sparsity) for override in self.overrides} - {"None", "dense"}) > 0:
            raise ValueError("with a task all pruned layers share one pattern; override with 'dense' only")

    def ignores(self, name: str) -> bool:
        """Whether a layer stays dense."""
        return matches(self.ignore, name)

    def overridden(self, name: str, key: Literal["sparsity", "values", "group_size"]) -> Any:
        """What the overrides say of a layer, or None."""
        said = (getattr(override, key) for override in self.overrides if matches(override.layers, name))
        return next((value for value in said if value is not None), None)

    def mask_shape(self, name: str) -> MaskShape | None:
        """The shape of a layer's mask, or None where it is not pruned."""
        if self.sparsity is None or matches(self.sparsity.keep_dense, name):
            return None
        pattern = self.overridden(name, "sparsity") or self.sparsity.pattern
        return None if pattern == "dense" else MaskShape.parse(pattern)

    def keeping_dense(self, names: Iterable[str]) -> Recipe:
        """The recipe with further layers left dense."""
        assert self.sparsity is not None
        kept = {**self.sparsity.model_dump(), "keep_dense": (*self.sparsity.keep_dense, *names)}
        return parse_recipe({**self.model_dump(exclude_none=True), "sparsity": kept})

    def scheme(self, group_size: int, name: str = "") -> Scheme:
        """What a linear of the blocks becomes, at a decided group size."""
        values = self.overridden(name, "values") or self.quantization.values
        floats = values in ("bfloat16", "float16")
        shape = self.mask_shape(name)
        sparse = shape is not None and shape.fits_24
        format_name = ("sparse24" if sparse else "dense") if floats else (f"sparse24_{values}" if sparse else values)
        low_rank = self.retraining.low_rank if self.retraining is not None and shape is not None else None
        if low_rank is not None and self.quantization.low_rank != "trained":
            low_rank = replace(low_rank, dtype=self.quantization.low_rank)
        return Scheme(format_name, -1 if floats else group_size, values if floats else "bfloat16", low_rank)

    @property
    def loop(self) -> LoopSettings:
        """Of the retraining: its seed is the recipe's, unless it names one of its own."""
        assert self.retraining is not None
        loop = self.retraining.loop
        return loop if loop.seed is not None else replace(loop, seed=self.seed)

    @property
    def fine_tunes(self) -> bool:
        """Whether the model is trained on a task's examples."""
        return self.retraining is not None and self.retraining.method in TASK_METHODS

    @property
    def uses_text(self) -> bool:
        """Whether any stage reads text."""
        pruning = self.sparsity
        calibrated = pruning is not None and (pruning.criterion not in WITHOUT_TEXT or pruning.dense_share > 0)
        settings = self.quantization
        rounded = settings.quantizer in NEED_HESSIAN or settings.transform is not None
        if self.fine_tunes:
            return False
        return self.trains_on_text or calibrated or rounded

    @property
    def trains_on_text(self) -> bool:
        """Whether any stage trains, but for a task."""
        stages = (self.retraining, self.reconstruction, self.quantization.reconstruction, self.quantization.scales)
        return not self.fine_tunes and any(stage is not None for stage in stages)


def check_given_task(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that fine-tunes for a task, when none is named."""
    if recipe.task is None and recipe.fine_tunes:
        assert recipe.retraining is not None
        raise ValueError(
            f"recipe {recipe.name!r} fine-tunes for a task (retraining.method {recipe.retraining.method!r}), and none "
            f"is given; give --task NAME, of: {', '.join(TASKS)}; or take a method that needs none: "
            f"{', '.join(METHODS)}"
        )


def check_streamable(recipe: Recipe) -> None:
    """Raises ValueError for a recipe that has to hold the model."""
    if recipe.retraining is not None:
        raise ValueError(
            f"--low-memory holds one block of the model at a time, and recipe {recipe.name!r} trains all of them. "
            "Give --one-shot too, or leave it out."
        )
    for key, settings in (
        ("reconstruction", recipe.reconstruction),
        ("quantization.reconstruction", recipe.quantization.reconstruction),
    ):
        if settings is not None:
            raise ValueError(
                f"--low-memory holds one block of the model at a time, and recipe {recipe.name!r} rebuilds blocks "
                f"beside those of a second model. Give --set {key}=null too, or leave it out."
            )
    if recipe.quantization.scales is not None:
        raise ValueError(
            f"--low-memory holds one block of the model at a time, and recipe {recipe.name!r} trains the scales of all "
            "of them. Give --set quantization.scales=null too, or leave it out."
        )
    if recipe.quantization.transform is not None:
        raise ValueError(
            f"--low-memory holds one block of the model at a time, and recipe {recipe.name!r} moves scales between "
            "layers. Give --set quantization.transform=null too, or leave it out."
        )


def parse_budget(text: str) -> Budget:
    """`10m` is 600 seconds, `2Mtok` two million tokens. Raises ValueError for anything else."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"budget {text!r} is not understood; accepted: 90s, 10m, 2h, 500ktok, 2Mtok, 1Gtok, 3 epochs")
    number, unit = float(match[1]), match[2]
    if unit in _SECONDS:
        return Budget(seconds=number * _SECONDS[unit])
    if unit in _TOKENS:
        return Budget(tokens=round(number * _TOKENS[unit]))
    return Budget(epochs=number)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(Path(str(entry)).stem for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name or path and applies `section.key=value` overrides.

    Raises:
        RecipeError: no such recipe, not YAML, an unknown key or a bad value.
    """
    path = Path(name)
    if name in recipe_names():
        text = (RECIPES / f"{name}.yaml").read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8")
    else:
        names = recipe_names()
        raise RecipeError(
            f"no recipe {name!r}{_did_you_mean(name, names)}. Give a YAML file, or one of: {', '.join(names)}"
        )
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name} is not valid YAML: {error}") from None
    if not isinstance(record, dict):
        raise RecipeError(f"recipe {name} must hold sections such as 'sparsity:' and 'quantization:'")
    record.setdefault("name", path.stem)
    _check_retrains(record, overrides)
    for override in overrides:
        _apply(record, override)
    return parse_recipe(record)


def parse_recipe(record: dict[str, Any]) -> Recipe:
    """Checks a parsed recipe; raises RecipeError naming each bad entry."""
    try:
        return Recipe.model_validate(record)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentence(problem) for problem in error.errors())) from None


def _check_retrains(record: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises RecipeError where settings of a retraining would add one, of a method that nobody has named."""
    parts = [override for override in overrides if override.startswith("retraining.")]
    added = any(override.startswith(("retraining=", "retraining.method=")) for override in overrides)
    if parts and record.get("retraining") is None and not added:
        raise RecipeError(
            f"--set {parts[0]!r} given, but recipe {record['name']!r} has no retraining: leave it out, or add one with "
            "--set retraining.method=ast"
        )


def _apply(record: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r} is not understood; write section.key=value")
    *sections, last = key.split(".")
    target = record
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise RecipeError(f"--set {override!r}: {section!r} is not a section")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML; quote it: --set \"{key}='...'\"") from None


def _sentence(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "recipe"
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section = tuple(part for part in problem["loc"][:-1] if not isinstance(part, int))
        accepted = _SECTION_KEYS.get(section, [])
        return f"unknown key {where!r}{_did_you_mean(str(problem['loc'][-1]), accepted)}; accepted: {accepted}"
    why = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):
        return f"{where}: {why}"
    return f"{where}: {why} (given: {problem['input']!r})"[:600]


_SECTION_KEYS: dict[tuple[Any, ...], list[str]] = {
    (): list(Recipe.model_fields),
    ("text",): list(Text.model_fields),
    ("task",): list(TaskSection.model_fields),
    ("task", "source"): [field.name for field in fields(TaskSource)],
    ("sparsity",): list(Sparsity.model_fields),
    ("overrides",): list(Override.model_fields),
    ("retraining",): list(Retraining.model_fields),
    ("retraining", "loop"): [field.name for field in fields(LoopSettings)],
    ("retraining", "ast"): [field.name for field in fields(AstSettings)],
    ("retraining", "cast"): [field.name for field in fields(CastSettings)],
    ("retraining", "pst"): [field.name for field in fields(PstSettings)],
    ("retraining", "ast", "low_rank"): [field.name for field in fields(LowRankSettings)],
    ("reconstruction",): [field.name for field in fields(ReconstructionSettings)],
    ("quantization", "reconstruction"): [field.name for field in fields(ReconstructionSettings)],
    ("quantization", "scales"): [field.name for field in fields(ScaleSettings)],
    ("quantization",): list(Quantization.model_fields),
}
