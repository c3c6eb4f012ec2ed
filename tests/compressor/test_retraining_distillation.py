"""The chunked loss against autograd on full logits, and hidden states and heads of real model classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from compressor import kernels
from compressor.retraining import distillation
from compressor.retraining.distillation import chunked_loss, head_of, hidden_states, next_tokens, text_loss


def full_loss(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, a: float, t: float) -> torch.Tensor:
    kl = F.kl_div(F.log_softmax(logits / t, -1), F.log_softmax(teacher / t, -1), log_target=True, reduction="batchmean")
    return a * kl * t * t + (1 - a) * F.cross_entropy(logits, labels)


@pytest.mark.usefixtures("either_path")
@pytest.mark.parametrize(("a", "t"), [(1.0, 1.0), (0.67, 2.0), (1.0, 2.0), (0.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("chunk", [1 << 22, 37 * 5])
def test_chunked_loss_and_its_gradients_equal_the_full_ones(
    a: float, t: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 37), nn.Linear(8, 37)
    hidden, teacher = torch.randn(23, 8, requires_grad=True), torch.randn(23, 8)
    labels = torch.randint(0, 37, (23,))
    loss, gradient = chunked_loss(
        hidden, head, labels, teacher_TH=teacher, teacher_head=teacher_head, kl_weight=a, temperature=t, weight=0.5
    )
    assert teacher_head.weight.grad is None
    head_gradient = head.weight.grad
    head.weight.grad = None
    expected = full_loss(head(hidden), teacher_head(teacher), labels, a, t)
    (0.5 * expected).backward()
    assert loss.total == pytest.approx(expected.item(), rel=1e-5)
    assert loss.ce == pytest.approx(F.cross_entropy(head(hidden), labels).item(), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad)
    torch.testing.assert_close(head_gradient, head.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("a", "t"), [(0.5, 1.0), (0.67, 2.0)])
def test_the_kernel_gives_torchs_loss_and_slope(dtype: torch.dtype, a: float, t: float) -> None:
    """1,003 columns, far-apart logits, and one that leaves nothing for the others."""
    if not kernels.available():
        pytest.skip("the kernels are not compiled here")
    student, teacher = (20 * torch.randn(9, 1003)).to(dtype), (20 * torch.randn(9, 1003)).to(dtype)
    student[0, 7], teacher[1, 1002] = 300.0, 300.0
    labels = torch.randint(0, 1003, (9,))
    kl, ce, slope = distillation._loss_and_slope(student, teacher, labels, a, t, 0.25)
    kl_t, ce_t, slope_t = distillation._loss_and_slope_by_torch(student, teacher, labels, a, t)
    assert slope.dtype is dtype
    assert (kl, ce) == pytest.approx((kl_t, ce_t), rel=1e-4)
    torch.testing.assert_close(slope.float(), 0.25 * slope_t, rtol=1e-4 if dtype is torch.float32 else 1e-2, atol=1e-6)
    student[3, 3] = float("nan")
    assert all(math.isnan(value) for value in distillation._loss_and_slope(student, teacher, labels, a, t, 1.0)[:2])


def test_no_tensor_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_CHUNK_LOGITS", 64)
    seen = []
    head = nn.Linear(8, 16)
    head.register_forward_hook(lambda _m, _args, out: seen.append(out.shape[0]))
    hidden = torch.randn(21, 8)
    chunked_loss(hidden, head, torch.zeros(21, dtype=torch.int64), teacher_TH=hidden, teacher_head=head, kl_weight=1.0)
    assert max(seen) == 4


def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1,
            )
        ),
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=32, word_embed_proj_dim=8,
            )
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_text_loss_is_the_models_own(model: nn.Module) -> None:
    model.eval()
    ids = torch.randint(0, 50, (5, 12))
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(head_of(model)(hidden_states(model, ids)), model(input_ids=ids).logits)
    assert text_loss(model, ids, batch=2) == pytest.approx(
        F.cross_entropy(logits, ids[:, 1:].flatten()).item(), rel=1e-4
    )


def test_a_head_that_is_not_the_whole_story_is_refused() -> None:
    model = models()[0].eval()
    forward = model.forward

    def scaled(**inputs: torch.Tensor) -> object:
        output = forward(**inputs)
        output.logits = output.logits * 7.0
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="are not its head applied"):
        head_of(model)
    with pytest.raises(ValueError, match="has no LM head"):
        head_of(nn.Linear(2, 2))


def test_next_tokens_leave_out_the_last_position() -> None:
    positions, labels = next_tokens(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert positions.tolist() == [True, True, False, True, True, False]
    assert labels.tolist() == [2, 3, 5, 6]


def test_the_most_likely_tokens_stand_for_all() -> None:
    """With k = V it is the full loss; with fewer, KL over k tokens and one for the rest, with autograd's gradient."""
    torch.manual_seed(0)
    head, teacher_head = nn.Linear(8, 20), nn.Linear(8, 20)
    hidden, teacher = torch.randn(6, 8), torch.randn(6, 8)
    labels = torch.randint(0, 20, (6,))
    log_p = torch.log_softmax(teacher_head(teacher).detach() / 2, dim=-1)

    def loss(k: int) -> tuple[distillation.Loss, torch.Tensor]:
        kept = log_p.topk(k, dim=-1)
        top_k = distillation.TopK(kept.values, kept.indices)
        return chunked_loss(hidden, head, labels, top_k=top_k, kl_weight=0.7, temperature=2.0)

    full, slope = chunked_loss(
        hidden, head, labels, teacher_TH=teacher, teacher_head=teacher_head, kl_weight=0.7, temperature=2.0
    )
    assert loss(20)[0].total == pytest.approx(full.total, rel=1e-3)
    few, few_slope = loss(5)
    states = hidden.clone().requires_grad_()
    log_q = torch.log_softmax(head(states) / 2, dim=-1)
    kept = log_p.topk(5, dim=-1)
    p, q = kept.values.exp(), log_q.gather(-1, kept.indices).exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    kl = ((p * (kept.values - q.log())).sum(-1) + rest_p * (rest_p / rest_q).log()).mean()
    expected = 0.7 * 4 * kl + 0.3 * F.cross_entropy(head(states), labels)
    expected.backward()
    assert few.total == pytest.approx(expected.item(), rel=1e-5)
    assert few.kl < full.kl
    torch.testing.assert_close(few_slope, states.grad, rtol=1e-4, atol=1e-6)
    assert slope.shape == few_slope.shape
