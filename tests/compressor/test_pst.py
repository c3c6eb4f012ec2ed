"""PST: its gradients against autograd's, what trains and what does not, its masks, and how it goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from compressor.calibration import weight_of
from compressor.masks import MaskShape, check_n_m
from compressor.models import block_linears
from compressor.retraining.loop import LoopSettings, by_length
from compressor.retraining.pst import Pst, PstSettings, growing_mask
from compressor.retraining.pst_layer import TERMS, ScoredLinear, Terms, cubic, scored_parts
from compressor.retraining.rollback import DivergedError
from compressor.retraining.rows_and_heads import Structures
from compressor.retraining.schedules import Budget
from compressor.retraining.task_methods import METHODS, FullTraining
from compressor.retraining.task_objectives import LabelledSentences, Teacher, WrittenAnswers
from compressor.retraining.task_training import TaskRun, finetune, sizes, start
from compressor.tasks.encoding import Answers, Labelled

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LOOP = LoopSettings(batch=8, learning_rate=1e-2, precision="fp32", kl_weight=0.0, beta2=0.999)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: a second thread costs more than it gives, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bert(labels: int = 2) -> Any:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, **SIZES, max_position_embeddings=32, initializer_range=0.2, num_labels=labels)
    return BertForSequenceClassification(config)


def roberta() -> Any:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=64, **SIZES, max_position_embeddings=34, initializer_range=0.2)
    return RobertaForSequenceClassification(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    )


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, **SIZES, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config)


HEADS = {bert: "classifier", roberta: "classifier", gpt2: "nothing", llama: "nothing"}


def sentences(count: int = 64) -> Labelled:
    """Sentences of class 1 hold token 7, others token 9; the rest is noise."""
    rows = torch.randint(10, 64, (count, 12), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 2
    rows[:, 0] = 1
    rows[torch.arange(count), 1 + torch.arange(count) % 11] = torch.where(labels == 1, 7, 9)
    return Labelled(rows.tolist(), None, labels, 16, 0, False)


def answers(count: int = 64) -> Answers:
    """The answer repeats the prompt's first tokens."""
    prompts = torch.randint(3, 64, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return Answers(prompts, [[*prompt[:3], 2] for prompt in prompts], 16)


def objective_of(build: Any) -> Any:
    return LabelledSentences(sentences()) if build in (bert, roberta) else WrittenAnswers(answers())


def head_of(model: nn.Module, build: Any) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(HEADS[build]))


def run(build: Any = bert, method: str = "pst", pattern: str = "2:4", **options: Any) -> tuple[Any, Any]:
    model = build()
    settings = options.pop("settings", PstSettings(weight_rank=4, score_rank=4, refresh_every=4))
    what = TaskRun(method, MaskShape.parse(pattern), options.pop("structures", None), settings, head_of(model, build))
    objective = options.pop("objective", None) or objective_of(build)
    budget = options.pop("budget", Budget(tokens=30 * 8 * 16))
    options = {"loop": LOOP, **options}
    return model, finetune(model, objective, block_linears(model), budget, what, **options)


def reference(part: ScoredLinear, module: nn.Module, x: Tensor, terms: Terms) -> dict[str, Tensor]:
    """The same gradients by autograd: M is S's straight-through binarisation."""
    leaf = {key: factor.master.clone().requires_grad_() for key, factor in part.factors.items()}
    weight = part.base + terms.beta * leaf["u"] @ leaf["v"]
    score = torch.zeros_like(weight)
    if "magnitude" in terms.score:
        score = score + (weight.abs() if terms.straight_through else weight.abs().detach())
    if "low_rank" in terms.score:
        score = score + terms.alpha1 * leaf["a"] @ leaf["b"]
    if "rows_columns" in terms.score:
        score = score + terms.alpha2 * (leaf["r"] + leaf["c"])
    mask = part.mask.float() + score - score.detach()
    ((x @ (mask * weight).t() + module.bias).tanh().sum()).backward()
    return {key: tensor.grad for key, tensor in leaf.items() if tensor.grad is not None}


