"""Zero-shot accuracy of multiple-choice tasks in JSONL (`query`, `choices`, `gold`), scored by lm-eval.

    pip install halfweight[eval]

Every file of a folder is a task of its name; `acc` is the share of questions whose likeliest choice is the right one.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BATCH = 16


def zero_shot_accuracies(model: Any, tokenizer: Any, folder: Path) -> dict[str, float]:
    """`acc` and its standard error by task.

    Raises:
        ValueError: as `check_tasks`.
    """
    files = check_tasks(folder)
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

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


def check_tasks(folder: Path) -> list[Path]:
    """The folder's tasks, a file each.

    Raises:
        ValueError: there is none, or lm-eval is not installed.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{folder} holds no .jsonl file; give a folder of tasks, one a file")
    if find_spec("lm_eval") is None:
        raise ValueError("zero-shot tasks need lm-eval: pip install halfweight[eval]")
    return files


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
