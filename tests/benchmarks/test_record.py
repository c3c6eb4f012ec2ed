from __future__ import annotations

import json
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.record import (
    alone,
    check_settings,
    last_level_cache,
    machine_sentence,
    make_record,
    read_bandwidth,
    read_record,
    stamp,
    write_record,
)


def test_record_says_where_how_and_what(tmp_path: Path) -> None:
    record = make_record("quality", ["a model", "--quick"], [{"model": "m", "perplexity": 3.5}], {"perplexity": 3.5})
    assert record["command"] == "python -m benchmarks quality 'a model' --quick"
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["read_bandwidth_bytes_per_s"] > 1e8
    assert set(record["versions"]) == {"python", "halfweight", "torch", "transformers"}
    assert "cores" in machine_sentence(record)
    write_record(tmp_path / "deep" / "r.json", record)
    assert read_record(tmp_path / "deep" / "r.json", "quality") == record
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


def test_a_row_says_when_and_on_what_it_was_made() -> None:
    made = stamp()["made"]
    assert abs(datetime.now(UTC) - datetime.fromisoformat(made["date"])) < timedelta(minutes=5)
    assert made["threads"] >= 1
    assert made["device"].strip(", ")


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "3", None])
def test_headline_takes_plain_numbers_only(value: object) -> None:
    with pytest.raises(ValueError, match="headline 'x'"):
        make_record("compare", [], [], {"x": value})  # type: ignore[dict-item]


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text("not json")
    with pytest.raises(ValueError, match="not a JSON record"):
        read_record(file, "compare")
    file.write_text(json.dumps({"name": "quality"}))
    with pytest.raises(ValueError, match="no record of `python -m benchmarks compare`"):
        read_record(file, "compare")


def test_bandwidth_counts_the_bytes_that_were_read() -> None:
    assert 1e8 < read_bandwidth(1 << 24) < 1e13
    assert last_level_cache() is None or last_level_cache() >= 1 << 15  # type: ignore[operator]


def test_paths_of_this_machine_stay_here() -> None:
    record = make_record("serving", ["demo/model", "--gguf", "/home/me/model.gguf"], [], {})
    assert record["command"] == "python -m benchmarks serving demo/model --gguf model.gguf"


def test_rows_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    check_settings(file, "pst", {"epochs": 3.0})
    write_record(file, make_record("pst", [], [], {}, settings={"epochs": 1.0, "examples": None}))
    check_settings(file, "pst", {"epochs": 1.0, "examples": None, "test": 5})
    with pytest.raises(ValueError, match=r"r\.json holds rows made with epochs 1\.0; give another file"):
        check_settings(file, "pst", {"epochs": 3.0, "examples": None})


def test_two_writers_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    order: list[str] = []

    def second() -> None:
        with alone(file):
            order.append("second")

    with alone(file):
        other = threading.Thread(target=second)
        other.start()
        time.sleep(0.1)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []
