from __future__ import annotations

from importlib.util import find_spec

import pytest

from benchmarks.__main__ import BENCHMARKS, main


@pytest.mark.parametrize("module", [module for module, _ in BENCHMARKS.values()])
def test_every_name_has_its_module(module: str) -> None:
    assert find_spec(module) is not None


@pytest.mark.parametrize("name", ["compare", "quality", "demo"])
def test_every_benchmark_has_the_two_common_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert "--quick" in shown and "--json FILE" in shown


def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert "no benchmark 'nonsense'; accepted: compare" in capsys.readouterr().err
    assert main(["compare", "no/such-place", "nowhere/at/all"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m benchmarks compare: ") and error.count("\n") == 1
    assert main([]) == 2