@pytest.mark.parametrize("score", [TERMS, ("magnitude",), ("magnitude", "low_rank"), ("rows_columns",)])
@pytest.mark.parametrize("straight_through", [True, False])
def test_gradients_are_autograds(score: tuple[str, ...], straight_through: bool) -> None:
    torch.manual_seed(0)
    module, terms = nn.Linear(24, 40), Terms(3, 2, 0.7, 0.5, 1.3, score, straight_through)
    [part] = scored_parts("x", module, terms, torch.Generator().manual_seed(0))
    for factor in part.factors.values():
        factor.master.normal_()
    part.mask.copy_(torch.rand(40, 24) > 0.5)
    module.weight.requires_grad_(True)
    part.publish()
    x = torch.randn(5, 24)
    module(x).tanh().sum().backward()
    assert module.weight.grad is not None
    part.project(module.weight.grad)
    wanted = reference(part, module, x, terms)
    assert set(wanted) == set(part.factors)
    for key, gradient in wanted.items():
        torch.testing.assert_close(part.factors[key].parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_long_layers_are_worked_on_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for block in (1 << 17, 100):
        monkeypatch.setattr("compressor.retraining.pst_layer._BLOCK", block)
        torch.manual_seed(0)
        module = nn.Linear(24, 40)
        part = ScoredLinear("x", module, slice(0, 40), Terms(3, 2, 1, 1, 1, TERMS, True), torch.Generator())
        for factor in part.factors.values():
            factor.master.copy_(torch.linspace(-1, 1, factor.master.numel()).view_as(factor.master))
        part.project(torch.ones(40, 24))
        part.publish()
        found.append([part.score(), module.weight.detach().clone(), *(f.parameter.grad for f in part.factors.values())])
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(whole, blocks)


def test_conv1d_is_three_parts_and_gives_the_same_gradients() -> None:
    model = gpt2()
    module, terms = model.transformer.h[0].attn.c_attn, Terms(2, 2, 1, 1, 1, TERMS, True)
    parts = scored_parts("h.0.attn.c_attn", module, terms, torch.Generator().manual_seed(0))
    assert [part.name for part in parts] == [f"h.0.attn.c_attn.{letter}" for letter in "qkv"]
    assert all(part.base.shape == (32, 32) for part in parts)
    for part in parts:
        part.factors["v"].master.normal_()
        part.mask.copy_(torch.rand(32, 32) > 0.3)
        part.publish()
    joined = torch.cat([part.masked() for part in parts])
    assert torch.equal(joined, module.weight.detach().t())
    gradient = torch.randn(32, 96)
    for part, rows in zip(parts, gradient.t().split(32), strict=True):
        part.project(gradient)
        expected = (rows * (part.mask + part.weight().abs())) @ part.factors["v"].master.t()
        torch.testing.assert_close(part.factors["u"].parameter.grad, expected, rtol=1e-4, atol=1e-5)


def test_frozen_weights_have_no_gradient_and_do_not_move() -> None:
    model = bert()
    linears = block_linears(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    what = TaskRun("pst", settings=PstSettings(weight_rank=2, score_rank=2), head=head_of(model, bert))
    live, trainer = start(model, LabelledSentences(sentences()), linears, Budget(tokens=1280), what, loop=LOOP)
    live._one_step(0.0)
    small = {id(entry.parameter) for entry in trainer.trained}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in small)
    for _ in range(3):
        live._one_step(0.0)
    assert isinstance(trainer, Pst)
    for name, parts in trainer.layers.items():
        assert torch.equal(torch.cat([part.base for part in parts]), before[f"{name}.weight"])
    untouched = [name for name in before if not name.startswith("classifier") and name[:-7] not in linears]
    assert untouched and all(torch.equal(dict(model.named_parameters())[name], before[name]) for name in untouched)
    assert not torch.equal(model.classifier.weight, before["classifier.weight"]), "the task's head trains"


@pytest.mark.parametrize("build", [bert, roberta, gpt2, llama])
@pytest.mark.parametrize("pattern", ["2:4", "90%"])
def test_it_learns_the_task_and_leaves_a_plain_sparse_model(build: Any, pattern: str) -> None:
    losses: list[float] = []
    model, report = run(build, pattern=pattern, progress=lambda step, total, metrics: losses.append(metrics["total"]))
    assert report.steps == 30 and losses[-1] < losses[0]
    shape = MaskShape.parse(pattern)
    for module in block_linears(model).values():
        weight = weight_of(module)
        zeros = float((weight == 0).float().mean())
        assert zeros == pytest.approx(0.5 if pattern == "2:4" else 0.9, abs=0.01)
        if build is not gpt2:  # its joint projection has three thresholds
            shape.check_weight(weight)
        assert not module.weight._post_accumulate_grad_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert report.trained_parameters < 0.5 * report.parameters


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_prunes_as_it_says(method: str) -> None:
    losses: list[float] = []
    model, report = run(
        bert, method, budget=Budget(tokens=40 * 8 * 16),
        progress=lambda step, total, metrics: losses.append(metrics["total"]),
    )  # fmt: skip
    assert sum(losses[-10:]) < sum(losses[:10])
    weights = [weight_of(module) for module in block_linears(model).values()]
    if method == "dense":
        assert all(float((weight == 0).float().mean()) < 0.01 for weight in weights)
        return
    for weight in weights:
        check_n_m(weight)
    full = sum(parameter.numel() for parameter in model.parameters())
    scores = sum(weight.numel() for weight in weights)
    wanted = {"magnitude": full, "movement": full + scores}.get(method)
    assert report.trained_parameters == wanted if wanted else report.trained_parameters < 0.5 * full


def test_what_trains_in_full_trains_by_adam() -> None:
    """A mask without a decay of what is under it changes nothing of the optimiser."""
    model, other = bert(), bert()
    what = TaskRun("magnitude", settings=PstSettings(), head=frozenset())
    _, trainer = start(model, objective_of(bert), block_linears(model), Budget(tokens=1280), what, loop=LOOP)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, betas=(LOOP.beta1, LOOP.beta2), weight_decay=0.0)
    torch.manual_seed(0)
    for step in range(20):
        for entry in trainer.trained:
            if entry.name != "clock":
                gradient = torch.randn(entry.parameter.shape)
                entry.gradient = gradient if gradient.dim() > 1 else gradient[None]
                other.get_parameter(entry.name).grad = gradient.clone()
        trainer.update(step, 0.0, 1e-2, 1.0)
        theirs.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wanted", [0, 16, 40])
