"""`python -m benchmarks NAME ...`: the front of every measurement; each name imports its module only when it is run."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

BENCHMARKS = {
    "compare": (
        "benchmarks.compare",
        "dense against compressed: size, memory, speed, perplexity; table, JSON and page",
    ),
    "quality": ("benchmarks.quality", "perplexity of models on held-out text, through the engine that serves them"),
    "retraining": (
        "benchmarks.retraining",
        "retraining methods at equal tokens: published, CAST, ours; ablation; cost",
    ),
    "pst": ("benchmarks.pst", "PST against dense, magnitude and movement fine-tuning; its cost; its score"),
    "kernels": ("benchmarks.kernels", "time and bandwidth of each kernel, per shape and batch, against dense"),
    "throughput": ("benchmarks.throughput", "one stream: prefill and decode against llama.cpp and dense bf16"),
    "serving": ("benchmarks.serving", "many streams over HTTP against other servers; start and memory"),
    "flood": ("benchmarks.flood", "hundreds of clients at once, a third hanging up: errors, leaks, memory"),
    "exports": ("benchmarks.exports", "each export in its real consumer, against the dense export in the same one"),
    "packing": ("benchmarks.packing", "memory and time of packing a model of a billion weights without holding it"),
    "demo": ("benchmarks.demo", "the whole story on SmolLM2-135M-Instruct: compress, serve, ask, compare"),
    "report": ("benchmarks.report", "show a saved comparison again: as a table, as Markdown, as a page"),
}


def usage() -> str:
    """What `python -m benchmarks --help` prints."""
    names = "\n".join(f"  {name:10} {sentence}" for name, (_, sentence) in BENCHMARKS.items())
    return (
        f"usage: python -m benchmarks NAME [--quick] [--json FILE] ...\n\n{names}\n\n"
        "python -m benchmarks NAME --help shows the flags of one of them"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark; a user's mistake gives one line on standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in BENCHMARKS:
        print(f"python -m benchmarks: no benchmark {name!r}; accepted: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    run: Callable[[list[str]], int | None] = importlib.import_module(BENCHMARKS[name][0]).main
    try:
        return run(rest) or 0
    except KeyboardInterrupt:
        print(f"\npython -m benchmarks {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left (`| head`): nothing more to say, and nothing to flush at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks {name}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
