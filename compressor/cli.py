"""The command `compress`: flags and YAML in, a checkpoint out. The only place of this package that prints.

Sub-commands win over model names (write `./inspect` for a folder of that name). Imports are late, so that `--help` and
mistakes in the flags answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from compressor.output import check_replaceable

_EPILOG = """sub-commands:
  compress inspect OUT      what each layer became, and bits per weight
  compress verify OUT       checks hashes, 2:4 positions, shapes and finiteness
  compress export OUT --to TARGET --out DIR   writes it for another runtime: dense, compressed-tensors, gptq, onnx, gguf
  compress import DIR --out OUT               makes the checkpoint again out of an export
  compress plot OUT         draws the retraining, of a run in progress too
  compress fetch MODEL      downloads or converts a model and prints its folder
  compress recipes          lists the recipes that come with halfweight
  compress doctor           which kernel each format would use on this machine

HALFWEIGHT_RECIPE, HALFWEIGHT_OUT, HALFWEIGHT_BUDGET and HALFWEIGHT_TASK in the environment stand in for those flags"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of `compress MODEL`."""
    result = _Parser(
        prog="compress",
        description="Compress a language model: 2:4 sparsity by retraining, int4 or int8 values, packed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG,
    )
    flag = result.add_argument
    flag("model", nargs="?", help="model folder, .gguf file, hub id, or pypi:smollm2-135m-instruct")
    recipe = _env("recipe") or "ast-2of4-int4"
    flag("--recipe", type=os.path.expanduser, default=recipe, help="recipe name or YAML file (default: %(default)s)")
    flag("--out", type=os.path.expanduser, default=_env("out"), help="folder to make")
    flag("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one entry of the recipe")
    flag("--budget", default=_env("budget"), help="bound retraining: 90s, 10m, 2h, 500ktok, 2Mtok")
    flag(
        "--keep-dense",
        action="append",
        default=[],
        metavar="WHICH",
        help="do not prune these layers: a name, 're:PATTERN', or auto:5%% for the most sensitive ones",
    )
    flag("--task", default=_env("task"), metavar="NAME", help="fine-tune for this task (recipes pst-...)")
    flag("--one-shot", action="store_true", help="leave training out: retraining and reconstruction; int4 then by GPTQ")
    flag("--low-memory", action="store_true", help="never hold the model: one weight, or block, at a time")
    flag(
        "--tensorboard",
        type=os.path.expanduser,
        metavar="DIR",
        help="also write the figures of every stage there, for TensorBoard",
    )
    flag("--dry-run", action="store_true", help="check everything, estimate size, memory and time, and stop")
    flag("--print-config", action="store_true", help="print the recipe in full and stop")
    flag("--force", action="store_true", help="replace OUT if it exists")
    flag("--debug", action="store_true", help="show log messages, and tracebacks of errors")
    return result


def _env(flag: str) -> str | None:
    """An empty variable is one that is not set."""
    return os.environ.get(f"HALFWEIGHT_{flag.upper()}") or None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status. A user's mistake gives one line on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries would fill a log with carriage returns
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command = _COMMANDS.get(arguments[0]) if arguments else None
    try:
        return command(arguments[1:]) if command else _compress(arguments)
    except KeyboardInterrupt:
        print("\ncompress: interrupted. The same command goes on where it stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, ArithmeticError) as error:  # the last: training diverged
        if debug:
            raise
        print(f"compress: {error}", file=sys.stderr)
        return 1


def _compress(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.model is None and not options.print_config:
        parser().error("MODEL is missing: name a folder, .gguf file or hub id")
    from compressor.recipe import load_recipe

    untrained: list[str] = []  # what --set says of it counts all the same
    if options.one_shot:
        untrained = ["reconstruction=null", "quantization.reconstruction=null", "quantization.scales=null"]
        if load_recipe(options.recipe).quantization.reconstruction is not None:
            untrained.append("quantization.quantizer=gptq")  # stands in for training on the grid
    one_shot = ["retraining=null"] if options.one_shot else []
    task = [f"task.name={options.task}"] if options.task else []
    settings = [*untrained, *task, *options.set]
    settings += _budget(options.budget, load_recipe(options.recipe, settings))
    recipe = load_recipe(options.recipe, [*settings, *one_shot])
    if options.keep_dense:
        if recipe.sparsity is None:
            raise ValueError(f"--keep-dense given, but recipe {recipe.name!r} prunes nothing: leave it out")
        recipe = recipe.keeping_dense(options.keep_dense)
    if options.print_config:
        import yaml

        print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), end="")
        return 0
    if not options.out:
        parser().error("--out is missing or empty: name the folder to make")
    if options.force:
        check_replaceable(options.out, options.model)
    if options.dry_run:
        return _dry_run(options.model, recipe, options.out, options.force, options.low_memory)
    from compressor.machine import use_threads
    from compressor.pipeline import compress
    from compressor.progress import reporter
    from compressor.retraining.distribution import join, leave
    from compressor.streaming import compress_streaming
    from compressor.tensorboard import scalars

    use_threads(None)
    run = compress_streaming if options.low_memory else compress
    if join()[0]:  # of several processes, the first tells what goes on
        run(options.model, recipe, options.out, force=options.force, report=lambda *_: None)
        leave()
        return 0
    with reporter() as shown, scalars(options.tensorboard, shown) as report:
        result = run(options.model, recipe, options.out, force=options.force, report=report)
    leave()
    _summary(result)
    return 0


