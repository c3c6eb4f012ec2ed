"""This project's gate before vLLM's routes: vLLM's own key leaves some of them open and reads bodies of any size."""

from __future__ import annotations

import os

from starlette.types import ASGIApp

from serve.api.limits import Gate, Limits

KEY, BODY = "VLLM_API_KEY", "HALFWEIGHT_MAX_BODY_BYTES"


class Access(Gate):
    """The gate as vLLM's `--middleware` takes it; key and limit come from the environment."""

    def __init__(self, app: ASGIApp) -> None:
        limits = Limits()
        limits.max_body_bytes = int(os.environ.get(BODY, limits.max_body_bytes))
        super().__init__(app, os.environ.get(KEY) or None, limits)
