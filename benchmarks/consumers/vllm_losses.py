"""Mean negative log-likelihoods of windows of tokens by vLLM, with whatever plugin the model needs.

`python FILE MODEL WINDOWS.json OUT.json`.
"""

import json
import os
import sys
from typing import Any


def main(model: str, windows: str, out: str) -> None:
    """One number for each window: the mean over its tokens but the first."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams

    with open(windows) as file:
        ids = json.load(file)
    llm = LLM(model, max_model_len=len(ids[0]) + 8, max_num_seqs=1, enable_prefix_caching=False, seed=0)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    results = llm.generate([{"prompt_token_ids": window} for window in ids], settings, use_tqdm=False)
    with open(out, "w") as file:
        json.dump([_loss(window, result.prompt_logprobs) for window, result in zip(ids, results, strict=True)], file)


def _loss(window: list[int], places: Any) -> float:
    given = zip(window[1:], places[1:], strict=True)
    return -sum(place[token].logprob for token, place in given) / (len(window) - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
