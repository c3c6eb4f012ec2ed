"""What a model makes of a task: predictions of its head, or texts that it writes, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.calibration import evaluating
from compressor.data import opening_of
from compressor.precision import widened
from compressor.tasks.encoding import Labelled, cut_prompt, encode_labelled, encode_prompts
from compressor.tasks.metrics import measure
from compressor.tasks.task import Example, Task


@torch.no_grad()
def predict(model: nn.Module, encoded: Labelled, batch: int = 64) -> list[Any]:
    """Class indices, or numbers; examples of like length run together, answers come in the given order."""
    order = sorted(range(len(encoded.ids)), key=lambda place: len(encoded.ids[place]))
    found: dict[int, Any] = {}
    device = next(model.parameters()).device
    with evaluating(model), widened(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            inputs = {name: tensor.to(device) for name, tensor in encoded.batch(chosen).items()}
            logits = model(**inputs).logits.float()
            answers = logits.squeeze(-1) if encoded.regression else logits.argmax(-1)
            found |= dict(zip(chosen, answers.tolist(), strict=True))
    return [found[place] for place in range(len(order))]


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, length: int, beams: int = 4, batch: int = 8
) -> list[str]:
    """A text for every prompt, by beam search, up to `length` tokens in all.

    A prompt that leaves less than a quarter of them to its answer is cut at its front.
    """
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    opening, most = len(opening_of(tokenizer)), length - max(1, length // 4)
    prompts = [cut_prompt(prompt, opening, most) for prompt in encode_prompts(tokenizer, examples)]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: dict[int, str] = {}
    with evaluating(model), widened(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = max(len(prompts[place]) for place in chosen)
            rows = [[padding] * (width - len(prompts[place])) + prompts[place] for place in chosen]
            mask = [[0] * (width - len(prompts[place])) + [1] * len(prompts[place]) for place in chosen]
            answers = model.generate(
                input_ids=torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                num_beams=beams,
                do_sample=False,
                max_new_tokens=length - width,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=padding,
            )
            texts = tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)
            found |= dict(zip(chosen, texts, strict=True))
    return [found[place].strip() for place in range(len(order))]


def evaluate(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], *, length: int, beams: int = 4
) -> dict[str, float]:
    """Every metric of a task on some of its examples."""
    if task.kind == "generation":
        texts = write(model, tokenizer, examples, length=length, beams=beams)
        return measure(task.metrics, texts, [[text.strip() for text in example.references] for example in examples])
    encoded = encode_labelled(tokenizer, examples, length, task.kind == "regression")
    return measure(task.metrics, predict(model, encoded), [example.label for example in examples])
