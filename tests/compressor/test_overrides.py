"""Recipes that treat layers differently: patterns, stored values, layers left dense; the engine serves the result."""

from pathlib import Path

import pytest
import torch
import yaml

from compressor.checkpoint import Checkpoint
from compressor.cli import main
from compressor.formats import make_format
from compressor.inspection import packed_modules, verify
from compressor.masks import MaskShape
from compressor.recipe import RecipeError, load_recipe, parse_recipe
from tests.tiny import make_tiny_model

MIXED = {
    "sparsity": {"criterion": "sparsegpt", "samples": 8, "keep_dense": [r"re:.*\.v_proj"]},
    "quantization": {"values": "int4", "quantizer": "gptq", "samples": 8, "group_size": 32},
    "overrides": [
        {"layers": [r"re:.*layers\.0\..*\.k_proj"], "sparsity": "4:8", "values": "int8"},
        {"layers": [r"re:.*\.down_proj"], "sparsity": "50%", "group_size": "row"},
        {"layers": [r"re:.*\.(gate|up)_proj"], "sparsity": "1:4"},
        {"layers": [r"re:.*\.o_proj"], "sparsity": "dense", "values": "bfloat16"},
    ],
}


@pytest.fixture(scope="module")
def mixed(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**MIXED, "text": {"source": str(prose), "length": 64}}))
    arguments = [str(tiny_llama), "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / "out")]
    assert main(arguments) == 0
    return folder / "out"


def test_each_layer_is_stored_as_its_override_says(mixed: Path) -> None:
    checkpoint = Checkpoint.open(mixed)
    schemes, recipe = packed_modules(checkpoint), parse_recipe(MIXED)
    block = "model.layers.0."
    found = {name.removeprefix(block): scheme for name, scheme in schemes.items() if name.startswith(block)}
    formats = {name.rpartition(".")[2]: (scheme.format, scheme.group_size) for name, scheme in found.items()}
    assert formats == {
        "q_proj": ("sparse24_int4", 32), "k_proj": ("int8", 32), "v_proj": ("int4", 32), "o_proj": ("dense", -1),
        "gate_proj": ("sparse24_int4", 32), "up_proj": ("sparse24_int4", 32), "down_proj": ("int4", -1),
    }  # fmt: skip
    assert schemes["model.layers.1.self_attn.k_proj"].format == "sparse24_int4"
    for name, scheme in schemes.items():
        shape = recipe.mask_shape(name) if name.startswith("model.layers") else None
        weight = make_format(scheme).unpack(
            {key: tensor for key, tensor in checkpoint.module(name).items() if key.startswith("weight")}
        )
        if shape is None:
            assert float((weight == 0).float().mean()) < 0.2
        else:
            shape.check_weight(weight)
    assert verify(mixed).sparse == 7
    assert "| pruned | 3 x 2:4, 1 x 4:8, 4 x 1:4, 2 x 50% |" in (mixed / "README.md").read_text()


def assert_the_engine_agrees_with_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compressor.models import quiet_transformers
    from serve.engine.llm_engine import LLMEngine
    from serve.engine.sampling_params import SamplingParams

    prompt = [5, 100, 42, 7, 33, 60]
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    (output,) = engine.generate([prompt], params)
    assert output.token_ids == [int(expected.argmax())]


def test_the_engine_computes_what_transformers_computes(mixed: Path) -> None:
    assert_the_engine_agrees_with_transformers(mixed)


def test_one_layer_of_many_may_stay_as_it_was(tmp_path: Path) -> None:
    """The pattern that its siblings share must not take it in."""
    model, out, name = make_tiny_model("llama", tmp_path / "m", num_hidden_layers=3), tmp_path / "out", "mlp.up_proj"
    ignored = f"model.layers.1.{name}"
    assert main([str(model), "--recipe", "int4", "--set", f"ignore=[{ignored}]", "--out", str(out)]) == 0
    checkpoint = Checkpoint.open(out)
    assert checkpoint.scheme_of(ignored) is None and checkpoint.scheme_of(f"model.layers.2.{name}") is not None
    verify(out)
    assert_the_engine_agrees_with_transformers(out)


def test_sensitive_layers_stay_dense(
    tiny_llama: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", f"text.source={prose}", "--set", "text.length=64", "--set", "sparsity.samples=8"]
    command = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", *small, "--out", str(tmp_path / "out")]
    assert main([*command, "--keep-dense", "auto:30%", "--keep-dense", "model.layers.1.mlp.up_proj", "--dry-run"]) == 0
    assert "at most 30.0% of the weights" in capsys.readouterr().out
    assert main([*command, "--keep-dense", "auto:30%", "--keep-dense", "model.layers.1.mlp.up_proj"]) == 0
    schemes = packed_modules(Checkpoint.open(tmp_path / "out"))
    dense = {name for name, scheme in schemes.items() if scheme.format == "int4"}
    sizes = {"q_proj": 4096, "o_proj": 4096, "k_proj": 2048, "v_proj": 2048}
    chosen = dense - {"model.layers.1.mlp.up_proj"}
    total = 2 * (sum(sizes.values()) + 3 * 8192)
    assert 0 < sum(sizes.get(name.rpartition(".")[2], 8192) for name in chosen) <= 0.3 * total
    assert f"kept dense: {', '.join(chosen)}".split(",")[0][:12] in capsys.readouterr().out
    recorded = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recorded["sparsity"]["keep_dense"] == ["auto:30%", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("pattern", ["4:8", "60%"])
@pytest.mark.parametrize("low_memory", [True, False])
def test_what_no_sparse_format_holds_is_stored_densely_and_said(
    pattern: str, low_memory: bool, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(out)]
    command += ["--set", "sparsity.criterion=magnitude", "--set", "quantization.quantizer=rtn"]
    command += ["--set", f"sparsity.pattern={pattern}", *(["--low-memory"] if low_memory else [])]
    assert main(command) == 0
    assert f"14 layers pruned to {pattern} are stored as int4, zeros among the values" in capsys.readouterr().out
    checkpoint, shape = Checkpoint.open(out), MaskShape.parse(pattern)
    for name, scheme in packed_modules(checkpoint).items():
        if "layers" in name:
            assert scheme.format == "int4"
            shape.check_weight(make_format(scheme).unpack(checkpoint.module(name)))


def test_a_pattern_needs_no_quotes() -> None:
    recipe = load_recipe("one-shot-2of4-int4", ["sparsity.pattern=4:8", "overrides=[{layers: [a], sparsity: 1:4}]"])
    assert (recipe.mask_shape("a"), recipe.mask_shape("b")) == (MaskShape(1, 4), MaskShape(4, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sparsity.pattern=4:2", "accepted: 2:4"), ("sparsity.keep_dense=auto:5", "auto:5%"),
        ("sparsity.keep_dense='re:('", "no regular expression"), 
        ("overrides=[{layers: [a], sparsity: 9}]", "accepted: 2:4"),
        ("overrides=[{layers: [a], valeus: int8}]", "did you mean 'values'"),
        ("overrides=[{layers: ['re:['], values: int8}]", "no regular expression"),
    ],
)  # fmt: skip
def test_mistakes_are_said(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("one-shot-2of4-int4", [change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("ignore='*.v_proj'", "ignore '*.v_proj' is none of the 14 layers: model.layers.0.self_attn.q_proj, "),
        ("sparsity.keep_dense=[auto:5%, 're:v_proj']", "keep_dense 're:v_proj' is none of"),
        ("overrides=[{layers: [lm_head], values: int8}]", "overrides 'lm_head' is none of"),
    ],
)
def test_a_target_that_is_no_layer_is_refused(
    change: str, message: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--set", change]) == 1
    assert message in capsys.readouterr().err


def test_a_layer_too_narrow_for_its_pattern_is_named(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_llama), "--recipe", "one-shot-2of4-int4", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--set", "sparsity.pattern=3:6"]) == 1
    assert "3:6 needs a multiple of 6" in capsys.readouterr().err
    assert main([str(tiny_llama), "--recipe", "int4", "--out", str(tmp_path / "out"), "--keep-dense", "a"]) == 1
    assert "prunes nothing" in capsys.readouterr().err
