"""What a model's folder must hold, which class it becomes, and where converted ones are kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import from_gguf, models
from compressor.checkpoint import MAX_SHARD_BYTES, Checkpoint
from compressor.cli import main
from compressor.exports import export_checkpoint
from compressor.models import fetch_model, load_classifier, load_model, quiet_transformers, skeleton
from compressor.pipeline import compress
from compressor.preflight import check
from compressor.recipe import parse_recipe
from compressor.streaming import compress_streaming
from tests.compressor.test_exports_classifiers import SENTENCES, SIZES, feeds_of, make_classifier, run_onnx
from tests.tiny import make_tiny_model, make_tokenizer

PLAIN = {"sparsity": {"criterion": "magnitude"}, "quantization": {"values": "int8", "group_size": 32}}


def quiet(*_: object) -> None:
    """Nobody watches."""


def renamed(source: Path, folder: Path, new_name: Callable[[str], str | None]) -> Path:
    """A copy whose tensors have other names; those without one are left out."""
    shutil.copytree(source, folder)
    named = {new_name(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in named.items() if name is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def without(part: str) -> Callable[[str], str | None]:
    return lambda name: None if part in name else name


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("new_name", "message"),
    [
        (lambda name: f"_orig_mod.{name}", r"such as .*; it holds _orig_mod\.model\.embed_tokens\.weight,"),
        (without("1.mlp.up_proj"), r"lacks 1 of the tensors of a LlamaForCausalLM, such as model\.layers\.1\.mlp\.up_"),
        (without("embed_tokens"), r"lacks 2 of the tensors .* lm_head\.weight, model\.embed_tokens\.weight"),
    ],
    ids=["wrapped", "a layer", "the embedding"],
)
def test_missing_weights_are_named_before_any_is_read(
    new_name: Callable[[str], str | None], message: str, low_memory: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = renamed(tiny_llama, tmp_path / "model", new_name)
    with pytest.raises(ValueError, match=message):
        check(folder, parse_recipe(PLAIN), tmp_path / "out", low_memory=low_memory)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_a_head_of_its_own_is_not_made_up(tmp_path: Path) -> None:
    source = make_tiny_model("llama", tmp_path / "source", tie_word_embeddings=False)
    folder = renamed(source, tmp_path / "model", without("lm_head"))
    for read in (load_model, lambda folder: check(folder, parse_recipe(PLAIN), tmp_path / "out")):
        with pytest.raises(ValueError, match=r"such as lm_head\.weight\. Save"):
            read(folder)


def test_another_shape_is_noticed_before_any_weight_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has another shape than config\.json says"):
        check(tmp_path / "model", parse_recipe(PLAIN), tmp_path / "out")


def test_names_without_the_body_in_front_are_found(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = renamed(tiny_gpt2, tmp_path / "model", lambda name: name.removeprefix("transformer."))
    check(folder, parse_recipe(PLAIN), tmp_path / "out")
    for name, parameter in load_model(tiny_gpt2).named_parameters():
        assert torch.equal(load_model(folder).get_parameter(name), parameter)


def test_a_new_head_may_be_missing_and_nothing_below_it(tiny_llama: Path, tmp_path: Path) -> None:
    bert = make_classifier("bert", tmp_path / "bert")
    folder = renamed(bert, tmp_path / "bare", lambda name: None if "pooler" in name or "classifier" in name else name)
    _, new, fine_tuned = load_classifier(folder, ("a", "b"))
    assert not fine_tuned
    assert new == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    broken = renamed(bert, tmp_path / "broken", without("layer.1.output.dense"))
    with pytest.raises(ValueError, match=r"lacks 2 of .* bert\.encoder\.layer\.1\.output\.dense\.bias"):
        load_classifier(broken, ("a", "b"))


@pytest.mark.parametrize("run", [compress, compress_streaming], ids=["in memory", "low memory"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_classifier_keeps_its_head_in_one_shot(
    kind: str, run: Callable[..., Any], prose: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = make_classifier(kind, tmp_path / "dense")
    recipe = parse_recipe({
        "text": {"source": str(prose), "length": 32},
        "quantization": {"values": "int8", "quantizer": "gptq", "samples": 8, "group_size": 32},
    })  # fmt: skip
    out = run(str(folder), recipe, tmp_path / "out", report=quiet).out
    with quiet_transformers():
        packed, report = AutoModelForSequenceClassification.from_pretrained(
            out, output_loading_info=True, dtype=torch.float32
        )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    dense, head = Checkpoint.open(folder), [name for name in Checkpoint.open(folder).names() if "classifier" in name]
    assert head and all(torch.equal(packed.get_parameter(name), dense.tensor(name).float()) for name in head)
    with torch.no_grad():
        expected = load_model(folder, torch.float32).eval()(torch.tensor(SENTENCES[:1])).logits
        found = packed.eval()(torch.tensor(SENTENCES[:1])).logits
    assert float((found - expected).norm()) < 0.2 * float(expected.norm())
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "POST /classify" in card


def test_a_classifier_is_not_trained_as_a_language_model(
    prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_classifier("bert", tmp_path / "bert")
    command = [str(folder), "--out", str(tmp_path / "out"), "--dry-run"]
    text = ["--set", f"text.source={prose}", "--set", "text.length=32"]
    for settings in (["--recipe", "ast-2of4-int4"], ["--recipe", "int4", "--set", "quantization.scales.samples=8"]):
        assert main([*command, *text, *settings]) == 1
        assert "holds a BertForSequenceClassification. Take a one-shot recipe, or give" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"text": f"{n}:", "label": "yes"}) for n in range(80)))
    task = ["--task", "custom", "--set", f"task.source.path={tmp_path / 'pairs.jsonl'}"]
    task += ["--set", "task.source.kind=generation", "--set", "task.length=32"]
    assert main([*command, "--recipe", "pst-2of4-int8", *task]) == 1
    assert "Give a causal language model, or a task with classes" in capsys.readouterr().err
    assert main([*command, *text, "--recipe", "ast-2of4-int4", "--one-shot"]) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_head_that_was_trained_is_not_tied_again(
    streaming: bool, prose: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Fine-tunes of tied models store a head of their own and leave the flag."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "dense"))
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    torch.manual_seed(0)
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run = compress_streaming if streaming else compress
    out = run(str(folder), parse_recipe(PLAIN | {"text": {"source": str(prose)}}), tmp_path / "out", report=quiet).out
    assert Checkpoint.open(out).config["tie_word_embeddings"] is False
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_model(folder, torch.float32)(ids).logits
        found = load_model(out, torch.float32)(ids).logits
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert skeleton(folder).config.tie_word_embeddings is True


def test_an_encoder_without_a_head_stays_one(tmp_path: Path) -> None:
    """Its tensors keep the names that `AutoModel` and the exports look for, and no head is made up."""
    from transformers import AutoModel, BertConfig, BertModel

    with quiet_transformers():
        BertModel(BertConfig(**SIZES)).bfloat16().save_pretrained(tmp_path / "bert")
        make_tokenizer().save_pretrained(tmp_path / "bert")
    compress(str(tmp_path / "bert"), parse_recipe(PLAIN), tmp_path / "out", report=quiet)
    stored = Checkpoint.open(tmp_path / "out")
    assert stored.config["architectures"] == ["BertModel"]
    assert {"embeddings.LayerNorm.weight", "pooler.dense.weight"} < set(stored.names())
    assert not [name for name in stored.names() if name.startswith(("bert.", "cls."))]
    export_checkpoint(tmp_path / "out", "dense", tmp_path / "dense")
    export_checkpoint(tmp_path / "out", "onnx", tmp_path / "onnx")
    feeds = feeds_of("bert")
    inputs: Any = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with quiet_transformers(), torch.no_grad():
        packed, dense = (
            AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(**inputs)
            for name in ("out", "dense")
        )
    for ours, theirs in zip(packed[:2], dense[:2], strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.999
    found = run_onnx(tmp_path / "onnx", feeds)["pooler_output"]
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(found), packed.pooler_output).min() > 0.999
    compress_streaming(str(tmp_path / "bert"), parse_recipe(PLAIN), tmp_path / "low", report=quiet)
    streamed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "out"))
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], whole[name]) for name in whole)


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What each conversion of a GGUF file has read; the cache is empty."""
    read: list[bytes] = []

    def convert(gguf: Path, stage: Path, _source: str) -> None:
        read.append(gguf.read_bytes())
        (stage / "config.json").write_text("{}")

    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(from_gguf, "convert", convert)
    return read


