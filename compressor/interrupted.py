"""What a work folder says of the run that it belongs to, so that no other run goes on from it or deletes it.

Only what decides the weights that are kept there counts. Quantisation comes after them, and may change, but where they
train on its grid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import sha256_of
from compressor.preflight import Plan
from compressor.recipe import Recipe, parse_budget
from compressor.solvers import SOLVERS

_RECORD, _SNAPSHOTS, _BLOCKS = "run.json", "snapshots", "reconstruct"


def check_work_folder(work: Path, recipe: Recipe, plan: Plan, tokens: int | None = None) -> int | None:
    """Returns `tokens`, the most that are read of the text, or those of the same run before: they may be estimated.

    Raises:
        ValueError: the folder holds what another run has trained so far.
    """
    trained, rebuilt = (work / _SNAPSHOTS).is_dir(), (work / _BLOCKS).is_dir()
    file, differing = work / _RECORD, []
    if file.is_file():
        record, now = json.loads(file.read_text()), _decides(recipe, plan)
        before = record["decides"]
        if before == now:
            return record["tokens"]
        if not trained:  # blocks are rebuilt before the retraining
            before |= {key: now.get(key) for key in ("retraining", "grid")}
        differing = list(_differences(before, now))
    elif recipe.retraining is None:  # a version that wrote no record
        differing = ["retraining"]
    if differing and (trained or (rebuilt and file.is_file())):
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{work} holds an interrupted run with another {', '.join(differing[:3])}{more}. Give the settings that it "
            f"was started with, name another folder with --out, or delete {work}."
        )
    return tokens


def claim_work_folder(work: Path, recipe: Recipe, plan: Plan, tokens: int | None = None) -> None:
    """Notes which run a checked work folder belongs to, if it is to keep any training."""
    file = work / _RECORD
    unnamed = (work / _SNAPSHOTS).is_dir() and not file.is_file()  # whether they are this run's is not known
    if unnamed or (recipe.retraining is None and recipe.reconstruction is None):
        return
    record = json.dumps({"decides": _decides(recipe, plan), "tokens": tokens}, indent=1)
    if file.is_file() and file.read_text() == record:
        return
    work.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(record)
    os.replace(part, file)


def _decides(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What decides the weights that are kept."""
    record = recipe.model_dump(mode="json", include={"seed", "ignore", "sparsity", "reconstruction"})
    record["model"] = [sha256_of(file) for file in sorted(plan.folder.glob("*.safetensors"))]
    record["overrides"] = [[*each.layers, each.sparsity] for each in recipe.overrides if each.sparsity is not None]
    if recipe.sparsity is not None and recipe.sparsity.criterion in SOLVERS:  # their last bits follow from the threads
        record["OMP_NUM_THREADS"] = torch.get_num_threads()
    record["text"] = record["task"] = record["retraining"] = None
    if recipe.uses_text:
        path = Path(recipe.text.source).expanduser()
        record["text"] = recipe.text.model_dump(mode="json") | ({"source": sha256_of(path)} if path.is_file() else {})
    if recipe.task is not None and plan.task is not None:
        used = recipe.task.model_dump(mode="json", include={"name", "teacher", "length", "label_smoothing"})
        record["task"] = used | {"examples": plan.task.sha256()}
    settings = recipe.retraining
    if settings is not None:
        of_text, of_tasks = {"ast", "cast", "validation_blocks"}, {"pst", "heads_and_neurons"}
        unused = of_text if recipe.fine_tunes else of_tasks | ({"ast", "cast"} - {settings.method})
        budget = asdict(parse_budget(settings.budget))
        record["retraining"] = settings.model_dump(mode="json", exclude=unused) | {"budget": budget}
        if settings.loop.quantize_share:  # then it trains on the grid
            record["grid"] = {name: asdict(scheme) for name, scheme in plan.schemes.items()}
    return json.loads(json.dumps(record))


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """The keys, with dots, under which two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in {**before, **now}:
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield key
