"""Most likely next tokens by Optimum's ORTModelForCausalLM; it also has to generate, through its own cache handling."""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main(model: str, windows: str, out: str) -> None:
    """Runs the windows one by one, and continues the first of them greedily."""
    loaded = ORTModelForCausalLM.from_pretrained(model, use_cache=True, use_io_binding=False)
    with open(windows) as file:
        ids = json.load(file)
    best = []
    for window in ids:
        tokens = torch.tensor([window])
        logits = loaded(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        best.append(logits[0, :-1].argmax(-1).tolist())
    start = torch.tensor([ids[0][:32]])
    written = loaded.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False)
    if written.shape[1] <= start.shape[1]:
        raise SystemExit("generate() gave no token")
    with open(out, "w") as file:
        json.dump(best, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
