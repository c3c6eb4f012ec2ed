"""Most likely next tokens by stock vLLM, without any plugin."""

import json
import os
import sys


def main(model: str, windows: str, out: str) -> None:
    """Asks for the log-probabilities of the prompts; rank 1 is what vLLM would have said."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_PLUGINS"] = ""
    from vllm import LLM, SamplingParams

    with open(windows) as file:
        ids = json.load(file)
    llm = LLM(model, enforce_eager=True, max_model_len=len(ids[0]) + 8, max_num_seqs=2)
    settings = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    results = llm.generate([{"prompt_token_ids": window} for window in ids], settings)
    best = [
        [next(token for token, entry in place.items() if entry.rank == 1) for place in result.prompt_logprobs[1:]]
        for result in results
    ]
    with open(out, "w") as file:
        json.dump(best, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