def _budget(given: str | None, recipe: Any) -> list[str]:
    """The setting that --budget stands for, or the environment, which does not add a retraining to a recipe either."""
    if not given:
        return []
    if recipe.retraining is not None:
        return [f"retraining.budget={given}"]
    if given != _env("budget"):
        raise ValueError(
            f"--budget bounds retraining, and recipe {recipe.name!r} has none: leave it out, or take a recipe that "
            "retrains (see compress recipes)"
        )
    logging.getLogger(__name__).warning("HALFWEIGHT_BUDGET is left out: recipe %r has no retraining", recipe.name)
    return []


def _dry_run(model: str, recipe: Any, out: str, force: bool, low_memory: bool) -> int:
    from compressor.interrupted import check_work_folder
    from compressor.models import fetch_model
    from compressor.output import OutputFolder
    from compressor.preflight import check, try_one_layer
    from compressor.recipe import check_streamable
    from compressor.sparse_model import work_folder

    OutputFolder(out, force=force).check()
    if low_memory:
        check_streamable(recipe)
    plan = check(fetch_model(model), recipe, Path(out), low_memory=low_memory)
    if not low_memory:
        check_work_folder(work_folder(Path(out).absolute()), recipe, plan)
    formats = sorted({f"{s.format} (group {s.group_size})" for s in plan.schemes.values()})
    print(f"model      {model}: {plan.model_type}, {plan.parameters / 1e6:.1f} M parameters")
    print(f"layers     {len(plan.schemes)} packed: {', '.join(formats)}")
    print(f"one layer  {try_one_layer(plan)}")
    print(f"size       {plan.dense_bytes / 1e6:.1f} MB -> about {plan.packed_bytes / 1e6:.1f} MB")
    print(f"memory     about {plan.memory_bytes / 1e9:.1f} GB while compressing")
    print(f"disk       about {plan.disk_bytes / 1e9:.2f} GB for output and resume files")
    unknown = "as long as the text is" if recipe.trains_on_text or recipe.fine_tunes else "none"
    print(f"training   {unknown if plan.seconds is None else f'about {plan.seconds / 60:.0f} min'}")
    for note in plan.notes:
        print(f"note       {note}")
    print("nothing was written")
    return 0


def _summary(result: Any) -> None:
    dense, packed = result.plan.dense_bytes, result.stored_bytes
    print(f"{result.out}: {packed / 1e6:.1f} MB, {packed / dense:.2f} of the dense {dense / 1e6:.1f} MB")
    for key, value in result.figures.items():
        print(f"  {key.replace('_', ' ')}: {value}")
    for note in result.plan.notes:
        print(f"  note: {note}")
    print(f"next: serve {result.out}")


def _inspect(arguments: Sequence[str]) -> int:
    options = _folder_parser("inspect", "Print what each layer became.").parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    from compressor.inspection import inspect

    report = inspect(options.folder)
    table = Table("layers", "format", "group", "shape", "bits/weight", "MB", title=f"{options.folder}")
    for row in report.rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(
            row.layers, row.format, row.group, shape, f"{row.bits_per_weight:.3f}", f"{row.stored_bytes / 1e6:.2f}"
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"{report.parameters / 1e6:.1f} M parameters in {report.stored_bytes / 1e6:.1f} MB: "
        f"{8 * report.stored_bytes / report.parameters:.2f} bits a parameter, "
        f"{2 * report.parameters / report.stored_bytes:.2f} x smaller than bf16"
    )
    return 0


