"""What the command line says, in one object; imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    folder: Path
    runtime: str = "torch"
    runtime_arguments: tuple[str, ...] = ()
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = None
    insecure: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    kv_cache_gb: float | None = None
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    threads: int | None = None
    prefix_caching: bool = True
    eager: bool = False
    prompt_lookup: int = 0
    deterministic: bool = False
    max_queue: int = 512
    max_body_mb: float = 8.0
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    check: bool = False
    debug: bool = False
    given: frozenset[str] = frozenset()
    """The fields that the command line named."""

    def chose(self, name: str) -> bool:
        """Whether somebody chose this field's value, be it our default: a runtime may have another."""
        default = {field.name: field.default for field in fields(self)}[name]
        return name in self.given or getattr(self, name) != default

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.folder.resolve().name

    @property
    def encodes(self) -> bool:
        """Whether the folder's model classifies or embeds texts instead of writing them, as its config.json says."""
        try:
            config = json.loads((self.folder / "config.json").read_text("utf-8"))
            [architecture, *_] = config["architectures"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # whoever loads the folder says what is wrong with it
        name = str(architecture)
        return name.endswith("ForSequenceClassification") or (name.endswith("Model") and "LMHead" not in name)

    @property
    def loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def validate(self) -> None:
        """ValueError for what can be known to be wrong before anything is loaded."""
        if not self.folder.is_dir():
            raise ValueError(
                f"{self.folder} is not a folder; give a folder that `compress` made, or a Hugging Face model folder"
            )
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.folder} has no config.json, so it is not a model folder")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}, but must lie between 0 and 65535")
        if not self.loopback and self.api_key is None and not self.insecure:
            raise ValueError(
                f"--host {self.host} lets other machines in without a key; "
                "give --api-key (or HALFWEIGHT_API_KEY), or --insecure if that is what you want"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile belong together; give both or neither")
        for path in (self.ssl_certfile, self.ssl_keyfile):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} does not exist")
        parallel = self.tensor_parallel_size != 1 or self.pipeline_parallel_size != 1
        if self.runtime == "torch" and (parallel or self.runtime_arguments):
            raise ValueError(
                "--tensor-parallel-size, --pipeline-parallel-size and arguments after -- need --runtime vllm"
            )
        counts = {"threads": "the default", "tensor_parallel_size": "one rank", "pipeline_parallel_size": "one rank"}
        for name, otherwise in counts.items():
            if (count := getattr(self, name)) is not None and count < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {count}, but must be at least 1; leave it out for {otherwise}")
        for name in ("max_queue", "max_body_mb", "request_timeout", "shutdown_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
