"""Fine-tuning what `compress` made: dense parameters, any optimiser, the same masks, and back through `compress`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compressor
from compressor.calibration import weight_of
from compressor.checkpoint import Checkpoint
from compressor.formats import make_format
from compressor.inspection import packed_modules
from compressor.masks import MaskShape
from compressor.models import block_linears, load_tokenizer, quiet_transformers
from compressor.pipeline import compress
from compressor.recipe import parse_recipe
from tests.tiny import make_tiny_model

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def quiet(*_: object) -> None:
    """Nobody watches."""


def compressed(kind: str, folder: Path, **recipe: Any) -> Path:
    record = {"sparsity": {"criterion": "magnitude"}, "quantization": {"values": "int4", "group_size": 32}, **recipe}
    model = make_tiny_model(kind, folder / "model")
    compress(str(model), parse_recipe(record), folder / "out", report=quiet)
    return folder / "out"


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder)


def masks_of(model: Any) -> dict[str, Tensor]:
    return {name: weight_of(module).detach() != 0 for name, module in block_linears(model).items()}


def train(model: Any, optimiser: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimiser.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_the_dequantised_model_computes_the_same_and_trains(kind: str, tmp_path: Path) -> None:
    out = compressed(kind, tmp_path)
    with torch.no_grad():
        expected = loaded(out)(IDS).logits.float()
    model = loaded(out).dequantize(torch.float32)
    assert all(p.dtype is torch.float32 and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        found = model(IDS).logits
    assert float((found - expected).norm()) < 0.02 * float(expected.norm())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
    ],
    ids=["adamw", "sgd", "adagrad"],
)  # fmt: skip
def test_any_optimiser_keeps_the_mask(make: Any, tmp_path: Path) -> None:
    model = loaded(compressed("gpt2", tmp_path)).dequantize(torch.float32)
    end = compressor.keep_masks(model)
    linears = list(block_linears(model).values())
    before = [weight_of(module).detach().clone() for module in linears]
    optimiser = make(model.parameters())
    train(model, optimiser)
    for module, old in zip(linears, before, strict=True):
        MaskShape().check_weight(weight_of(module))
        assert not bool(module.weight[~module.weight_mask].any())
        assert not torch.equal(weight_of(module), old)
    end()
    train(model, optimiser, 1)
    assert bool(linears[0].weight[~linears[0].weight_mask].any())


def test_a_kept_weight_that_was_rounded_to_zero_may_grow_again(tmp_path: Path) -> None:
    out = compressed("llama", tmp_path, quantization={"values": "int4", "group_size": "row"})
    model = loaded(out).dequantize(torch.float32)
    before = masks_of(model)
    rounded_away = sum(int((~mask).sum()) - mask.numel() // 2 for mask in before.values())
    assert rounded_away > 0
    compressor.keep_masks(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    after = masks_of(model)
    assert all(int(mask.sum()) <= mask.numel() // 2 for mask in after.values())
    assert sum(int((mask & ~before[name]).sum()) for name, mask in after.items()) > 0.5 * rounded_away


def test_back_through_compress_the_mask_is_the_same(tmp_path: Path) -> None:
    out = compressed("llama", tmp_path, quantization={"values": "bfloat16"})
    model = loaded(out).dequantize(torch.float32)
    before = masks_of(model)
    compressor.keep_masks(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    model.save_pretrained(tmp_path / "tuned")
    load_tokenizer(out).save_pretrained(tmp_path / "tuned")
    recipe = parse_recipe({"sparsity": {"criterion": "given"}, "quantization": {"values": "int8"}})
    compress(str(tmp_path / "tuned"), recipe, tmp_path / "again", report=quiet)
    checkpoint = Checkpoint.open(tmp_path / "again")
    for name, scheme in packed_modules(checkpoint).items():
        if name in before:
            weight = make_format(scheme).unpack(checkpoint.module(name))
            assert not bool((weight != 0)[~before[name]].any())
            assert int((weight != 0).sum()) > 0.95 * int(before[name].sum())


def test_transformers_trainer_keeps_the_mask(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = loaded(compressed("llama", tmp_path, quantization={"values": "bfloat16"})).dequantize(torch.float32)
    before = {name: weight_of(module).detach().clone() for name, module in block_linears(model).items()}
    compressor.keep_masks(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", weight_decay=0.1, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in IDS.repeat(4, 1)]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    for name, module in block_linears(model).items():
        assert torch.equal(weight_of(module) != 0, before[name] != 0)
        assert not torch.equal(weight_of(module), before[name])


def test_zeros_of_a_plain_model_are_kept_by_their_pattern() -> None:
    from transformers import AutoModelForCausalLM

    from tests.tiny import tiny_config

    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ValueError, match="no layer of this model is pruned to 2:4"):
        compressor.keep_masks(model)
    shape = MaskShape.parse("4:8")
    for module in block_linears(model).values():
        module.weight.data.mul_(shape.mask(module.weight.detach().abs()))
    before = masks_of(model)
    compressor.keep_masks(model, "4:8")
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())


def test_a_low_rank_branch_is_refused(tiny_llama: Path, prose: Path, tmp_path: Path) -> None:
    loop = {"batch": 2, "precision": "fp32"}
    record = {
        "text": {"source": str(prose), "length": 32}, "sparsity": {"criterion": "magnitude"},
        "retraining": {"budget": "64tok", "validation_blocks": 1, "loop": loop, "ast": {"low_rank": {"segment": 16}}},
    }  # fmt: skip
    compress(str(tiny_llama), parse_recipe(record), tmp_path / "out", report=quiet)
    with pytest.raises(ValueError, match="low-rank branch"):
        loaded(tmp_path / "out").dequantize()
