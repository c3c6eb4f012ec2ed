"""Seconds that a decode step of one stream spends in vLLM's linears, layer by layer and uncompiled, and their bytes.

`python FILE MODEL OUT.json TOKENS`. The engine runs in this process, so that the layers' products can be timed from
outside, each until the device is done with it; the LM head counts with neither the seconds nor the bytes.
"""

import json
import os
import sys
import time
from statistics import median
from typing import Any


def main(model: str, out: str, tokens: str) -> None:
    """Times every token of one answer; medians over the tokens."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.linear import LinearBase

    llm = LLM(model, enforce_eager=True, max_model_len=512, max_num_seqs=1, enable_prefix_caching=False, seed=0)
    executor = llm.llm_engine.model_executor
    [layers] = executor.collective_rpc(lambda worker: _linears(worker.get_model(), LinearBase))
    spent = [0.0]
    for layer in layers:
        _time(layer, spent)
    settings = SamplingParams(max_tokens=int(tokens), temperature=0, ignore_eos=True, detokenize=False)
    steps, linears = [], []
    llm.llm_engine.add_request("0", {"prompt_token_ids": list(range(100, 164))}, settings)
    while llm.llm_engine.has_unfinished_requests():
        spent[0] = 0.0
        start = _now()
        llm.llm_engine.step()
        steps.append(_now() - start)
        linears.append(spent[0])
    size = sum(_bytes(layer) for layer in layers)
    found = {"linears_seconds": median(linears[1:]), "step_seconds": median(steps[1:]), "linear_bytes": size}
    with open(out, "w") as file:
        json.dump(found, file)


def _now() -> float:
    """Seconds, once a GPU has done what it was given."""
    import torch  # vLLM sets its environment first

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _linears(model: Any, kind: type) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _bytes(layer: Any) -> int:
    """Of what a layer computes from; vLLM hands dense weights to oneDNN and keeps none, so they are counted by size."""
    own = [*layer.parameters(), *layer.buffers()]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in own if tensor.numel() and tensor is not layer.bias}
    weights = layer.input_size * layer.output_size
    return sum(held.values()) or 2 * weights


def _time(layer: Any, spent: list[float]) -> None:
    inner = layer.quant_method.apply

    class Timed:
        """The layer's method with a clock around its product."""

        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def apply(self, *arguments: Any, **named: Any) -> Any:
            start = _now()
            result = inner(*arguments, **named)
            spent[0] += _now() - start
            return result

    method = layer.quant_method
    layer.quant_method = Timed()


if __name__ == "__main__":
    main(*sys.argv[1:])