def test_equal_scores_are_not_all_dropped(wanted: int) -> None:
    mask = growing_mask(torch.zeros(8, 16), MaskShape.parse("50%"), wanted / 64)
    assert int(mask.sum()) == 128 - wanted


def test_micro_batches_of_answers_weigh_by_their_tokens() -> None:
    """Short answers and long ones: the gradient is that of the whole batch."""
    encoded = Answers([[5, 6]] * 8, [[7 + place] * (1 + 3 * (place % 3)) + [2] for place in range(8)], 16)
    found = []
    for micro_batch in (None, 1):
        model, loop = gpt2(), replace(LOOP, micro_batch=micro_batch)
        what = TaskRun("dense", settings=PstSettings())
        live, trainer = start(model, WrittenAnswers(encoded), block_linears(model), Budget(tokens=128), what, loop=loop)
        loss = live._forward_backward(torch.arange(8))
        found.append((loss, {entry.name: entry.gradient for entry in trainer.trained if entry.gradient is not None}))
    (whole, gradients), (parts, others) = found
    assert parts == pytest.approx(whole, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-3)


def test_a_teacher_keeps_the_precision_of_its_buffers() -> None:
    teacher = Teacher(llama())
    teacher.prepare(torch.device("cpu"), torch.bfloat16)
    assert next(teacher.model.parameters()).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in teacher.model.buffers() if buffer.is_floating_point())


