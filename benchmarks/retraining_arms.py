"""The arms of `python -m benchmarks retraining`: each is a recipe and a budget of tokens.

All train on the same blocks of the same text, with schedules that are shares of the budget. The published recipe is
given a grid of starting points and rates, the shipped recipe's start and batch among them; the best on held-out
training text stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

BUDGETS = {"0.1M": 100_000, "0.25M": 250_000, "1M": 1_000_000}
ABLATION_TOKENS = 50_000
_ONE_SHOT: Record = {
    "sparsity": {"criterion": "magnitude"},
    "quantization": {"values": "bfloat16", "embeddings": "dense"},
}
_RATES = (3e-4, 1e-3, 1e-4)
_STARTS = ("sparsegpt", "magnitude")
# The published settings (GPT-2 sizes), but for the batch: 128 blocks of 1,024 tokens would be one step.
_PUBLISHED_LOOP: Record = {
    "batch": 2,
    "warmup": 0.05,
    "final_rate": 0.1,
    "cooldown": 0.05,
    "beta2": 0.95,
    "weight_decay": 0.1,
    "kl_weight": 0.67,
    "temperature": 2.0,
    "train": "all",
}
_PUBLISHED_AST: Record = {
    "form": "decoupled",
    "mask_decay": 1e-4,
    "mask_decay_ramp": 0.25,
    "refresh_every": 10,
    "masked_start": 1.0,
}


@dataclass(frozen=True)
class Arm:
    """One row.

    Args:
        label: unique.
        method: whose row it is; of several with one method and budget the best on held-out training text counts.
        tokens: budget; 0 for one-shot.
        recipe: for `compress`.
        base: label of the arm whose model is compressed in place of the dense one.
    """

    label: str
    method: str
    tokens: int
    recipe: Record
    base: str | None = None


def one_shot_arms() -> list[Arm]:
    """Pruned without training."""
    return [
        Arm(
            f"one-shot {criterion}",
            f"one-shot {criterion}",
            0,
            _with(_ONE_SHOT, {"sparsity": {"criterion": criterion}}),
        )
        for criterion in ("magnitude", "wanda", "sparsegpt")
    ]


def arms_of(budget: str) -> list[Arm]:
    """The trained arms at one budget: the published recipe's grid, CAST's, and the shipped defaults."""
    tokens = BUDGETS[budget]
    grid = [
        Arm(
            f"AST as published, {start} start, rate {rate:g} @ {budget}",
            "AST as published",
            tokens,
            published(start, rate),
        )
        for start in _STARTS
        for rate in _RATES
    ]
    # At the rate that was best from the other starts (the record has them).
    for start, rebuilt in (("our start and batch", False), ("our rebuilt start and our batch", True)):
        recipe = published("sparsegpt", _RATES[0], like=shipped("ast-2of4-bf16"), rebuilt=rebuilt)
        label = f"AST as published, {start}, rate {_RATES[0]:g} @ {budget}"
        grid.append(Arm(label, "AST as published", tokens, recipe))
    cast = [
        Arm(f"CAST, rate {rate:g}, lambda {decay:g} @ {budget}", "CAST", tokens, cast_recipe(rate, decay))
        for rate in (3e-4, 1e-3)
        for decay in (1e-4,)
    ]
    ours = Arm(f"ours @ {budget}", "ours", tokens, shipped("ast-2of4-bf16"))
    packed = [
        Arm(f"ours {values} @ {budget}", f"ours {values}", tokens, packing(f"ast-2of4-{values}"), base=ours.label)
        for values in ("int4", "int8")
    ]
    # Its last part sees the packed values, in place of what trains on their grid at the end.
    seen = {"retraining": {"loop": {"quantize_share": 0.25}}, "quantization": {"reconstruction": None, "scales": None}}
    trained = Arm(
        f"ours int4, trained on its grid @ {budget}",
        "ours int4 trained on its grid",
        tokens,
        _with(shipped("ast-2of4-int4"), seen),
    )
    slorb = Arm(f"ours SLoRB int4 @ {budget}", "ours SLoRB int4", tokens, shipped("ast-slorb-2of4-int4"))
    if budget == "0.1M":
        return [ours, *packed, trained, *grid, *cast, slorb]
    # Hours on a CPU: the published recipe from the starts that were better at 0.1M, CAST at the better rate.
    longer = [arm for arm in grid if "magnitude" not in arm.label and "our start and batch" not in arm.label]
    return [ours, *packed, *longer, *(cast[:1] if budget == "0.25M" else [])]


def ablation_arms() -> list[Arm]:
    """The paper's ablation in small: what the published method loses without each of its parts."""
    full = published("magnitude", 3e-4)
    changes: dict[str, Record] = {
        "full": {},
        "fixed mask": {"retraining": {"ast": {"refresh_every": 0}}},
        "constant decay": {"retraining": {"ast": {"mask_decay_ramp": 1e-6}}},
        "no distillation": {"retraining": {"loop": {"kl_weight": 0.0}}},
        "naive": {"retraining": {"loop": {"kl_weight": 0.0}, "ast": {"mask_decay": 0.0}}},
        "hidden-state loss": {"retraining": {"loop": {"distill": "hidden"}}},
    }
    return [
        Arm(f"ablation: {name}", f"ablation: {name}", ABLATION_TOKENS, _with(full, change))
        for name, change in changes.items()
    ]


def published(start: str, rate: float, *, like: Record | None = None, rebuilt: bool = False) -> Record:
    """AST with the paper's settings as shares of the budget; with samples and batch of another recipe, or its blocks
    rebuilt too.
    """
    loop = _PUBLISHED_LOOP | {"learning_rate": rate}
    samples = 32
    if like is not None:
        samples, loop["batch"] = like["sparsity"]["samples"], like["retraining"]["loop"]["batch"]
    retraining = {"method": "ast", "loop": loop, "ast": _PUBLISHED_AST}
    recipe = _with(_ONE_SHOT, {"sparsity": {"criterion": start, "samples": samples}, "retraining": retraining})
    if rebuilt and like is not None:
        recipe["reconstruction"] = like["reconstruction"]
    return recipe


def cast_recipe(rate: float, decay: float) -> Record:
    """CAST with KL weight 1/3, from the dense weights."""
    retraining = {
        "method": "cast",
        "loop": {"learning_rate": rate, "kl_weight": 1 / 3, "weight_decay": 0.0, "batch": 2},
        "cast": {"l1_decay": decay},
    }
    return _with(_ONE_SHOT, {"retraining": retraining})


def shipped(name: str) -> Record:
    """A recipe of the package, as a record."""
    from compressor.recipe import load_recipe

    record: Record = load_recipe(name).model_dump(mode="json", exclude_none=True)
    if record["quantization"]["values"] == "bfloat16":
        record["quantization"]["embeddings"] = "dense"
    return record


def packing(name: str) -> Record:
    """The last stage of a recipe alone, its blocks' training on their grid included, for a model that is made."""
    record = shipped(name)
    for trains in ("reconstruction", "retraining"):
        record.pop(trains, None)
    return record | {"sparsity": {"criterion": "given"}}


def _with(record: Mapping[str, Any], change: Mapping[str, Any]) -> Record:
    """The record with some entries changed, at any depth."""
    result: Record = deepcopy(dict(record))
    for key, value in change.items():
        inside = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _with(result[key], value) if inside else deepcopy(value)
    return result
