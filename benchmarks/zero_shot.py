"""Zero-shot accuracy of multiple-choice tasks in JSONL (`query`, `choices`, `gold`), scored by lm-eval.

    pip install halfweight[eval]

Every file of a folder is a task of its name; `acc` is the share of questions whose likeliest choice is the right one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BATCH = 16


def zero_shot_accuracies(model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """`acc` and its standard error by task.

    Raises:
        ValueError: lm-eval is not installed, or the folder holds no tasks.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no .jsonl file; give a folder of tasks, one a file")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(f"zero-shot tasks need lm-eval ({error}): pip install halfweight[eval]") from None
    tasks = [ConfigurableTask(config=_config(file)) for file in files]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    found = simple_evaluate(lm, tasks=tasks, bootstrap_iters=0)
    assert found is not None
    result = {}
    for file in files:
        scores = found["results"][file.stem]
        count = found["n-samples"][file.stem]["effective"]
        share = float(scores["acc,none"])
        result[f"acc {file.stem}"] = share
        result[f"stderr acc {file.stem}"] = (share * (1 - share) / count) ** 0.5
    return result


def _config(file: Path) -> dict[str, Any]:
    """A task as lm-eval describes one."""
    return {
        "task": file.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