def test_a_run_is_known_again_by_another_process(tmp_path: Path) -> None:
    """Names of a head stand in a set, whose order is another in every process."""
    script = (
        "import sys; from pathlib import Path; from tests.compressor.test_pst import *\n"
        "run(loop=LOOP, budget=Budget(tokens=128), work_dir=Path(sys.argv[1]))"
    )
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)


def test_movement_scores_add_up_what_they_say() -> None:
    """With plain steps instead of Adam's, S is the sum of -G * W."""
    model = bert()
    what = TaskRun("movement", settings=PstSettings(score_rate=1.0), head=head_of(model, bert))
    live, trainer = start(
        model, LabelledSentences(sentences()), block_linears(model), Budget(tokens=1280), what, loop=LOOP
    )
    layer = next(iter(trainer.sparse.values()))  # type: ignore[union-attr]
    live.objective.backward(model, torch.arange(8), 1.0)
    for entry in trainer.trained:
        entry.take_gradient(several=False)
    gradient, weight = layer.weight.gradient.clone(), layer.weight.master.clone()
    trainer.update(0, 0.0, 1e-3, 1.0)
    slope = gradient * weight
    moved = slope.abs() > 1e-6
    assert torch.equal(layer.score.master.sign()[moved], -slope.sign()[moved])


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_a_masked_weight_rests_while_its_score_moves(method: str) -> None:
    """dL/dW = M * G, as in the papers of both."""
    model = bert()
    what = TaskRun(method, settings=PstSettings(score_rate=1.0), head=head_of(model, bert))
    live, trainer = start(
        model, LabelledSentences(sentences()), block_linears(model), Budget(tokens=1280), what, loop=LOOP
    )
    assert isinstance(trainer, FullTraining)
    trainer.refresh(1.0)
    layer = next(iter(trainer.sparse.values()))
    before = layer.weight.master.clone()
    for step in range(3):
        live.objective.backward(model, torch.arange(8), 1.0)
        for entry in trainer.trained:
            entry.take_gradient(several=False)
        trainer.update(step, 0.5, 1e-3, 1.0)
    moved = layer.weight.master != before
    assert not bool(moved[~layer.mask].any()) and float(moved[layer.mask].float().mean()) > 0.9
    if layer.score is not None:
        assert float((layer.score.master != 0)[~layer.mask].float().mean()) > 0.9


def test_a_dense_run_ends_on_its_grid_too() -> None:
    def snap(name: str, weight: torch.Tensor) -> Any:
        scale = weight.abs().amax() / 7
        return lambda values, rows: (values / scale).round().clamp(-7, 7) * scale

    model, _ = run(bert, "dense", loop=replace(LOOP, quantize_share=0.3), snap=snap)
    for module in block_linears(model).values():
        assert len(weight_of(module).unique()) <= 15


def test_the_learned_score_follows_the_true_movement() -> None:
    model = bert()
    settings = PstSettings(weight_rank=4, score_rank=4, refresh_every=1000)
    what = TaskRun("pst", settings=settings, head=head_of(model, bert))
    live, trainer = start(
        model, LabelledSentences(sentences()), block_linears(model), Budget(tokens=3840), what, loop=LOOP
    )
    assert isinstance(trainer, Pst)
    part = next(iter(trainer.parts.values()))
    part.track_movement()
    for _ in range(25):
        live._one_step(0.0)
    assert part.movement is not None
    found = torch.corrcoef(torch.stack([part.learned_score().flatten(), part.movement.flatten()]))[0, 1]
    assert float(found) > 0.2


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    for method in ("pst", "movement"):
        whole, _ = run(method=method)
        loop = LoopSettings(**{**vars(LOOP), "checkpoint_minutes": 0.0})

        class StopError(Exception):
            pass

        def stop(step: int, total: int, metrics: Any) -> None:
            if step == 17:
                raise StopError

        with pytest.raises(StopError):
            run(method=method, loop=loop, work_dir=tmp_path / method, progress=stop)
        resumed, report = run(method=method, loop=loop, work_dir=tmp_path / method)
        assert report.steps == 30
        for name, parameter in resumed.named_parameters():
            assert torch.equal(parameter, dict(whole.named_parameters())[name]), name


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    class Broken(LabelledSentences):
        def backward(self, model: nn.Module, examples: Tensor, weight: float) -> dict[str, float]:
            return {"total": float("nan")}

    with pytest.raises(DivergedError, match="step 0"):
        run(objective=Broken(sentences()))