def _verify(arguments: Sequence[str]) -> int:
    options = _folder_parser("verify", "Check a checkpoint: hashes, 2:4, shapes, finiteness.").parse_args(arguments)
    from compressor.inspection import verify

    report = verify(options.folder)
    print(
        f"{options.folder}: {report.files} files match their SHA-256; {report.packed} packed layers valid, "
        f"{report.sparse} of them exactly 2:4 ({report.groups:,} groups of four, at most two non-zeros in each); "
        f"{report.tensors} tensors finite"
    )
    return 0


def _export(arguments: Sequence[str]) -> int:
    result = _folder_parser("export", "Write a checkpoint, or a dense model folder, for another runtime.")
    result.add_argument("--to", required=True, metavar="TARGET", help="dense, compressed-tensors, gptq, onnx or gguf")
    result.add_argument("--out", required=True, type=_folder, metavar="DIR", help="folder to make")
    result.add_argument("--allow-lossy", action="store_true", help="go on where the target cannot hold everything")
    result.add_argument("--force", action="store_true", help="replace DIR if it exists")
    options = result.parse_args(arguments)
    from compressor.exports import export_checkpoint

    if options.force:
        check_replaceable(options.out, options.folder)
    for loss in export_checkpoint(
        options.folder, options.to, options.out, allow_lossy=options.allow_lossy, force=options.force
    ):
        print(f"lost: {loss}")
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.1f} MB for {options.to}")
    return 0


def _import(arguments: Sequence[str]) -> int:
    result = _folder_parser("import", "Make the checkpoint again that a folder was exported from.", metavar="DIR")
    result.add_argument("--out", required=True, type=_folder, metavar="OUT", help="folder to make")
    result.add_argument("--force", action="store_true", help="replace OUT if it exists")
    options = result.parse_args(arguments)
    from compressor.exports import import_checkpoint

    if options.force:
        check_replaceable(options.out, options.folder)
    missed = import_checkpoint(options.folder, options.out, force=options.force)
    print(f"{options.out}: imported" + (f"; {len(missed)} layers are dense now: {missed[0]}, ..." if missed else ""))
    return 0


def _plot(arguments: Sequence[str]) -> int:
    result = _folder_parser("plot", "Draw loss, masks, learning rate and speed over the tokens of a retraining.")
    result.add_argument("--out", type=Path, metavar="FILE", help="SVG file to make (default: OUT-training.svg)")
    options = result.parse_args(arguments)
    from compressor.plot import metrics_file, training_page

    folder = options.folder.absolute()
    page = training_page(metrics_file(folder), folder.name)
    file = options.out or folder.with_name(f"{folder.name}-training.svg")
    file.write_text(page)
    print(file)
    return 0


def _fetch(arguments: Sequence[str]) -> int:
    options = _folder_parser("fetch", "Download or convert a model and print its folder.", "MODEL").parse_args(
        arguments
    )
    from compressor.models import fetch_model

    print(fetch_model(str(options.folder)))
    return 0


def _recipes(arguments: Sequence[str]) -> int:
    _Parser(prog="compress recipes", description="List the recipes that come with halfweight.").parse_args(arguments)
    from compressor.recipe import load_recipe, recipe_names

    for name in recipe_names():
        print(f"{name:24} {load_recipe(name).description}")
    return 0


def _doctor(arguments: Sequence[str]) -> int:
    _Parser(prog="compress doctor", description="Print which kernels this machine would use.").parse_args(arguments)
    from compressor.inspection import doctor

    for key, value in doctor().items():
        print(f"{key:16} {value}")
    return 0


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty: name the folder to make")
    return Path(text).expanduser()


def _folder_parser(command: str, description: str, metavar: str = "OUT") -> argparse.ArgumentParser:
    result = _Parser(prog=f"compress {command}", description=description)
    result.add_argument("folder", type=str if command == "fetch" else Path, metavar=metavar)
    result.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return result


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "inspect": _inspect,
    "verify": _verify,
    "export": _export,
    "import": _import,
    "plot": _plot,
    "fetch": _fetch,
    "recipes": _recipes,
    "doctor": _doctor,
}
