"""The quantisers' arms: what is in the table, and how it is measured."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import packing, quantisers
from benchmarks.record import read_record
from compressor.models import load_model, skeleton


def test_every_arm_once_and_the_headline_first() -> None:
    table = list(quantisers.arms(True))
    labels = [arm.label for arm in table]
    assert len(set(labels)) == len(labels)
    assert {"dense RTN int4", "2:4 GPTQ int4", "2:4 stock GPTQ int4", "2:4 AWQ int8", "dense llama.cpp Q2_K"} <= set(
        labels
    )
    first = [arm.label for arm in sorted(table, key=quantisers._turn)]
    assert first.index("2:4 GPTQ int4") < first.index("dense RTN int8") < first.index("dense GPTQ act-order int4")


def test_stock_gptq_is_not_told_of_the_mask() -> None:
    stock, ours = (quantisers._recipe(quantisers.Arm("2:4", method, "int4")) for method in ("stock GPTQ", "GPTQ"))
    assert "sparsity" not in stock and ours["sparsity"] == {"criterion": "magnitude"}
    assert stock["quantization"] == ours["quantization"]


def test_the_headline_has_what_was_measured() -> None:
    rows = [{"arm": "2:4 GPTQ int4", "mean_nll": 4.0}, {"arm": "2:4 RTN int4", "mean_nll": 4.5}]
    assert quantisers._headline(rows) == {
        "gptq24_vs_rtn24_log_ppl": -0.5,
        "bits_per_weight_sparse24_int4_g128": 3.125,
    }


def test_the_documented_table_is_the_record() -> None:
    root = Path(__file__).parents[2]
    rows = read_record(root / "benchmarks" / "results" / "quality.json", "quality")["rows"]
    assert [row["arm"] for row in rows] == [arm.label for arm in quantisers.arms(True)]
    assert quantisers.markdown(rows) in (root / "docs" / "quantisers.md").read_text()


def test_llamas_files_show_their_tensors_and_masks_their_state() -> None:
    row = {"arm": "a", "perplexity": 2.0, "mean_nll": 0.7, "stderr_nll": 0.1, "bits_per_weight": 4.5, "bytes": 1e6}
    assert quantisers._cells(row | {"tensor_types": {"Q4_0": 3, "Q5_K": 1}})[-1] == "3 Q4_0, 1 Q5_K"
    assert quantisers._cells(row | {"mask_intact": False, "groups_2_of_4": 0.9})[-1] == "broken (10.0% of groups)"
    assert quantisers._cells(row | {"mask_intact": True, "groups_2_of_4": 1.0})[-1] == "intact"


def test_losses_are_those_of_the_model(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    windows = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))
    found = quantisers.perplexity_losses(model, windows)
    with torch.no_grad():
        wanted = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert found.tolist() == pytest.approx(wanted, abs=0.02)


def test_the_random_model_has_the_geometry_it_says(tmp_path: Path) -> None:
    assert sum(math.prod(shape) for _, shape in packing.shapes(packing.TINY_LLAMA)) == 1_100_048_384
    geometry = packing.TINY_LLAMA | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "vocab_size": 99,
        "num_hidden_layers": 2,
    }
    packing.make_random_model(tmp_path / "model", geometry)
    parameters = dict(skeleton(tmp_path / "model").named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == dict(packing.shapes(geometry))


@pytest.mark.full
def test_packing_is_measured(tmp_path: Path) -> None:
    geometry = packing.TINY_LLAMA | {"hidden_size": 256, "vocab_size": 512, "num_hidden_layers": 1}
    packing.make_random_model(tmp_path / "model", geometry)
    row = packing.measure(tmp_path / "model", tmp_path / "out")
    assert 0 < row["packed_bytes"] < row["dense_bytes"]
    assert row["peak_bytes"] >= row["import_bytes"] > 0
    assert row["floor_seconds"] > 0