def test_gguf_files_of_one_name_and_size_are_told_apart(conversions: list[bytes], tmp_path: Path) -> None:
    first, second = (tmp_path / place / "model.gguf" for place in "ab")
    for file, content in ((first, b"one"), (second, b"two")):
        file.parent.mkdir()
        file.write_bytes(content)
        os.utime(file, ns=(10**18, 10**18))
    folder = fetch_model(str(first))
    assert fetch_model(str(second)) != folder == fetch_model(str(first))
    first.write_bytes(b"new")
    os.utime(first, ns=(10**18, 10**18 + 1))
    assert fetch_model(str(first)) != folder
    assert conversions == [b"one", b"two", b"new"]


def test_a_gguf_file_of_a_package_is_found_again(
    conversions: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    monkeypatch.setattr(models, "PACKAGED", {"pypi:it": ("it", "model.gguf")})
    monkeypatch.setattr(models, "fetch_member", lambda *_: file)
    file.write_bytes(b"one")
    folder = fetch_model("pypi:it")
    os.utime(file, ns=(10**18, 10**18))
    assert fetch_model("pypi:it") == folder
    assert len(conversions) == 1


def test_disk_holds_the_last_shard_twice_and_what_waits_between_the_stages(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    record = {"text": {"source": str(prose), "length": 32}, "quantization": {"group_size": 32, "samples": 8}}
    plain, solved = (
        parse_recipe({**record, "sparsity": {"criterion": criterion, "samples": 16}})
        for criterion in ("magnitude", "sparsegpt")
    )

    def disk(recipe: Any) -> int:
        return check(folder, recipe, tmp_path / "out", low_memory=True).disk_bytes

    packed = check(folder, plain, tmp_path / "out").packed_bytes
    assert packed < MAX_SHARD_BYTES
    assert disk(plain) == pytest.approx(2 * packed, abs=2)
    blocks = [p.nbytes for name, p in load_model(folder).named_parameters() if name.startswith("model.layers.")]
    assert disk(solved) == disk(plain) + sum(blocks)
    monkeypatch.setattr("compressor.layer_by_layer._LARGE_BYTES", 0)
    assert disk(solved) == disk(plain) + sum(blocks) + 16 * 32 * 64 * 2
    monkeypatch.setattr("compressor.preflight.MAX_SHARD_BYTES", 1000)
    assert disk(plain) == pytest.approx(packed + 1000, abs=2)