@pytest.mark.parametrize("build", [bert, gpt2])
def test_a_teacher_is_followed(build: Any) -> None:
    """At weight 1 the labels say nothing, and the model comes to answer as its teacher does."""
    torch.manual_seed(1)
    encoded = objective_of(build).encoded
    teacher = build()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(torch.where(torch.rand_like(parameter) < 0.2, -1.0, 1.0))
        if build is bert:
            teacher.classifier.weight.mul_(-10.0)  # what it says is to differ from class to class
    make = LabelledSentences if build is bert else partial(WrittenAnswers, label_smoothing=0.0)
    kl: list[float] = []
    run(
        build, objective=make(encoded, teacher=Teacher(teacher, 1.0, 2.0)), budget=Budget(tokens=60 * 8 * 16),
        progress=lambda step, total, metrics: kl.append(metrics["kl"]),
    )  # fmt: skip
    assert sum(kl[-10:]) < 0.6 * 10 * kl[0]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_loss_with_a_teacher_is_the_stated_one() -> None:
    encoded, student, teacher = sentences(), bert(), bert()
    torch.manual_seed(3)
    torch.nn.init.normal_(teacher.classifier.weight)
    objective = LabelledSentences(encoded, Teacher(teacher, 0.25, 2.0))
    objective.prepare(student, torch.float32)
    found = objective.backward(student.eval(), torch.arange(8), 1.0)
    with torch.no_grad():
        logits, taught = (model(**encoded.batch(range(8))).logits for model in (student, teacher.eval()))
    p = (taught / 2).softmax(-1)
    kl = 4 * (p * (p.log() - (logits / 2).log_softmax(-1))).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(logits, encoded.labels[:8])
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["total"] == pytest.approx(float(0.25 * kl + 0.75 * ce), rel=1e-4)


