"""Most likely next tokens by onnxruntime; the second half of each window goes through the KV cache."""

import json
import sys

import numpy as np
import onnxruntime


def main(model: str, windows: str, out: str) -> None:
    """Runs each window in two parts, the second with the cache of the first."""
    session = onnxruntime.InferenceSession(f"{model}/model.onnx", providers=["CPUExecutionProvider"])
    with open(windows) as file:
        ids = json.load(file)
    best = [predictions(session, window) for window in ids]
    with open(out, "w") as file:
        json.dump(best, file)


def predictions(session: onnxruntime.InferenceSession, window: list[int]) -> list[int]:
    cache = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values")
    }
    names = [entry.name for entry in session.get_outputs()]
    found: list[int] = []
    for start, end in ((0, len(window) // 2), (len(window) // 2, len(window))):
        feeds = {
            "input_ids": np.array([window[start:end]], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
        }
        outputs = dict(zip(names, session.run(None, feeds | cache), strict=True))
        found += outputs["logits"][0].argmax(-1).tolist()
        cache = {name.replace("present", "past_key_values"): outputs[name] for name in names if name != "logits"}
    return found[:-1]


if __name__ == "__main__":
    main(*sys.argv[1:])
