"""What one linear layer becomes, and the record of it in `config.json`.

A `Scheme` names a packed format and its parameters. `QuantizationConfig` maps module names to schemes in the vocabulary
of compressed-tensors (`config_groups`, `targets`, `ignore`, `re:`), under our own `quant_method`. Configurations are
untrusted input: unknown keys and versions are refused, and a `re:` target may only use a safe subset of regular
expressions (literals, `\\.` and `\\d+`), so that no checkpoint can stall or crash its reader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

QUANT_METHOD = "halfweight"
VERSION = 1
DTYPES = ("bfloat16", "float16")
KV_CACHE_DTYPES = ("bfloat16", "int8", "fp8")
LOW_RANK_DTYPES = ("bfloat16", "int8", "int4")
_SAFE_PATTERN = re.compile(r"(?:[A-Za-z0-9_-]|\\\.|\\d\+)+")


def _strict(kind: str, cls: type, record: object) -> dict[str, Any]:
    """Returns `record` as keyword arguments of the dataclass `cls`; refuses anything else with a clear sentence."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{kind} must be an object, got {type(record).__name__}")
    accepted = [f.name for f in fields(cls)]
    unknown = sorted(set(map(str, record)) - set(accepted))
    if unknown:
        raise ValueError(f"{kind} has unknown keys {unknown}; accepted: {accepted}")
    return dict(record)


@dataclass(frozen=True)
class LowRank:
    """The SLoRB branch of AST (section 3.4): `y += S @ segment_sums(x)`, S of shape [O, I / segment].

    Args:
        segment: k, the number of consecutive inputs that share one column of S.
        dtype: how S is stored: `bfloat16`, or `int8` or `int4` with one scale a row.
        trained_projection: whether the projection X [in_features / segment, in_features] was trained and is stored.
    """

    segment: int = 16
    dtype: str = "int8"
    trained_projection: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.segment, bool) or not isinstance(self.segment, int) or self.segment < 1:
            raise ValueError(f"low_rank.segment must be a positive integer, got {self.segment!r}")
        if self.dtype not in LOW_RANK_DTYPES:
            raise ValueError(f"low_rank.dtype must be one of {LOW_RANK_DTYPES}, got {self.dtype!r}")
        if not isinstance(self.trained_projection, bool):
            raise ValueError(f"low_rank.trained_projection must be true or false, got {self.trained_projection!r}")


