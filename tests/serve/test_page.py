"""The chat page in a real browser: a question is asked, an answer streams in, with its figures."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.encoders import LABELS, save_encoder
from tests.serve.test_server import server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size=1100,800 --remote-debugging-pipe"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


class Tab:
    """One page, driven through the browser's debugging pipe: JSON messages with a zero byte behind each."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
        self._rest, self._count = b"", 0
        self._session: str | None = None

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url=url)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def close(self) -> None:
        self._read.close()
        self._write.close()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = self._read.read(65536)
            assert part, "the browser is gone"
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    theirs_read, write = os.pipe()
    read, theirs_write = os.pipe()
    command = f"exec {CHROMIUM} {FLAGS} --user-data-dir={profile} 3<&{theirs_read} 4>&{theirs_write}"
    process = subprocess.Popen(
        ["bash", "-c", command],
        pass_fds=(theirs_read, theirs_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    tab = Tab(read, write)
    try:
        yield tab
    finally:
        tab.close()
        process.terminate()
        process.wait(20)


def test_page_talks(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(os.environ.get("HALFWEIGHT_PAGE_MODEL") or tiny_folder("llama"))
    with server(folder, "--served-model-name", "story") as (url, _), browser(tmp_path) as tab:
        tab.open(url)
        tab.wait_for("document.getElementById('model')?.textContent === 'story'")
        tab.value("document.getElementById('max_tokens').value = 40")
        tab.value("ask('Why is the sky blue?')")
        tab.wait_for("running === null && messages.length === 2")
        assert tab.value("messages[1].content").strip()
        assert "tokens/s" in tab.value("document.querySelector('.assistant .figures').textContent")
        assert tab.value("document.querySelectorAll('.error').length") == 0
        if shots := os.environ.get("HALFWEIGHT_SCREENSHOTS"):
            image = tab.call("Page.captureScreenshot")["data"]
            (Path(shots) / "page.png").write_bytes(base64.b64decode(image))
        tab.value("document.getElementById('max_tokens').value = 400; ask('And at night?')")
        tab.value("document.getElementById('clear').click()")
        tab.wait_for("running === null")
        assert tab.value("document.getElementById('empty') !== null && messages.length === 0")


@pytest.mark.parametrize("head", [True, False], ids=["classifier", "encoder"])
def test_page_of_an_encoder(tmp_path: Path, head: bool) -> None:
    folder = save_encoder(tmp_path / "model", "bert", head=head)
    with server(folder, "--served-model-name", "film") as (url, _), browser(tmp_path / "profile") as tab:
        tab.open(url)
        tab.wait_for("document.getElementById('model')?.textContent === 'film'")
        tab.value("document.getElementById('input').value = 'the film was good\\nthe end was very bad'")
        tab.value("document.getElementById('form').requestSubmit()")
        tab.wait_for("document.querySelectorAll('.result').length === 2")
        shown = tab.value("document.querySelector('.result').innerText")
        assert all(label in shown for label in LABELS) if head else "1.000" in shown
        assert "2 texts" in tab.value("document.getElementById('figures').textContent")
        if shots := os.environ.get("HALFWEIGHT_SCREENSHOTS"):
            image = tab.call("Page.captureScreenshot")["data"]
            (Path(shots) / f"{'classifier' if head else 'encoder'}_page.png").write_bytes(base64.b64decode(image))
