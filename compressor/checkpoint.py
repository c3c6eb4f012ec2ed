"""The only reader and writer of `OUT`, a Hugging Face folder whose linears are packed (`docs/format.md`).

A folder is untrusted input: shard names are plain names of files inside the folder, safetensors only, hashes are
compared with `manifest.json`, and every packed tensor is checked against the specification of its format before use.
Plain dense Hugging Face folders are read too, as the baseline.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compressor.formats import make_format
from compressor.formats.low_rank import LOW_RANK_NAMES, low_rank_spec
from compressor.output import OutputFolder
from compressor.scheme import QUANT_METHOD, QuantizationConfig, Scheme

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 64 * 2**20
_SCALES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_scale_2",
    ".weight_packed",
    ".qweight",
    ".weight.SCB",
    ".weight.absmax",
)
"""Endings of tensors that only quantised folders have."""
MAX_SHARD_BYTES = 2 * 2**30
_COPY_BYTES = 2**22
_PROVENANCE = ("README.md", "recipe.yaml", "metrics.jsonl")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_OWN_FILES = ("config.json", MANIFEST, "recipe.yaml", "halfweight.json", "quantize_config.json")
_DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: truncated, altered, incomplete or of an unknown version."""


def read_json(path: Path) -> Any:
    """Parses a JSON file of at most 64 MiB; raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Give a model folder, for example one made by `compress`.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Records size and SHA-256 of every file of the folder in `manifest.json`."""
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    files.pop(MANIFEST, None)
    record = {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": record}, indent=1))


class Checkpoint:
    """An opened model folder: its configuration, the scheme of each module, and its tensors, read on demand."""

    def __init__(self, folder: Path, config: dict[str, Any], shards: dict[str, Path], *, foreign: bool = False) -> None:
        self.folder = folder
        self.config = config
        self.shards = shards
        self._handles: dict[Path, Any] = {}
        record = config.get("quantization_config", config.get("compression_config"))
        self.packed = isinstance(record, Mapping) and record.get("quant_method") == QUANT_METHOD
        if record is not None and not self.packed and not foreign:
            method = record.get("quant_method") if isinstance(record, Mapping) else record
            raise CheckpointError(f"{folder} is quantised by {method!r}; halfweight reads its own and dense folders")
        self.quantization = QuantizationConfig.from_dict(record) if self.packed else QuantizationConfig({})

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True, foreign: bool = False) -> Checkpoint:
        """Opens a folder; with `verify`, compares every file with the manifest first.

        With `foreign`, a folder that another method quantised opens too, as the plain tensors that it holds.

        Raises:
            CheckpointError: a file is missing, truncated or altered, or the configuration is not understood.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder. Give a model folder, for example one made by `compress`.")
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'} must hold an object")
        try:
            checkpoint = cls(folder, config, {}, foreign=foreign)
        except ValueError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
        if verify and checkpoint.packed:
            check_manifest(folder)
        checkpoint.shards = _find_tensors(folder, inside_only=checkpoint.packed)
        if not (checkpoint.packed or foreign):
            checkpoint._check_dense()
        return checkpoint

    def _check_dense(self) -> None:
        """Raises CheckpointError where weights come with scales that config.json says nothing of."""
        scaled = next((name for name in sorted(self.shards) if name.endswith(_SCALES)), None)
        if scaled is not None:
            raise CheckpointError(
                f"{self.folder} holds {scaled}, but its config.json has no quantization_config that says how its "
                "weights are quantised. Give the dense model that it was made from, or one quantised by GPTQ, AWQ or "
                "compressed-tensors."
            )

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return sorted(self.shards)

    def stored_name(self, name: str, body: str) -> str:
        """The stored name of a model's tensor: hub files such as GPT-2's lack the name of the model's body in front."""
        bare = name.removeprefix(f"{body}.")
        return bare if name not in self.shards and bare in self.shards else name

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a module, or None where its weight is stored plainly."""
        return self.quantization.scheme_of(module)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor; raises CheckpointError when it is not there."""
        if name not in self.shards:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}: the checkpoint is incomplete")
        # A copy of its own: a view would keep the whole file mapped, and counted, as long as it lives.
        return self._handle(self.shards[name]).get_tensor(name).clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one stored tensor, without reading the others."""
        return self._handle(self.shards[name]).get_slice(name)[start:stop].clone()

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._handle(self.shards[name]).get_slice(name).get_shape())

    def _handle(self, shard: Path) -> Any:
        """The shard, opened once: its header names every tensor and takes a while to parse."""
        if shard not in self._handles:
            self._handles[shard] = safe_open(shard, "pt").__enter__()
        return self._handles[shard]

    def close(self) -> None:
        """Closes the shards; reading goes on to work and opens them again."""
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()

    def size_of(self, name: str) -> int:
        """Bytes of a stored tensor."""
        part = self._handle(self.shards[name]).get_slice(name)
        return torch.Size(part.get_shape()).numel() * _DTYPE_BYTES[part.get_dtype()]

    def module(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of one linear or embedding, checked against its format: {name in the format: tensor}.

        `bias` and the low-rank tensors are included where stored. A module without a scheme gives its `weight`.
        """
        prefix = f"{name}."
        scheme = self.scheme_of(name)
        extra = self._optional(prefix, (*LOW_RANK_NAMES, "bias"))
        if scheme is None:
            return {"weight": self.tensor(f"{prefix}weight")} | extra
        fmt = make_format(scheme)
        stored = self._optional(prefix, _format_names(scheme))
        try:
            fmt.validate(stored)
            branch = {key: tensor for key, tensor in extra.items() if key != "bias"}
            _validate_low_rank(scheme, fmt.shape_of(stored), branch)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}, {name}: {error}") from None
        return stored | extra

    def linear(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of several linears that read the same input, as one: rows concatenated (q/k/v, gate/up).

        Raises:
            CheckpointError: the modules differ in scheme, or in whether they have a bias.
        """
        parts = [self.module(name) for name in names]
        if len({self.scheme_of(name) for name in names}) > 1 or len({tuple(sorted(part)) for part in parts}) > 1:
            raise CheckpointError(f"{list(names)} differ in scheme or tensors and cannot be fused")
        return {n: torch.cat([part[n] for part in parts]) if len(parts) > 1 else parts[0][n] for n in parts[0]}

    def _optional(self, prefix: str, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensor(prefix + name) for name in names if prefix + name in self.shards}


_DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def _format_names(scheme: Scheme) -> list[str]:
    return list(make_format(Scheme(scheme.format, -1, scheme.dtype)).spec(8, 8))


def _validate_low_rank(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
    expected = {} if scheme.low_rank is None else low_rank_spec(scheme.low_rank, *shape)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"low-rank branch: expected {expected}, found {found}")
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise ValueError("low-rank branch holds NaN or infinity")


def check_manifest(folder: Path) -> None:
    """Compares every file that is needed with `manifest.json`; raises CheckpointError naming the first that differs.

    The model card and other provenance may be edited, or missing.
    """
    record = read_json(folder / MANIFEST)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST} has no 'files'; the checkpoint is incomplete")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{folder / MANIFEST} has no 'bytes' and 'sha256' of {name!r}; it is damaged")
        if name in _PROVENANCE or name.startswith(_LICENCES):
            continue
        path = _plain_file(folder, name)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, expected {entry['bytes']}: it is truncated or altered")
        if sha256_of(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not match its SHA-256 in {MANIFEST}: it is altered. Copy it again.")


def _plain_file(folder: Path, name: object) -> Path:
    """`folder / name` when that is a regular file inside the folder; raises CheckpointError otherwise."""
    if not isinstance(name, str) or not name or str(Path(name)) != name or ".." in Path(name).parts or name[0] in "/.":
        raise CheckpointError(f"{folder} names a file {name!r}; only plain file names inside the folder are accepted")
    path = folder / name
    if path.resolve() != folder.resolve() / name or not path.is_file():
        raise CheckpointError(f"{path} is missing, or is not a regular file: the checkpoint is incomplete")
    return path


def _find_tensors(folder: Path, *, inside_only: bool) -> dict[str, Path]:
    """{tensor name: shard}. A hub cache holds links, so plain dense folders may link out; packed ones may not.

    An index beside a whole file is of older shards: transformers reads the file too.
    """
    if (folder / INDEX).exists() and not (folder / SINGLE).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} has no 'weight_map'")
        shards = sorted(set(map(str, weight_map.values())))
    else:
        weight_map, shards = None, [SINGLE]
    found: dict[str, Path] = {}
    for shard in shards:
        path = _plain_file(folder, shard) if inside_only or shard != Path(shard).name else folder / shard
        try:
            with safe_open(path, "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: the model folder has no safetensors weights") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or altered: {error}") from None
    if weight_map is not None and set(weight_map) != set(found):
        difference = sorted(set(weight_map) ^ set(found))[:5]
        raise CheckpointError(f"{folder / INDEX} and the shards differ in {difference}: the checkpoint is incomplete")
    return found


class ShardWriter:
    """Streams tensors into safetensors shards of a folder; one tensor at a time is held in memory.

    A shard's header comes first and names every offset, so a tensor waits in a side file until its shard is full. The
    data are ordered as safetensors itself orders them: by element size, largest first, so that all are aligned.

    Args:
        folder: where the shards go.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.folder = folder
        self.total_bytes = 0
        self._max_shard_bytes = max_shard_bytes
        self._waiting = folder / "shard.waiting"
        self._pending: dict[str, _Waiting] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self._max_shard_bytes:
            self._write_shard()
        plain = tensor.detach().cpu().contiguous()
        with self._waiting.open("ab") as file:
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
        self._pending[name] = _Waiting(
            _DTYPE_NAMES[plain.dtype], tuple(plain.shape), plain.element_size(), self._pending_bytes, size
        )
        self._pending_bytes += size
        self.total_bytes += size

    def _write_shard(self) -> None:
        ordered = sorted(self._pending.items(), key=lambda item: (-item[1].element_size, item[0]))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, part in ordered:
            header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [end, end + part.size]}
            end += part.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self.folder / f"shard-{len(self._shards)}"
        with path.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            if ordered:
                with self._waiting.open("rb") as source:
                    for _, part in ordered:
                        _copy(source, target, part.start, part.size)
        self._waiting.unlink(missing_ok=True)
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Writes the last shard and gives all of them their names."""
        self._write_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            shard = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / shard)
            weight_map |= dict.fromkeys(names, shard)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1))


@dataclass(frozen=True)
class _Waiting:
    """A tensor in the side file: what the header will say, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    element_size: int
    start: int
    size: int


