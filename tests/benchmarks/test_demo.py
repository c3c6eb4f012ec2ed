from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.demo import Story, ask, free_port, shown


def test_stages_are_reused_until_command_or_input_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("1")
    grow = f"open({str(output)!r}, 'a').write('x')"
    command = ["python", "-c", grow]

    def stage(words: list[str], fresh: bool = False) -> str:
        Story(tmp_path, fresh).run("grow", output, words, inputs=[source])
        return output.read_text()

    assert stage(command) == "x"
    assert stage(command) == "x"
    assert "is there from before" in capsys.readouterr().out
    source.write_text("2")
    assert stage(command) == "xx"
    assert stage([*command, "more"]) == "xxx"
    assert stage([*command, "more"], fresh=True) == "xxxx"
    output.unlink()
    assert stage([*command, "more"]) == "x"


def test_one_answer_streams_through_the_openai_client(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(tiny_llama, tmp_path / "serve.log")
    text = capsys.readouterr().out
    assert text.startswith("you: What is the capital of France")
    assert "tokens in" in text


def test_a_server_that_does_not_start_is_said_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the server did not start .*serve.log\): .*config.json"):
        ask(tmp_path / "empty", tmp_path / "serve.log")


def test_commands_are_shown_as_people_type_them() -> None:
    assert shown(["/any/where/compress", "a b", "--out", "x"]) == "compress 'a b' --out x"
    assert 1024 < free_port() < 65536
    assert sys.executable
