"""The teacher runs once for several students, and what a crash left behind is not believed."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor.retraining import AstSettings, Budget, TextDistillation, retrain
from compressor.retraining.teacher_cache import TeacherCache
from tests.retraining import FP32, linears_of, llama, masks_of, text

LAYOUT = {"hidden": ((3, 2), torch.bfloat16), "ids": ((3,), torch.int32)}


def student(teacher: nn.Module, kind: str) -> nn.Module:
    model = llama()
    linears = linears_of(model)
    objective = TextDistillation(text(), teacher, cache=kind, top_k=64)
    loop = replace(FP32, teacher_cache=kind)
    retrain(model, objective, linears, masks_of(linears), Budget(tokens=20 * 64), loop=loop, settings=AstSettings())
    return model


@pytest.mark.parametrize("kind", ["hidden", "top-k"])
def test_the_second_student_needs_no_teacher(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    teacher = llama()
    calls: list[int] = []
    first = student(teacher, kind)
    teacher.model.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    second = student(teacher, kind)
    assert len(calls) <= 3, "only the checks of the head and of its width run the teacher"
    plain = student(copy.deepcopy(teacher), "off")
    weights = (list(model.parameters()) for model in (first, second, plain))
    for one, two, exact in zip(*weights, strict=True):
        assert torch.equal(one, two)
        if kind == "hidden":
            assert torch.equal(one, exact)
        torch.testing.assert_close(one, exact, atol=0.02, rtol=0.1)


def test_blocks_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    cache = TeacherCache("a" * 64, 4, LAYOUT, tmp_path)
    rows = {"hidden": torch.randn(3, 2).bfloat16(), "ids": torch.tensor([5, 70_000, 2], dtype=torch.int32)}
    assert cache.get(1) is None
    cache.put(1, rows)
    again = TeacherCache("a" * 64, 4, LAYOUT, tmp_path)
    found = again.get(1)
    assert found is not None and all(torch.equal(found[name], rows[name]) for name in rows)
    assert again.get(0) is None
    again._files["ids"][1, 0] += 1
    assert again.get(1) is None
    assert TeacherCache("b" * 64, 4, LAYOUT, tmp_path).get(1) is None


def test_a_full_disk_is_told_before(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes .* GB and .* free; give a smaller teacher_top_k"):
        TeacherCache("c" * 64, 1 << 40, LAYOUT, tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="accepted are off, hidden, top-k"):
        TextDistillation(text(), llama(), cache="all")
