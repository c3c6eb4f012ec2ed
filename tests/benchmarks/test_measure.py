from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import QualitySettings, SpeedSettings, in_own_process, perplexity, speed, status_bytes, summary
from benchmarks.texts import read_windows
from compressor.models import load_model, load_tokenizer


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_compressed"])
def test_perplexity_is_that_of_transformers(name: str, prose: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    settings = QualitySettings(text=str(prose), window=48, max_tokens=480)
    seen: list[tuple[int, int]] = []
    found = perplexity(folder, settings, lambda done, total: seen.append((done, total)))
    tokens_NL = read_windows(str(prose), load_tokenizer(folder), window=48, max_tokens=480, wikitext=False).tokens
    with torch.no_grad():
        logits_NLV = load_model(folder)(tokens_NL).logits.float()
    loss = F.cross_entropy(logits_NLV[:, :-1].flatten(0, 1), tokens_NL[:, 1:].flatten()).item()
    assert found["mean_nll"] == pytest.approx(loss, abs=0.01)
    assert found["perplexity"] == pytest.approx(math.exp(found["mean_nll"]))
    assert (found["windows"], found["tokens"]) == (10, 470)
    assert seen[-1] == (10, 10)


def test_speed_measures_what_it_says(tiny_llama: Path) -> None:
    settings = SpeedSettings(prefill_tokens=64, prompt_tokens=16, output_tokens=8, repeats=2)
    found = speed(tiny_llama, settings, lambda done, total: None)
    model = load_model(tiny_llama)
    assert found["weight_bytes"] == pytest.approx(sum(p.nbytes for p in model.parameters()), rel=0.05)
    assert found["peak_rss_bytes"] >= found["rss_before_loading_bytes"] > 0
    for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_seconds", "load_seconds"):
        assert 0 < found[key] < 1e7


def test_own_process_has_its_own_peak(tiny_llama: Path) -> None:
    ballast = torch.ones(150 << 20, dtype=torch.uint8)
    settings = SpeedSettings(prefill_tokens=16, prompt_tokens=8, output_tokens=4, repeats=1)
    found = in_own_process("speed", tiny_llama, settings)
    assert found["peak_rss_bytes"] < status_bytes("VmHWM")
    assert ballast.numel()


def test_a_model_that_cannot_be_measured_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"perplexity of .* could not be measured: ") as caught:
        in_own_process("perplexity", tmp_path, QualitySettings())
    assert "\n" not in str(caught.value)


def test_summary_gives_the_error_of_the_mean_and_refuses_nan() -> None:
    found = summary([1.0, 2.0, 3.0])
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["stderr_nll"] == pytest.approx(1 / math.sqrt(3))
    assert summary([1.0])["stderr_nll"] is None
    with pytest.raises(ValueError, match="not finite"):
        summary([1.0, math.nan])
