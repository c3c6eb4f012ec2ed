"""Runs in a Python that has vLLM: prints, as JSON, what registering the plugin does, once and again."""

import json
import sys

from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

from serve import vllm_plugin


def loaded():
    """What of ours is imported that only a checkpoint of ours needs, or that nobody serving needs."""
    heavy = (
        "serve.vllm_plugin.linear",
        "serve.vllm_plugin.embedding",
        "serve.engine.llm_engine",
        "compressor.pipeline",
    )
    return [name for name in heavy if name in sys.modules]


def refusal():
    """What another vLLM would read."""
    from serve.vllm_plugin import config

    config.vllm_version = "0.33.1"
    try:
        config.HalfweightConfig.from_config({})
    except ValueError as error:
        return str(error)
    return None


def main():
    """Registers three times, as vLLM's processes do."""
    vllm_plugin.register()
    first = get_quantization_config("halfweight")
    vllm_plugin.register()
    vllm_plugin.register()
    again = get_quantization_config("halfweight")
    found = {
        "registered": QUANTIZATION_METHODS.count("halfweight"),
        "same": first is again,
        "loaded": loaded(),
        "refusal": refusal(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