def test_regression_learns_a_number() -> None:
    encoded = sentences()
    numbers = Labelled(encoded.ids, None, encoded.labels.float() * 3, 16, 0, True)
    model = bert(labels=1)
    losses: list[float] = []
    what = TaskRun("pst", settings=PstSettings(weight_rank=2, score_rank=2), head=head_of(model, bert))
    finetune(
        model, LabelledSentences(numbers), block_linears(model), Budget(tokens=40 * 8 * 16), what, loop=LOOP,
        progress=lambda step, total, metrics: losses.append(metrics["total"]),
    )  # fmt: skip
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("grown", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("pattern", ["2:4", "50%", "90%"])
def test_masks_grow_to_their_final_shape(pattern: str, grown: float) -> None:
    score, shape = torch.randn(32, 64), MaskShape.parse(pattern)
    mask = growing_mask(score, shape, grown)
    final = shape.mask(score)
    assert int((~mask).sum()) == int(grown * int((~final).sum()))
    assert not (~mask & final).any(), "what the final mask keeps is kept all along"
    if 0 < grown < 1:
        assert score[~mask].max() <= score[mask & ~final].min()


def test_the_schedule_is_cubic() -> None:
    given = [cubic(progress / 10, 0.1, 0.9, 0.1, 0.3) for progress in range(11)]
    assert given[:2] == [0.1, 0.1] and given[7:] == [0.9] * 4
    assert given[4] == pytest.approx(0.9 - 0.8 * 0.5**3)
    assert given == sorted(given)


@pytest.mark.parametrize(("ranks", "share"), [(4, 0.0136), (8, 0.0258)])
def test_trainable_share_of_bert_base(ranks: int, share: float) -> None:
    """The paper's 1.5 % at ranks 4, of all parameters, counted on real modules without weights."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    linears, terms = block_linears(model), PstSettings(weight_rank=ranks, score_rank=ranks).terms
    parts = [part for name, m in linears.items() for part in scored_parts(name, m, terms, torch.Generator())]
    trained, _ = sizes([factor for part in parts for factor in part.factors.values()])
    assert trained / sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("every", [4, 30])
@pytest.mark.parametrize("build", [bert, gpt2, llama])
def test_heads_and_neurons_fall_as_wholes(build: Any, every: int) -> None:
    """Also where no mask has been chosen since their share was reached."""
    model = build()
    names = [part.name for name, module in block_linears(model).items()
             for part in scored_parts(name, module, PstSettings(1, 1).terms, torch.Generator())]  # fmt: skip
    structures = Structures.of(names, model.config, 0.5)
    settings = PstSettings(weight_rank=4, score_rank=4, refresh_every=every)
    model, report = run(build, pattern="50%", structures=structures, settings=settings)
    masks = {name: part.mask for name, part in report.trainer.parts.items()}
    groups = 2 if build is llama else 4
    for block in structures.blocks:
        kept = masks[block.value].view(groups, -1).float().mean(1)
        assert sorted(kept.tolist()) == [0.0] * (groups // 2) + [1.0] * (groups // 2)
        out = masks[block.out].t().reshape(groups, -1).float().mean(1)
        assert torch.equal(out, kept), "the columns that read a dropped head are dropped too"
        neurons = masks[block.up[0]].float().mean(1)
        assert float(neurons.mean()) == 0.5 and set(neurons.tolist()) == {0.0, 1.0}
        assert all(torch.equal(masks[name].float().mean(1), neurons) for name in block.up)
        assert torch.equal(masks[block.down].float().mean(0), neurons)


def test_a_dropped_neuron_may_be_cut_out() -> None:
    """Its bias says nothing, as the column that reads it is zero."""
    model = bert()
    names = {f"{name}": None for name in block_linears(model)}
    structures = Structures.of(names, model.config, 0.5)
    model, report = run(bert, pattern="50%", structures=structures)
    ids = torch.tensor(sentences().ids[:4])
    before = model(input_ids=ids).logits
    for block in structures.blocks:
        dropped = ~report.trainer.parts[block.up[0]].mask[:, 0]
        with torch.no_grad():
            model.get_submodule(block.up[0]).bias[dropped] += 5.0
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_an_unknown_block_is_refused_for_rows_and_heads() -> None:
    with pytest.raises(ValueError, match="built like BERT, GPT-2 and Llama"):
        Structures.of(["a.b"], bert().config, 0.5)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"score": ("size",)}, "score terms"),
        ({"weight_rank": 0}, "at least 1"),
        ({"schedule_start": 0.7, "schedule_end": 0.3}, "together below 1"),
        ({"initial_sparsity": 1.0}, "must lie in"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PstSettings(**wrong)
    with pytest.raises(ValueError, match="task method 'taylor'"):
        TaskRun("taylor")
    structures = Structures((), 4, 0.2)
    for given in ({"shape": MaskShape.parse("2:4")}, {"shape": MaskShape.parse("90%"), "structures": structures}):
        with pytest.raises(ValueError, match=r"initial_sparsity 0.7 given; it must not exceed 0\.[25]"):
            TaskRun(settings=PstSettings(initial_sparsity=0.7), **given)  # type: ignore[arg-type]


def test_epochs_are_steps() -> None:
    assert Budget(epochs=3).resolved(100, 64, 16).tokens == 19 * 16 * 64


def test_batches_hold_examples_of_like_length_and_each_once() -> None:
    lengths = torch.randint(5, 60, (333,), generator=torch.Generator().manual_seed(1))
    order = torch.randperm(333, generator=torch.Generator().manual_seed(2))
    found = by_length(order, lengths, 16, torch.Generator().manual_seed(3))
    assert sorted(found.tolist()) == list(range(333))
    widths = [int(lengths[batch].max() - lengths[batch].min()) for batch in found.split(16)]
    assert max(widths) < 12
    means = [float(lengths[batch].float().mean()) for batch in found.split(16)]
    assert means != sorted(means), "batches are shuffled"
    assert by_length(order, lengths, 16, torch.Generator().manual_seed(4)).tolist() != found.tolist()
