"""Runs in a Python that has vLLM: loads folders one after the other and writes what it thinks comes next.

    python consumer.py REQUEST ANSWER

REQUEST is JSON: {"folders": [...], "windows": [[token, ...], ...], "engine": {...}, "adapter": folder or null,
"stock_int4": whether dense int4 goes to vLLM's own kernels as on a GPU}. ANSWER gets, for each folder,
{"next": [[token], ...], "best": [[token, ...], ...]}, or {"error": text}.
"""

import contextlib
import gc
import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def answer(folder, request):
    """What one folder says."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    windows = request["windows"]
    if request["stock_int4"]:
        from serve.vllm_plugin import int4

        int4.takes = lambda scheme, tensors, dtype: scheme.format == "int4"
    llm = LLM(folder, max_model_len=len(windows[0]) + 8, max_num_seqs=4, disable_log_stats=True, **request["engine"])
    # On a CPU, vLLM 0.32 fails where log-probabilities of a prompt meet an adapter: then only the next token is wanted.
    places = None if request.get("adapter") else 1
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=places, detokenize=False)
    adapter = LoRARequest("adapter", 1, request["adapter"]) if request.get("adapter") else None
    prompts = [{"prompt_token_ids": window} for window in windows]
    results = llm.generate(prompts, settings, use_tqdm=False, lora_request=adapter)
    found = {"next": [list(result.outputs[0].token_ids) for result in results]}
    if places is not None:
        found["best"] = [
            [next(token for token, entry in place.items() if entry.rank == 1) for place in result.prompt_logprobs[1:]]
            for result in results
        ]
    shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
    if shutdown is not None:
        shutdown()
    return found


def main(request, out):
    """All folders of a request."""
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(request) as file:
        request = json.load(file)
    answers = {}
    for folder in request["folders"]:
        try:
            answers[folder] = answer(folder, request)
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            answers[folder] = {"error": " / ".join(f"{type(cause).__name__}: {cause}" for cause in causes)}
        gc.collect()
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()
        heavy = ["compressor.pipeline", "compressor.retraining", "compressor.calibration", "compressor.data"]
        answers["training"] = [name for name in heavy if name in sys.modules]
        with open(out, "w") as file:
            json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