@dataclass(frozen=True)
class Scheme:
    """A packed format and its parameters.

    Args:
        format: a name in `compressor.formats.FORMATS`.
        group_size: inputs that share one scale; -1 means the whole row. Ignored by formats without scales.
        dtype: dtype of unquantised values and of scales.
        low_rank: the extra low-rank branch, if any.
    """

    format: str = "dense"
    group_size: int = -1
    dtype: str = "bfloat16"
    low_rank: LowRank | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.format, str):
            raise ValueError(f"format must be a string, got {self.format!r}")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
            raise ValueError(f"group_size must be a positive integer, or -1 for the whole row, got {size!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

    @classmethod
    def from_dict(cls, record: object) -> Scheme:
        """Parses one record; raises ValueError on unknown keys and bad values."""
        values = _strict("a scheme", cls, record)
        if values.get("low_rank") is not None:
            values["low_rank"] = LowRank(**_strict("low_rank", LowRank, values["low_rank"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The JSON record."""
        return asdict(self)


def _compile(target: str) -> re.Pattern[str]:
    if not target.startswith("re:"):
        return re.compile(re.escape(target))
    pattern = target[3:]
    if len(pattern) > 500 or not _SAFE_PATTERN.fullmatch(pattern):
        raise ValueError(
            f"target {target[:80]!r} is not accepted: after 're:' use letters, digits, '_', '-', '\\.' and '\\d+' only"
        )
    return re.compile(pattern)


@dataclass(frozen=True)
class Group:
    """Modules that share one scheme. Targets are exact module names, or `re:` patterns that match a whole name."""

    targets: tuple[str, ...]
    scheme: Scheme
    patterns: tuple[re.Pattern[str], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(_compile(target) for target in self.targets))

    def matches(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self.patterns)


@dataclass(frozen=True)
class QuantizationConfig:
    """The `quantization_config` block of `config.json`: which module became what."""

    groups: Mapping[str, Group]
    ignore: tuple[str, ...] = ()
    kv_cache_dtype: str | None = None  # how a server keeps keys and values unless told otherwise; None: its own choice

    def __post_init__(self) -> None:
        if self.kv_cache_dtype not in (None, *KV_CACHE_DTYPES):
            raise ValueError(f"kv_cache_dtype must be one of {KV_CACHE_DTYPES} or null, got {self.kv_cache_dtype!r}")

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of a module, or None where it stays as it was."""
        if any(_compile(target).fullmatch(name) for target in self.ignore):
            return None
        return next((group.scheme for group in self.groups.values() if group.matches(name)), None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON record."""
        groups = {key: {"targets": list(group.targets), **group.scheme.to_dict()} for key, group in self.groups.items()}
        record = {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "config_groups": groups,
            "ignore": list(self.ignore),
        }
        return record if self.kv_cache_dtype is None else record | {"kv_cache_dtype": self.kv_cache_dtype}

    @classmethod
    def from_dict(cls, record: object) -> QuantizationConfig:
        """Parses the record; raises ValueError on another method, an unknown version or key, or a bad target."""
        if not isinstance(record, Mapping):
            raise ValueError(f"quantization_config must be an object, got {type(record).__name__}")
        if record.get("quant_method") != QUANT_METHOD:
            raise ValueError(f"quant_method must be {QUANT_METHOD!r}, got {record.get('quant_method')!r}")
        if record.get("version") != VERSION:
            raise ValueError(
                f"this checkpoint has format version {record.get('version')!r}, this halfweight reads version "
                f"{VERSION}; install the halfweight that wrote it, or compress the model again"
            )
        unknown = sorted(
            set(map(str, record)) - {"quant_method", "version", "config_groups", "ignore", "kv_cache_dtype"}
        )
        if unknown:
            raise ValueError(f"quantization_config has unknown keys {unknown}")
        groups = record.get("config_groups")
        if not isinstance(groups, Mapping):
            raise ValueError("quantization_config.config_groups must be an object")
        return cls(
            {str(key): _parse_group(str(key), group) for key, group in groups.items()},
            _parse_targets("ignore", record.get("ignore", [])),
            record.get("kv_cache_dtype"),
        )

    @classmethod
    def from_schemes(
        cls, schemes: Mapping[str, Scheme], kv_cache_dtype: str | None = None, plain: Iterable[str] = ()
    ) -> QuantizationConfig:
        """Builds the shortest record for `schemes`: layers that differ only in their numbers share one `re:` target.

        Args:
            plain: modules that stay as they were; those that a target would match are ignored by name.
        """
        by_shape: dict[str, dict[str, Scheme]] = {}
        for name, scheme in schemes.items():
            by_shape.setdefault(re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")), {})[name] = scheme
        targets: dict[Scheme, list[str]] = {}
        for pattern, members in by_shape.items():
            distinct = set(members.values())
            if len(distinct) == 1 and len(members) > 1:
                targets.setdefault(distinct.pop(), []).append(f"re:{pattern}")
            else:
                for name, scheme in members.items():
                    targets.setdefault(scheme, []).append(name)
        groups = {f"group_{i}": Group(tuple(names), scheme) for i, (scheme, names) in enumerate(targets.items())}
        ignore = tuple(name for name in plain if any(group.matches(name) for group in groups.values()))
        return cls(groups, ignore, kv_cache_dtype)


def _parse_group(key: str, record: object) -> Group:
    if not isinstance(record, Mapping):
        raise ValueError(f"config_groups.{key} must be an object")
    rest = {name: value for name, value in record.items() if name != "targets"}
    return Group(_parse_targets(f"config_groups.{key}.targets", record.get("targets")), Scheme.from_dict(rest))


def _parse_targets(where: str, record: object) -> tuple[str, ...]:
    if not isinstance(record, list) or not all(isinstance(item, str) for item in record) or len(record) > 100_000:
        raise ValueError(f"{where} must be a list of module names or 're:' patterns")
    return tuple(record)
