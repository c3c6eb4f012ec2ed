"""Every export: the same bytes back, and the layout read by arithmetic that is not ours."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint import Checkpoint, CheckpointError, CheckpointWriter
from compressor.cli import main
from compressor.exports import EXPORTS, export_checkpoint, import_checkpoint
from compressor.exports.gguf import _Names, blocks, from_blocks
from compressor.exports.llama_like import parse_llama_like
from compressor.exports.regrid import fit_grid
from compressor.formats import FORMATS, QuantizedWeight, make_format
from compressor.formats.low_rank import pack_low_rank
from compressor.inspection import packed_modules
from compressor.models import load_model
from compressor.output import OutputFolder
from compressor.pipeline import compress
from compressor.quantizers import rtn
from compressor.recipe import parse_recipe
from compressor.scheme import LowRank, QuantizationConfig, Scheme
from tests.tiny import make_tiny_model

LAYER = "model.layers.0.self_attn.q_proj"


def packed(model: Path, out: Path, values: str = "int4", group: object = 32, sparse: bool = True) -> Path:
    record = {"quantization": {"values": values, "group_size": group}}
    if sparse:
        record["sparsity"] = {"criterion": "magnitude"}
    compress(str(model), parse_recipe(record), out, report=lambda *_: None)
    return out


@pytest.fixture(scope="module")
def sparse_int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tiny_llama, tmp_path_factory.mktemp("packed") / "out")


@pytest.fixture(scope="module")
def int8_rows(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tiny_llama, tmp_path_factory.mktemp("packed") / "out", "int8", "row", sparse=False)


def expected(folder: Path, module: str) -> Tensor:
    """The float32 weight of a module, from the format itself."""
    checkpoint = Checkpoint.open(folder)
    scheme = checkpoint.scheme_of(module)
    assert scheme is not None
    return make_format(scheme).unpack_quantized(checkpoint.module(module)).dequantized()


def stored(folder: Path, name: str) -> Tensor:
    return Checkpoint.open(folder, verify=False, foreign=True).tensor(name)


@pytest.mark.parametrize("target", EXPORTS)
@pytest.mark.parametrize("kind", ["sparse_int4", "int8_rows"])
def test_import_gives_the_same_bytes(target: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    assert export_checkpoint(folder, target, tmp_path / "export") == []
    assert import_checkpoint(tmp_path / "export", tmp_path / "back") == []
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    for name in ("config.json",):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text())


@pytest.mark.parametrize("target", ["dense", "onnx", "gguf"])
@pytest.mark.parametrize("values", ["fp8", "bfloat16"])
@pytest.mark.parametrize("sparse", [True, False])
def test_floats_come_back(target: str, values: str, sparse: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """What has no integers goes out as plain numbers; e4m3 values and scales are found in them again."""
    folder = packed(tiny_llama, tmp_path / "packed", values, sparse=sparse)
    assert export_checkpoint(folder, target, tmp_path / "export") == []
    assert import_checkpoint(tmp_path / "export", tmp_path / "back") == []
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "back")
    assert after.quantization == before.quantization
    for module in packed_modules(before):
        assert torch.equal(expected(tmp_path / "back", module).bfloat16(), expected(folder, module).bfloat16()), module


def test_dense_holds_the_unpacked_weights_and_loads(sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "dense", tmp_path / "dense")
    assert torch.equal(stored(tmp_path / "dense", f"{LAYER}.weight"), expected(sparse_int4, LAYER).bfloat16())
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.arange(20)[None]
    dense, packed_model = load_model(tmp_path / "dense"), load_model(sparse_int4)
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits.float(), packed_model(ids).logits.float(), atol=0.05)


def test_gptq_by_its_own_arithmetic(sparse_int4: Path, tmp_path: Path) -> None:
    """AutoGPTQ: w[i, o] = scale[g, o] * (field i of qweight - (field o of qzeros + 1)), fields of 4 bits, low first."""
    export_checkpoint(sparse_int4, "gptq", tmp_path / "gptq")
    parts = {
        key: stored(tmp_path / "gptq", f"{LAYER}.{key}").numpy() for key in ("qweight", "qzeros", "scales", "g_idx")
    }
    words, zeros = parts["qweight"].astype(np.uint32), parts["qzeros"].astype(np.uint32)
    rows, columns = words.shape[0] * 8, words.shape[1]
    found = np.zeros((rows, columns))
    for i in range(rows):
        group = parts["g_idx"][i]
        value = (words[i // 8] >> np.uint32(4 * (i % 8))) & 15
        zero = (zeros[group].repeat(8) >> np.uint32(4) * (np.arange(columns, dtype=np.uint32) % 8)) & 15
        found[i] = parts["scales"][group].astype(np.float64) * (value.astype(int) - (zero.astype(int) + 1))
    assert np.array_equal(found.T.astype(np.float32), expected(sparse_int4, LAYER).numpy())
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())


def test_compressed_tensors_by_its_own_arithmetic(sparse_int4: Path, tmp_path: Path) -> None:
    """pack-quantized: w[o, i] = scale[o, i // group] * (field i of the row's words - 8)."""
    export_checkpoint(sparse_int4, "compressed-tensors", tmp_path / "ct")
    words = stored(tmp_path / "ct", f"{LAYER}.weight_packed").numpy().astype(np.uint32)
    scale = stored(tmp_path / "ct", f"{LAYER}.weight_scale").float().numpy()
    fields = np.stack([(words >> np.uint32(4 * j)) & 15 for j in range(8)], axis=2).reshape(len(words), -1)
    found = (fields.astype(np.float32) - 8) * scale.repeat(32, axis=1)
    assert np.array_equal(found, expected(sparse_int4, LAYER).numpy())
    assert stored(tmp_path / "ct", f"{LAYER}.weight_shape").tolist() == list(found.shape)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (config["format"], group["weights"]["num_bits"], group["weights"]["group_size"]) == ("pack-quantized", 4, 32)
    assert config["ignore"] == ["lm_head"]
    assert group["input_activations"] is None


def test_int8_rows_become_w8a8(int8_rows: Path, tmp_path: Path) -> None:
    export_checkpoint(int8_rows, "compressed-tensors", tmp_path / "ct")
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel"
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    weight, scale = (stored(tmp_path / "ct", f"{LAYER}.{key}") for key in ("weight", "weight_scale"))
    assert weight.dtype == torch.int8
    assert torch.equal(weight.float() * scale.float(), expected(int8_rows, LAYER))


@pytest.mark.parametrize("kind", ["sparse_int4", "int8_rows"])
def test_gguf_by_the_gguf_package(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    export_checkpoint(folder, "gguf", tmp_path / "gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    names = _Names(parse_llama_like("gguf", json.loads((folder / "config.json").read_text())))
    for module in (LAYER, "model.layers.1.mlp.down_proj", "model.embed_tokens"):
        tensor = tensors[names[f"{module}.weight"]]
        assert tensor.tensor_type.name == ("Q4_0" if kind == "sparse_int4" and "embed" not in module else "Q8_0")
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        back = names.reordered(module, QuantizedWeight(values), back=True).values
        assert torch.equal(back, expected(folder, module)), module


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_blocks_come_back(bits: int) -> None:
    weight = rtn(torch.randn(5, 128), None, Scheme(f"int{bits}", 64))
    assert weight.scale is not None
    back = from_blocks(blocks(weight, bits), bits)
    assert torch.equal(back.values, weight.values)
    assert back.scale is not None and torch.equal(back.scale.float(), weight.scale.float().repeat_interleave(2, 1))


def run_onnx(path: Path, ids: list[list[int]]) -> np.ndarray:
    """Logits of a dense graph by onnx's own reference interpreter; each part sees the cache of those before it."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    inputs = {entry.name: entry for entry in onnx.load(path, load_external_data=False).graph.input}
    cache = {
        name: np.zeros((1, entry.type.tensor_type.shape.dim[1].dim_value, 0, 16), np.float32)
        for name, entry in inputs.items()
        if name.startswith("past")
    }
    logits, past = [], 0
    for part in ids:
        feeds = {
            "input_ids": np.array([part], np.int64),
            "attention_mask": np.ones((1, past + len(part)), np.int64),
            "position_ids": np.arange(past, past + len(part), dtype=np.int64)[None],
        }
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds | cache), strict=True))
        logits.append(outputs.pop("logits")[0])
        cache = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        past += len(part)
    return np.concatenate(logits)


def test_the_onnx_graph_computes_what_transformers_does(tiny_llama: Path, tmp_path: Path) -> None:
    export_checkpoint(tiny_llama, "onnx", tmp_path / "onnx")
    found = run_onnx(tmp_path / "onnx" / "model.onnx", [[5, 9, 200, 31], [7], [250, 3]])
    with torch.no_grad():
        model = load_model(tiny_llama, torch.float32)
        wanted = model(torch.tensor([[5, 9, 200, 31, 7, 250, 3]])).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("target", ["onnx", "dense"])
def test_a_trained_head_is_not_the_embedding(target: str, tmp_path: Path) -> None:
    """config.json says that they are tied; the folder holds a head that differs, which counts."""
    folder = make_tiny_model("llama", tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export_checkpoint(folder, target, tmp_path / "out")
    ids = [5, 9, 200, 31]
    with torch.no_grad():
        wanted = load_model(folder, torch.float32)(torch.tensor([ids])).logits[0]
        if target == "onnx":
            found = torch.from_numpy(run_onnx(tmp_path / "out" / "model.onnx", [ids]))
        else:
            assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
            found = load_model(tmp_path / "out", torch.float32)(torch.tensor([ids])).logits[0]
    assert (found - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


def test_gguf_keeps_named_chat_templates(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": templates}))
    export_checkpoint(packed(folder, tmp_path / "packed"), "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "plain"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "with tools"


def test_onnx_blocks_by_their_own_arithmetic(sparse_int4: Path, tmp_path: Path) -> None:
    """MatMulNBits: w[n, k] = scale[n, k // block] * (field - 8), fields low first in blob [N, K / block, block / 2]."""
    export_checkpoint(sparse_int4, "onnx", tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "model.onnx")
    node = next(n for n in model.graph.node if f"{LAYER}.weight_packed" in n.input)
    attributes = {a.name: a.i for a in node.attribute}
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in node.input}
    blob, scale = (tensors[f"{LAYER}.{key}"] for key in ("weight_packed", "weight_scale"))
    assert blob.shape == (attributes["N"], attributes["K"] // attributes["block_size"], attributes["block_size"] // 2)
    fields = np.stack((blob & 15, blob >> 4), axis=3).reshape(attributes["N"], attributes["K"]).astype(np.float32) - 8
    found = fields * scale.reshape(attributes["N"], -1).repeat(attributes["block_size"], axis=1)
    assert np.array_equal(found, expected(sparse_int4, LAYER).numpy())


def with_branch(source: Path, out: Path) -> Path:
    """The checkpoint with a low-rank branch beside one layer."""
    checkpoint = Checkpoint.open(source)
    scheme = checkpoint.scheme_of(LAYER)
    assert scheme is not None
    branched = dataclasses.replace(scheme, low_rank=LowRank(16))
    names = {name.rpartition(".")[0] for name in checkpoint.names()}
    schemes = {name: found for name in sorted(names) if (found := checkpoint.scheme_of(name)) is not None}
    with OutputFolder(out) as output:
        writer = CheckpointWriter(output)
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name))
        for key, tensor in pack_low_rank(LowRank(16), torch.randn(64, 4)).items():
            writer.add(f"{LAYER}.{key}", tensor)
        record = QuantizationConfig.from_schemes(schemes | {LAYER: branched}, "int8").to_dict()
        shutil.copyfile(source / "tokenizer.json", writer.folder / "tokenizer.json")
        shutil.copyfile(source / "tokenizer_config.json", writer.folder / "tokenizer_config.json")
        writer.finish(checkpoint.config | {"quantization_config": record})
    return out


@pytest.mark.parametrize("target", EXPORTS)
def test_a_folded_branch_is_said_first(target: str, sparse_int4: Path, tmp_path: Path) -> None:
    folder = with_branch(sparse_int4, tmp_path / "branched")
    with pytest.raises(ValueError, match=r"low-rank branches of 1 layers.*--allow-lossy"):
        export_checkpoint(folder, target, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    lost = export_checkpoint(folder, target, tmp_path / "export", allow_lossy=True)
    assert len(lost) == (2 if target in ("compressed-tensors", "gptq") else 1), (
        lost
    )  # vLLM does not fuse it with k and v
    assert import_checkpoint(tmp_path / "export", tmp_path / "back") == [LAYER]
    assert Checkpoint.open(tmp_path / "back").quantization.kv_cache_dtype == "int8"
    tensors = Checkpoint.open(folder).module(LAYER)
    branch = tensors["low_rank_b"].float() * tensors["low_rank_b_scale"].float()
    wanted = expected(sparse_int4, LAYER) + branch.repeat_interleave(16, 1)
    assert torch.equal(stored(tmp_path / "back", f"{LAYER}.weight"), wanted.bfloat16())


@pytest.mark.parametrize("target", ["dense", "gptq"])
def test_gpt2_weights_are_turned_back(target: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = packed(tiny_gpt2, tmp_path / "packed")
    export_checkpoint(folder, target, tmp_path / "export")
    assert import_checkpoint(tmp_path / "export", tmp_path / "back") == []
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    if target == "dense":
        load_model(tmp_path / "export")


@pytest.mark.parametrize("target", ["compressed-tensors", "onnx", "gguf"])
def test_what_a_target_does_not_know_is_refused(target: str, tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = packed(tiny_gpt2, tmp_path / "packed")
    with pytest.raises(ValueError, match="export to"):
        export_checkpoint(folder, target, tmp_path / "export")


def test_a_scale_that_fp16_does_not_hold_is_a_loss(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "small")
    checkpoint = Checkpoint.open(folder)
    with OutputFolder(folder, force=True) as output:
        writer = CheckpointWriter(output)
        for name in checkpoint.names():
            writer.add(name, checkpoint.tensor(name) * (1e-7 if name == f"{LAYER}.weight" else 1))
        for file in tiny_llama.glob("token*"):
            shutil.copyfile(file, writer.folder / file.name)
        writer.finish(checkpoint.config)
    out = packed(folder, tmp_path / "packed")
    with pytest.raises(ValueError, match="scales are rounded to fp16"):
        export_checkpoint(out, "gptq", tmp_path / "export")
    assert export_checkpoint(out, "compressed-tensors", tmp_path / "export") == []


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_grid_is_found_again(name: str) -> None:
    fmt = FORMATS[name](32)
    weight = rtn(torch.randn(50, 64), None, Scheme(name, 32))
    found = fit_grid(fmt.unpack(fmt.pack(weight)), fmt)
    assert found is not None
    assert torch.equal(fmt.unpack(fmt.pack(found)), fmt.unpack(fmt.pack(weight)))
    assert fit_grid(torch.randn(50, 64).bfloat16(), fmt) is None


def test_a_truncated_export_is_refused(sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "onnx", tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="does not hold"):
        import_checkpoint(tmp_path / "onnx", tmp_path / "back")


def test_keys_that_transformers_4_reads(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    folder = packed(make_tiny_model("llama", tmp_path / "model", rope_parameters=rope), tmp_path / "packed")
    export_checkpoint(folder, "dense", tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"]) == (5e5, "bfloat16")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert load_model(tmp_path / "dense").config.rope_parameters == rope


def test_gguf_keeps_float16(tmp_path: Path, tiny_llama: Path) -> None:
    folder = packed(tiny_llama, tmp_path / "packed", "float16")
    assert export_checkpoint(folder, "gguf", tmp_path / "gguf") == []
    assert import_checkpoint(tmp_path / "gguf", tmp_path / "back") == []
    for module in packed_modules(Checkpoint.open(folder)):
        assert torch.equal(expected(tmp_path / "back", module), expected(folder, module)), module


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_what_vllm_makes_one_of_and_is_stored_unlike_is_said(target: str, tiny_llama: Path, tmp_path: Path) -> None:
    record = {"quantization": {"group_size": 32}, "ignore": ["re:.*v_proj"]}
    compress(str(tiny_llama), parse_recipe(record), tmp_path / "packed", report=lambda *_: None)
    with pytest.raises(ValueError, match=r"scheme of q_proj and k_proj and v_proj differs in 2 places .*vLLM"):
        export_checkpoint(tmp_path / "packed", target, tmp_path / "out")


def test_gptq_names_dense_layers_as_vllm_does_too(tiny_llama: Path, tmp_path: Path) -> None:
    record = {"quantization": {"group_size": 32}, "ignore": ["re:.*layers[.]0[.].*", "re:.*up_proj", "re:.*gate_proj"]}
    compress(str(tiny_llama), parse_recipe(record), tmp_path / "packed", report=lambda *_: None)
    export_checkpoint(tmp_path / "packed", "gptq", tmp_path / "out")
    rules = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]

    def is_dense(layer: str) -> bool:
        return any(re.match(rule.removeprefix("-:"), layer) for rule in rules)

    for layer in ("0.self_attn.qkv_proj", "0.mlp.gate_up_proj", "1.mlp.gate_up_proj", "0.self_attn.o_proj"):
        assert is_dense(f"model.layers.{layer}"), layer
    for layer in ("1.self_attn.qkv_proj", "1.self_attn.q_proj", "1.mlp.down_proj"):
        assert not is_dense(f"model.layers.{layer}"), layer


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq"])
def test_words_that_do_not_fill_are_said_first(target: str, tmp_path: Path) -> None:
    folder = packed(make_tiny_model("llama", tmp_path / "model", intermediate_size=132), tmp_path / "packed", group=-1)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.\w+ has 132 .*multiple of 8"):
        export_checkpoint(folder, target, tmp_path / "out")


def test_gguf_says_that_a_tokenizer_is_too_large(tmp_path: Path) -> None:
    folder = packed(
        make_tiny_model("llama", tmp_path / "model", vocab_size=200, bos_token_id=1, eos_token_id=2),
        tmp_path / "packed",
    )
    with pytest.raises(ValueError, match=r"a token 255, and config\.json a vocabulary of 200"):
        export_checkpoint(folder, "gguf", tmp_path / "out")


def test_the_commands(sparse_int4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(sparse_int4), "--to", "dense", "--out", str(tmp_path / "dense")]) == 0
    assert "MB for dense" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "dense"), "--out", str(tmp_path / "back")]) == 0
    assert main(["export", str(sparse_int4), "--to", "coreml", "--out", str(tmp_path / "x")]) == 1
    assert "accepted: dense, compressed-tensors, gptq, onnx, gguf" in capsys.readouterr().err
    assert main(["import", str(sparse_int4), "--out", str(tmp_path / "x")]) == 1


def test_a_broken_record_is_refused(sparse_int4: Path, tmp_path: Path) -> None:
    export_checkpoint(sparse_int4, "dense", tmp_path / "dense")
    record = json.loads((tmp_path / "dense" / "halfweight.json").read_text())
    for change in ({"version": 2}, {"modules": "x"}, {"modules": [1]}, {"config": None}):
        (tmp_path / "dense" / "halfweight.json").write_text(json.dumps(record | change))
        with pytest.raises(CheckpointError):
            import_checkpoint(tmp_path / "dense", tmp_path / "back")
    (tmp_path / "dense" / "halfweight.json").write_text(json.dumps(record | {"modules": ["model.layers.7.no_proj"]}))
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "dense", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    for rope in ("x", [1], {"rope_theta": "x"}):
        config = record["config"] | {"rope_parameters": rope}
        (tmp_path / "dense" / "halfweight.json").write_text(json.dumps(record | {"target": "gguf", "config": config}))
        with pytest.raises(ValueError):
            import_checkpoint(tmp_path / "dense", tmp_path / "back")
    (tmp_path / "dense" / "halfweight.json").write_text(json.dumps(record | {"target": "os"}))
    with pytest.raises(ValueError, match="no export 'os'"):
        import_checkpoint(tmp_path / "dense", tmp_path / "back")