def _copy(source: IO[bytes], target: IO[bytes], start: int, size: int) -> None:
    source.seek(start)
    while size:
        block = source.read(min(size, _COPY_BYTES))
        target.write(block)
        size -= len(block)


class CheckpointWriter(ShardWriter):
    """Streams a checkpoint into a staged output folder.

    Args:
        output: the entered output folder.
        max_shard_bytes: a shard is closed before it would grow beyond this.
    """

    def __init__(self, output: OutputFolder, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        super().__init__(output.open_stage(), max_shard_bytes=max_shard_bytes)
        self._output = output

    def finish(self, config: Mapping[str, Any]) -> None:
        """Writes the last shard, index, configuration and manifest, and puts the folder in place."""
        self.close()
        (self.folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        write_manifest(self.folder)
        self._output.commit()


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, chat templates, generation settings and licence; weights, indices and records stay behind."""
    for file in sorted(source.iterdir()):
        own = file.name in _OWN_FILES or file.name.endswith(".index.json")
        known = file.suffix in (".json", ".jinja", ".model", ".txt") or file.name.upper().startswith(_LICENCES)
        if file.is_file() and known and not own:
            shutil.copyfile(file, target / file.name)
    # Named chat templates, and the settings of a sentence encoder's modules, such as 1_Pooling/config.json.
    for file in sorted((*source.glob("additional_chat_templates/*.jinja"), *source.glob("[0-9]*_*/config.json"))):
        (target / file.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(source))
