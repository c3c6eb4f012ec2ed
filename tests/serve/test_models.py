"""The decoder against transformers' own models: logits, greedy tokens, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressor.checkpoint import write_manifest
from compressor.formats import make_format
from compressor.kernels import available
from compressor.quantizers import rtn
from compressor.scheme import QuantizationConfig, Scheme
from serve.engine.llm_engine import LLMEngine, NotFiniteError
from serve.engine.models import linears
from serve.engine.models.config import ARCHITECTURES, Rope, parse_config
from serve.engine.models.decoder import Decoder
from serve.engine.models.rotary import rotary_table
from serve.engine.sampling_params import SamplingParams
from serve.engine.scheduler import Scheduled
from serve.engine.sequence import Sequence

Folder = Callable[[str], Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt")
PROMPT = [5, 77, 130, 9, 260, 42, 18, 300, 7, 7, 91, 200, 33, 12, 64, 250, 111, 3, 99]


def engine_logits(engine: LLMEngine, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of every position, in one step."""
    seq = Sequence(tokens, SamplingParams(prompt_logprobs=0))
    assert engine.blocks.extend(seq, len(tokens))
    hidden = engine.runner.run([Scheduled(seq, 0, len(tokens))])
    engine.blocks.free(seq)
    return torch.cat(engine.runner.prompt_logits(hidden, 0, len(tokens)))


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny_folder: Folder, family: str) -> None:
    folder = tiny_folder(family)
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
    with torch.inference_mode():
        expected = reference(folder)(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(engine_logits(engine, PROMPT), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(tiny_folder: Folder, family: str) -> None:
    folder = tiny_folder(family)
    engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    [output] = engine.generate([PROMPT], params)
    model = reference(folder)
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
    )
    assert output.token_ids == expected[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("by_torch", [True, False])
def test_bfloat16_is_near_float32(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, by_torch: bool) -> None:
    fastest = torch.bfloat16 if by_torch else torch.float32
    monkeypatch.setattr(linears, "compute_dtype", lambda *_: fastest)
    monkeypatch.setattr(linears, "isa", lambda: "avx2" if available() else "torch")
    exact = LLMEngine.from_folder(tiny_folder("llama"), dtype="float32", kv_cache_gb=0.01, compile=False)
    fast = LLMEngine.from_folder(tiny_folder("llama"), kv_cache_gb=0.01, compile=False)
    error = (engine_logits(fast, PROMPT) - engine_logits(exact, PROMPT)).abs().max()
    assert error < 0.05 * engine_logits(exact, PROMPT).abs().max()
    assert exact.weight_bytes / 2 <= fast.weight_bytes < exact.weight_bytes / 2 * 1.02
    decoder = fast.loaded.decoder
    assert isinstance(decoder, Decoder)
    assert (decoder.fused is None) == (by_torch or not available())


def test_hub_names_without_prefix(tiny_folder: Folder, tmp_path: Path) -> None:
    """The hub's gpt2 says `wte.weight` where transformers writes `transformer.wte.weight`."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bare"
    shutil.copytree(tiny_folder("gpt2"), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, folder / "model.safetensors")
    bare = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
    whole = LLMEngine.from_folder(tiny_folder("gpt2"), dtype="float32", kv_cache_gb=0.01, compile=False)
    assert torch.equal(engine_logits(bare, PROMPT), engine_logits(whole, PROMPT))


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 8.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.9},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_scaling_equals_transformers(parameters: dict[str, float], theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = parameters | {"rope_theta": theta, "original_max_position_embeddings": 256}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=2048, rope_parameters=parameters
    )
    kind = str(parameters["rope_type"])
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    table = rotary_table(Rope(theta, kind, parameters), 64, 2048)
    expected = torch.outer(torch.arange(2048.0), frequencies)
    torch.testing.assert_close(table, torch.cat((expected.cos(), expected.sin()), -1) * scale, atol=5e-4, rtol=0)


def test_stretched_positions_are_served(tiny_folder: Folder, tmp_path: Path) -> None:
    """YaRN as Qwen documents it, with max_position_embeddings as it was; tables are as long as what is served."""
    folder = tmp_path / "stretched"
    shutil.copytree(tiny_folder("qwen3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    long, short = (
        LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False, max_model_len=length)
        for length in (None, 40)
    )
    assert (long.max_model_len, short.max_model_len) == (2048, 40)
    table = long.loaded.decoder.get_buffer("cos_sin")
    assert len(table) == 2048
    assert torch.equal(short.loaded.decoder.get_buffer("cos_sin"), table[:40])
    tokens = PROMPT * 40
    with torch.inference_mode():
        expected = reference(folder)(torch.tensor([tokens])).logits[0, 500:]
    torch.testing.assert_close(engine_logits(long, tokens)[500:], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "parameters", [{"rope_type": "linear"}, {"type": "yarn", "factor": None}, {"rope_type": "llama3", "factor": 8.0}]
)
def test_a_rotary_scaling_without_its_numbers_is_refused(tiny_folder: Folder, parameters: dict[str, object]) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text()) | {"rope_parameters": parameters}
    with pytest.raises(ValueError, match=r"needs a number as (factor|low_freq_factor), but has None"):
        parse_config(config)


def test_unknown_architecture_lists_what_is_served() -> None:
    with pytest.raises(ValueError, match="unsupported architecture FooForCausalLM") as caught:
        parse_config({"architectures": ["FooForCausalLM"]})
    assert all(name in str(caught.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu6"}, "activation"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rotary scaling"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_unserved_variants_are_refused(tiny_folder: Folder, change: dict[str, object], message: str) -> None:
    config = json.loads((tiny_folder("llama") / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        parse_config(config)


def test_wrong_sizes_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(tiny_folder("llama"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 120}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json"):
        LLMEngine.from_folder(folder, kv_cache_gb=0.01, compile=False)


def test_layers_stored_differently_side_by_side(tiny_folder: Folder, tmp_path: Path) -> None:
    """k packed and q and v plain, gate packed and up plain: the same as the model with the unpacked weights."""
    from safetensors.torch import load_file, save_file

    scheme = Scheme("int8", 32)
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        shutil.copytree(tiny_folder("llama"), folder)
    stored = load_file(packed / "model.safetensors")
    unpacked = dict(stored)
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.k_proj", "mlp.gate_proj")]
    for name in names:
        tensors = make_format(scheme).pack(rtn(stored.pop(f"{name}.weight"), None, scheme))
        unpacked[f"{name}.weight"] = make_format(scheme).unpack(tensors).float()
        stored |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    save_file(stored, packed / "model.safetensors")
    save_file(unpacked, plain / "model.safetensors")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig.from_schemes(dict.fromkeys(names, scheme)).to_dict()
    (packed / "config.json").write_text(json.dumps(config))
    write_manifest(packed)
    engine, exact = (
        LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False) for folder in (packed, plain)
    )
    assert engine.loaded.formats == ("dense", "int8")
    expected = engine_logits(exact, PROMPT)
    assert (engine_logits(engine, PROMPT) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(not available(), reason="the CPU kernels are not installed")
def test_a_packed_head_of_its_own_rounds_no_logits(tiny_folder: Folder, tmp_path: Path) -> None:
    """As one that is tied to the embedding."""
    from safetensors.torch import load_file, save_file

    folder, scheme = tmp_path / "untied", Scheme("int8", 32)
    shutil.copytree(tiny_folder("mistral"), folder)
    stored = load_file(folder / "model.safetensors")
    tensors = make_format(scheme).pack(rtn(stored.pop("lm_head.weight"), None, scheme))
    save_file(stored | {f"lm_head.{part}": t for part, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = QuantizationConfig.from_schemes({"lm_head": scheme}).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)
    logits = engine_logits(LLMEngine.from_folder(folder, kv_cache_gb=0.01, compile=False), PROMPT)
    assert not torch.equal(logits, logits.bfloat16().float())


def test_a_head_that_was_trained_is_not_tied_again(tiny_folder: Folder, tmp_path: Path) -> None:
    """Fine-tunes of tied models store a head of their own and leave the flag."""
    from safetensors.torch import load_file, save_file

    source = tiny_folder("llama")
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    stored = load_file(source / "model.safetensors")
    table = stored["model.embed_tokens.weight"]
    found = []
    for number, head in enumerate((table.clone(), table.flip(0).contiguous())):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        save_file(stored | {"lm_head.weight": head}, folder / "model.safetensors")
        engine = LLMEngine.from_folder(folder, dtype="float32", kv_cache_gb=0.01, compile=False)
        found.append(engine_logits(engine, PROMPT))
    assert torch.allclose(found[0].flip(-1), found[1], atol=1e-4)


def test_missing_weight_and_tokenizer_are_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "incomplete"
    shutil.copytree(tiny_folder("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="down_proj"):
        LLMEngine.from_folder(folder, kv_cache_gb=0.01, compile=False)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        LLMEngine.from_folder(folder, kv_cache_gb=0.01, compile=False)


def test_self_test_refuses_not_finite_weights(tiny_folder: Folder) -> None:
    engine = LLMEngine.from_folder(tiny_folder("llama"), dtype="float32", kv_cache_gb=0.01, compile=False)
    engine.self_test()
    engine.loaded.decoder.norm.get_buffer("weight")[3] = float("nan")
    with pytest.raises(NotFiniteError, match="self-test"):
        engine.self_test()
    assert engine.blocks.num_used == 0
