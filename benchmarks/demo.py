"""`make demo`: the whole story on a model that any machine with a package index can have.

Every stage is a public command in a process of its own; what it prints streams through. Finished stages are not run
again as long as their command is the same (`--fresh` runs all of them).
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import make_record, parser, read_record, write_record

MODEL = "pypi:smollm2-135m-instruct"
BUDGET, QUICK_BUDGET = "4m", "15s"
QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_TOKENS = 80
START_SECONDS = 120


@dataclass
class Story:
    """The demo's folder, and what each stage took."""

    folder: Path
    fresh: bool
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def ledger(self) -> Path:
        """Which command made each finished stage."""
        return self.folder / "stages.json"

    def run(self, title: str, output: Path, command: Sequence[str], inputs: Sequence[Path] = ()) -> None:
        """Runs a stage, unless its output is there from the same command on the same inputs."""
        identity = [*command, *(_digest(path) for path in inputs)]
        done = json.loads(self.ledger.read_text()) if self.ledger.is_file() else {}
        if not self.fresh and output.exists() and done.get(output.name) == identity:
            _heading(title, shown(command))
            print(f"{output} is there from before and is used again (make demo FRESH=1 makes it anew)", flush=True)
            return
        command = [*command, *["--force"] * output.is_dir()]
        _heading(title, shown(command))
        with self.timed(title):
            subprocess.run(_located(command), check=True)
        done[output.name] = identity
        self.ledger.write_text(json.dumps(done, indent=1) + "\n")

    @contextmanager
    def timed(self, title: str) -> Iterator[None]:
        """Notes how long a stage takes."""
        start = time.monotonic()
        yield
        self.stages[title] = time.monotonic() - start


def main(argv: Sequence[str]) -> int:
    """Parses the flags and tells the story."""
    flags = parser(
        "demo", "Compress SmolLM2-135M-Instruct in two ways, serve it, ask it, compare it with the original."
    )
    flags.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: %(default)s)")
    flags.add_argument("--fresh", action="store_true", help="make everything anew")
    flags.add_argument("--budget", help=f"wall time of retraining, or tokens (default: {BUDGET})")
    flags.add_argument("--started", type=float, default=time.time(), help="when `make demo` began, in Unix time")
    options = flags.parse_args(list(argv))
    folder = options.out / "quick" if options.quick else options.out
    folder.mkdir(parents=True, exist_ok=True)
    story = Story(folder, options.fresh)
    story.stages["install"] = max(time.time() - options.started, 0.0)
    try:
        tell(story, options.budget or (QUICK_BUDGET if options.quick else BUDGET), options.quick)
    except subprocess.CalledProcessError as error:
        print(f"\nthe demo stopped: {shown(error.cmd)} ended with status {error.returncode}", file=sys.stderr)
        print("finished stages are kept; the same command goes on from here", file=sys.stderr)
        return 1
    closing(story)
    if options.json:
        write_record(options.json, demo_record(story, argv))
        print(f"wrote {options.json}")
    return 0


def tell(story: Story, budget: str, quick: bool) -> None:
    """The story: fetch, prune in one shot, retrain, serve and ask, compare."""
    one_shot, model, report = story.folder / "one-shot", story.folder / "model", story.folder / "report.json"
    fetch(story)
    compress = ["compress", MODEL, "--recipe"]
    story.run("one-shot", one_shot, [*compress, "one-shot-2of4-int4", "--out", str(one_shot)])
    story.run("retrain", model, [*compress, "ast-2of4-int4", "--budget", budget, "--out", str(model)])
    _heading("serve", f"serve {model}, and a question through the openai client")
    with story.timed("serve"):
        ask(model, story.folder / "serve.log")
    page = report.with_suffix(".html")
    compare = ["python", "-m", "benchmarks", "compare", MODEL, str(one_shot), str(model)]
    compare += ["--json", str(report), "--html", str(page), *["--quick"] * quick]
    story.run("compare", report, compare, inputs=[one_shot / "manifest.json", model / "manifest.json"])
    if "compare" not in story.stages:
        from benchmarks.table import print_table

        print_table(read_record(report, "compare"))


def fetch(story: Story) -> None:
    """Downloads the dense model on the first run, and prints its folder."""
    command = ["compress", "fetch", MODEL]
    _heading("fetch", shown(command))
    with story.timed("fetch"):
        subprocess.run(_located(command), check=True)


def ask(model: Path, log: Path) -> None:
    """Serves a model on a free port, streams one answer to the terminal, and stops the server."""
    port = free_port()
    command = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen(_located(command), stdout=output, stderr=output) as server:
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
            stream_answer(f"http://127.0.0.1:{port}/v1", lambda text: print(text, end="", flush=True))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


def stream_answer(base_url: str, write: Callable[[str], None]) -> None:
    """One chat answer, word by word as it comes."""
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none", timeout=120)
    name = client.models.list().data[0].id
    write(f"you: {QUESTION}\n{name}: ")
    start, usage = time.monotonic(), None
    with client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            if chunk.choices:
                write(chunk.choices[0].delta.content or "")
            usage = chunk.usage or usage
    count = usage.completion_tokens if usage else 0
    write(f"\n({count} tokens in {time.monotonic() - start:.1f} s over HTTP)\n")


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns once the server answers; ValueError with its last words if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    last = (log.read_text().strip() or "it printed nothing").splitlines()[-1]
    raise ValueError(f"the server did not start ({log}): {last}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def closing(story: Story) -> None:
    """What there is now, how long it took, and what to try next."""
    parts = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in story.stages.items() if seconds >= 1)
    minutes = sum(story.stages.values()) / 60
    model, page = story.folder / "model", story.folder / "report.html"
    _heading("done", f"{minutes:.1f} minutes ({parts})")
    print(f"the page with plots    {page}")
    print(f"what each layer became compress inspect {model}")
    print(f"talk with it           serve chat {model}")
    print("your own model         compress MODEL --recipe ast-2of4-int4 --budget 2h --out OUT")
    print("(commands are in .venv/bin; `source .venv/bin/activate` puts them on the path)")


def demo_record(story: Story, argv: Sequence[str]) -> dict[str, object]:
    """Seconds of every stage that ran, beside the comparison's headline."""
    comparison = read_record(story.folder / "report.json", "compare")
    rows = [{"stage": title, "seconds": round(seconds, 1)} for title, seconds in story.stages.items()]
    return make_record("demo", argv, rows, comparison["headline"] | {"seconds": sum(story.stages.values())})


def shown(command: Sequence[str]) -> str:
    """A command as a person types it."""
    words = [Path(command[0]).name if index == 0 else word for index, word in enumerate(command)]
    return shlex.join(words)


def _located(command: Sequence[str]) -> list[str]:
    """The command of this environment, whatever the path says."""
    if command[0] == "python":
        return [sys.executable, *command[1:]]
    beside = Path(sys.executable).with_name(command[0])
    found = str(beside) if beside.is_file() else shutil.which(command[0])
    if found is None:
        raise ValueError(f"the command {command[0]!r} is not installed; run `make demo`, or pip install -e .")
    return [found, *command[1:]]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _heading(title: str, text: str) -> None:
    print(f"\n== {title}: {text}", flush=True)
