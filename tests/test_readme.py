"""Whatever the README tells to type exists: commands, flags, recipe entries, files, targets, the table's figures."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel

from benchmarks.record import read_record
from benchmarks.table import markdown
from compressor.calibration import LayerStats
from compressor.recipe import Recipe, load_recipe, parse_budget

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = "compressor/criteria/root_magnitude.py"
MODULES = {"compress": "compressor", "serve": "serve"}


def fenced() -> list[tuple[str, str]]:
    """(language, text) of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in fenced() if name == language]


def commands() -> list[str]:
    """Every command line of the README: from plain code blocks, and from inline code."""
    lines = [line for block in blocks("") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    prose = re.sub(r"^```\w*\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    known = ("compress", "serve", "make", "python")
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose) if code.split()[0] in known and " " in code]
    return [line.partition(" #")[0].strip() for line in [*lines, *inline]]


@cache
def usage(module: str, *subcommand: str) -> str:
    command = [sys.executable, "-m", module, *subcommand, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def flags_of(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_its_flags(command: str) -> None:
    words = shlex.split(command)
    if words[:3] == [".venv-vllm/bin/python", "-m", "serve"]:
        words = words[2:]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[0] in MODULES:
        subcommands = re.findall(rf"^  {words[0]} ([a-z]+) ", usage(MODULES[words[0]]), flags=re.MULTILINE)
        own = [words[1]] if words[1] in subcommands else []
        shown = usage(MODULES[words[0]], *own)
        assert all(flag in shown for flag in flags_of(words)), command
    elif words[:3] == ["python", "-m", "benchmarks"]:
        shown = usage("benchmarks", words[3])
        assert all(flag in shown for flag in flags_of(words)), command
    else:
        assert words[0] in ("curl", "pip", "source"), f"a command that no test knows: {command}"


def test_the_readme_holds_commands_of_every_kind() -> None:
    assert {shlex.split(command)[0] for command in commands()} >= {"compress", "serve", "make", "python", "curl", "pip"}
    assert len(commands()) > 15


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("compress ") and "--recipe " in c])
def test_recipes_budgets_and_entries_are_accepted(command: str) -> None:
    words = shlex.split(command)
    given = dict(itertools.pairwise(words))
    if given["--recipe"] != "R":
        assert load_recipe(given["--recipe"]).quantization
    if "--budget" in given:
        parse_budget(given["--budget"])
    for entry in (after for flag, after in itertools.pairwise(words) if flag == "--set"):
        section, key = entry.partition("=")[0].split(".")[:2]
        kind = Recipe.model_fields[section].annotation
        inner = [kind, *get_args(kind)]
        assert any(key in one.model_fields for one in inner if isinstance(one, type) and issubclass(one, BaseModel))


def test_files_that_are_named_exist() -> None:
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    paths = re.findall(r"`((?:compressor|serve|benchmarks|docs|tests)/[\w./-]+)`", README)
    assert links and paths
    missing = [name for name in [*links, *paths] if name != EXAMPLE and not (ROOT / name).exists()]
    assert missing == []


def test_the_example_criterion_works() -> None:
    source = next(block for block in blocks("python") if "def score" in block)
    space: dict[str, object] = {}
    exec(compile(source, EXAMPLE, "exec"), space)
    score = space["score"]
    weight, stats = torch.randn(4, 8), LayerStats(input_norm=torch.arange(8.0), tokens=1)
    assert callable(score)
    assert score(weight, stats).equal(weight.abs() * torch.arange(8.0).sqrt())
    with pytest.raises(ValueError, match="needs calibration text"):
        score(weight)


def test_the_table_is_the_committed_measurement() -> None:
    """Figures without a record are as wrong as figures that differ from it."""
    found = re.search(r"<!-- table: .*? -->\n(.*?)<!-- /table -->", README, flags=re.DOTALL)
    assert found is not None
    record = ROOT / "benchmarks" / "results" / "compare.json"
    assert found[1].strip() == (markdown(read_record(record, "compare")).strip() if record.exists() else "")
