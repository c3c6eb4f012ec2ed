"""The real thing: a server process, OpenAI's own client, signals, hang-ups, and slow or greedy senders."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

Folder = Callable[[str], Path]
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@contextmanager
def server(
    folder: Path, *flags: str, program: tuple[str, ...] = ("-m", "serve"), **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running server's URL and process."""
    process = subprocess.Popen(
        [sys.executable, *program, str(folder), "--port", "0", "--kv-cache-gb", "0.02", "--eager", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
    )
    try:
        yield _url(process), process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _url(process: subprocess.Popen[str]) -> str:
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"url\s+(https?://\S+)", line):
            return found[1]
    raise AssertionError("the server did not start:\n" + "".join(lines))


@pytest.fixture(scope="module")
def url(tiny_folder: Folder) -> Iterator[str]:
    with server(tiny_folder("llama"), "--dtype", "float32") as (address, _):
        yield address


def client(url: str, **options: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **({"api_key": "none"} | options), max_retries=0)


def gauge(url: str, name: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    [value] = re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(value)


def aborted(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    [value] = re.findall(r'^vllm:request_success_total{.*"abort"} (\S+)$', text, re.MULTILINE)
    return float(value)


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def test_openai_client_talks_and_streams(url: str) -> None:
    api = client(url)
    model = api.models.list().data[0].id
    answer = api.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, **GREEDY)
    stream = api.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    completion = api.completions.create(model=model, prompt="The quick", max_tokens=4, **GREEDY)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4


def test_async_openai_clients_get_the_answers_of_one(url: str) -> None:
    async def many() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api:
            calls = (
                api.chat.completions.create(
                    model="", messages=[{"role": "user", "content": f"Story {i % 4}"}], max_tokens=20, **GREEDY
                )
                for i in range(16)
            )
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    texts = asyncio.run(many())
    assert all(texts[i] == texts[i % 4] for i in range(16))
    assert len(set(texts)) == 4


def test_openai_client_sees_errors_as_its_own(url: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("other")
    with pytest.raises(openai.BadRequestError):
        client(url).chat.completions.create(model="", messages=MESSAGES, temperature=-1)


def test_hanging_up_frees_the_request(url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 480, "ignore_eos": True}
    before = aborted(url)
    for count, stream in enumerate((True, False), start=1):
        with raw_request(url, body | {"stream": stream}):
            assert eventually(lambda: gauge(url, "vllm:num_requests_running") == 1)
        assert eventually(lambda: gauge(url, "vllm:num_requests_running") == 0)
        assert eventually(lambda done=before + count: aborted(url) == done)  # rather than finished
        assert gauge(url, "halfweight:kv_blocks_used") == 0


@contextmanager
def raw_request(
    url: str, body: dict[str, object], path: str = "/v1/chat/completions", buffer: int | None = None
) -> Iterator[socket.socket]:
    """Send a request by hand, and read as little as `buffer` says; the connection is cut when the block is left."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect((host, int(port)))
        connection.sendall(head.encode() + data)
        yield connection


def test_slow_heads_do_not_hinder_others(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port))) for _ in range(100)]
    try:
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert httpx.get(f"{url}/health", timeout=15).status_code == 200
        connections[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # the slow are waited for still
            connections[-1].recv(10)
        connections[0].settimeout(15)
        assert connections[0].recv(10) == b""
    finally:
        for connection in connections:
            connection.close()


def test_huge_head_is_refused(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Large: " + b"a" * 200_000 + b"\r\n\r\n")
        connection.settimeout(10)
        assert b"200 OK" not in connection.recv(100)
    assert httpx.get(f"{url}/health").status_code == 200


def test_what_is_not_http_gets_an_error_in_our_shape(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"HELLO SERVER\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"invalid_http"' in answer


@pytest.mark.parametrize("where", ["url", "one header", "many headers", "trailer", "chunk extension"])
def test_huge_heads_and_framing_are_refused(url: str, where: str) -> None:
    """Fed slowly enough to come in pieces; none may pile up in memory."""
    host, port = url.removeprefix("http://").split(":")
    chunked = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"
    starts = {
        "url": b"GET /",
        "one header": b"GET /health HTTP/1.1\r\nX-Large: ",
        "many headers": b"GET /health HTTP/1.1\r\n",
        "trailer": chunked + b"0\r\nX-Large: ",
        "chunk extension": chunked + b"1;name=",
    }
    piece = b"X-Large: 1\r\n" * 1000 if where == "many headers" else b"a" * 10_000
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(10)
        with contextlib.suppress(ConnectionError):
            connection.sendall(starts[where])
            for _ in range(100):
                connection.sendall(piece)
                time.sleep(0.001)
            assert b" 400 " in connection.recv(100)
    assert httpx.get(f"{url}/health").status_code == 200


def test_sigterm_lets_streams_finish(tiny_folder: Folder) -> None:
    with server(tiny_folder("llama")) as (url, process):
        body = {"messages": MESSAGES, "max_tokens": 400, "stream": True, "ignore_eos": True}
        with httpx.Client(timeout=60) as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
            assert httpx.get(f"{url}/health").status_code == 200
            refused = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(timeout=5) == 0


def test_few_descriptors_make_clients_wait(tiny_folder: Folder) -> None:
    async def ask(url: str, http: httpx.AsyncClient) -> int:
        return (
            await http.post(f"{url}/tokenize", json={"prompt": "hello"}, headers={"Connection": "close"})
        ).status_code

    async def all_at_once(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=60) as http:
            return await asyncio.gather(*(ask(url, http) for _ in range(120)))

    with server(tiny_folder("llama")) as (url, process):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
        assert set(asyncio.run(all_at_once(url))) == {200}
        process.terminate()
        assert process.stdout is not None
        assert len(process.stdout.read().splitlines()) < 20


def test_sigterm_does_not_wait_for_a_schema_that_takes_hours(tiny_folder: Folder) -> None:
    patterns = [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwx"]
    body = {"messages": MESSAGES, "structured_outputs": {"json": {"allOf": patterns}}}
    with server(tiny_folder("llama")) as (url, process), raw_request(url, body):
        assert eventually(lambda: bool(psutil.Process(process.pid).children()))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


IMPATIENT = """
import sys
import serve.api.server
from serve.cli import main

serve.api.server.SEND_SECONDS = 0.3
sys.exit(main(sys.argv[1:]))
"""
LONG_STREAM = {"messages": MESSAGES, "max_tokens": 480, "ignore_eos": True, "n": 16, "stream": True}
LONG_STREAM |= {"logprobs": True, "top_logprobs": 20}
LONG_ANSWER = {"tokens": [1] * 2**20}  # megabytes: more than the system takes for a client that does not read


def test_clients_that_do_not_read_lose_their_connection(tiny_folder: Folder) -> None:
    with server(tiny_folder("llama"), program=("-c", IMPATIENT)) as (url, process):
        connections = psutil.Process(process.pid).net_connections
        for path, body in (("/v1/chat/completions", LONG_STREAM), ("/detokenize", LONG_ANSWER)):
            with raw_request(url, body, path, buffer=4096) as connection:
                assert connection.recv(12) == b"HTTP/1.1 200"
                assert eventually(lambda: len(connections("tcp")) == 1, seconds=20), connections("tcp")
                assert httpx.get(f"{url}/health").status_code == 200
                assert eventually(lambda: gauge(url, "halfweight:kv_blocks_used") == 0)


def test_sigterm_lets_slow_clients_read_whole_answers(tiny_folder: Folder) -> None:
    with server(tiny_folder("llama")) as (url, process), raw_request(url, LONG_ANSWER, "/detokenize", 4096) as slow:
        head = slow.recv(400)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        found = re.search(rb"content-length: (\d+)", head)
        assert found is not None
        missing = int(found[1]) + head.index(b"\r\n\r\n") + 4 - len(head)
        while missing:
            missing -= len(slow.recv(2**20)) or pytest.fail("the answer was cut")
        assert process.wait(timeout=5) == 0


FAILING = """
import sys
from serve.cli import main
from serve.engine.llm_engine import LLMEngine

def step(engine):
    raise RuntimeError("injected")

LLMEngine.step = step
sys.exit(main(sys.argv[1:]))
"""


def test_a_failed_engine_ends_the_process(tiny_folder: Folder) -> None:
    with server(tiny_folder("llama"), program=("-c", FAILING)) as (url, process):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "The quick"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
        assert process.wait(timeout=5) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_when_idle_ends_it_at_once(tiny_folder: Folder, number: signal.Signals) -> None:
    with server(tiny_folder("llama")) as (url, process):
        httpx.get(f"{url}/health")
        process.send_signal(number)
        assert process.wait(timeout=3) == 0


def test_second_signal_forces(tiny_folder: Folder) -> None:
    with server(tiny_folder("llama"), "--shutdown-timeout", "60") as (url, process):
        body = {"messages": MESSAGES, "max_tokens": 480, "stream": True, "ignore_eos": True, "n": 16}
        with httpx.Client(timeout=60) as http, http.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(timeout=5)


def test_api_key_and_model_name(tiny_folder: Folder) -> None:
    flags = ("--host", "0.0.0.0", "--served-model-name", "story")
    with server(tiny_folder("llama"), *flags, HALFWEIGHT_API_KEY="sesame") as (url, _):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            client(url).models.list()
        assert client(url, api_key="sesame").models.list().data[0].id == "story"


def test_https(tiny_folder: Folder, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with server(tiny_folder("llama"), "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)) as (url, _):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(f"{url}/health", verify=context).json() == {"status": "ok"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https", "http") + "/health")


def test_curl_streams(url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 8, "stream": True, "ignore_eos": True}
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", "@-"]
    result = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True, timeout=30, check=True)
    events = [line for line in result.stdout.split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"


def test_guided_and_guessed_answers_through_openai(tiny_folder: Folder) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    with server(tiny_folder("llama"), "--prompt-lookup", "4", "--deterministic") as (url, _):
        api = client(url)
        answer = api.chat.completions.create(model="", messages=MESSAGES, max_tokens=60, response_format=wanted)
        assert set(json.loads(answer.choices[0].message.content or "")) == {"ok"}
        api.completions.create(model="", prompt="again and again " * 8, max_tokens=60, **GREEDY)
        assert gauge(url, "vllm:spec_decode_num_draft_tokens_total") > 0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def child_seconds() -> float:
    """What child processes that have ended took of a processor; a clock runs on while others have it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="module")
def import_seconds() -> float:
    """What the import of torch takes of a processor."""
    before = child_seconds()
    subprocess.run([sys.executable, "-c", "from serve.quick_torch import import_torch; import_torch()"], check=True)
    return child_seconds() - before


def test_help_is_quick(import_seconds: float) -> None:
    before = child_seconds()
    result = run("--help")
    assert result.returncode == 0
    assert "--max-model-len" in result.stdout
    assert child_seconds() - before < import_seconds / 2


def test_check_generates_a_token(tiny_folder: Folder) -> None:
    result = run(str(tiny_folder("llama")), "--check", "--kv-cache-gb", "0.01")
    assert result.returncode == 0, result.stderr
    assert "generated [" in result.stdout


def test_terminal_chat(tiny_folder: Folder) -> None:
    """And it goes on when the context is full."""
    result = subprocess.run(
        [sys.executable, "-m", "serve", "chat", str(tiny_folder("llama")), "--max-model-len", "64", "--eager"],
        input="Hello\n/reset\nAgain\n" + "One two three four\n" * 20 + "/reset\nAgain\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 100
    assert "takes at most 64 tokens" in result.stdout and "/reset forgets" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("/nowhere",), "is not a folder"),
        (("{tiny}", "--runtime", "vroom"), "unknown runtime 'vroom'; accepted: torch"),
        (("{tiny}", "--host", "0.0.0.0"), "--api-key"),
        (("{tiny}", "--ssl-keyfile", "x.pem"), "--ssl-certfile"),
        (("{tiny}", "--port", "99999"), "--port is 99999"),
        (("{tiny}", "--threads", "0"), "--threads is 0"),
        (("{tiny}", "--kv-cache-gb", "900000"), "lower --kv-cache-gb"),
        (("{damaged}",), "the checkpoint is damaged"),
        (("{tiny}", "--max-model-len", "100000"), "--max-model-len is 100000"),
        (("{empty}",), "no config.json"),
    ],
)
def test_mistakes_get_one_line(tiny_folder: Folder, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    names = {name: str(tmp_path / name) for name in ("empty", "damaged")} | {"tiny": str(tiny_folder("llama"))}
    (tmp_path / "empty").mkdir()
    shutil.copytree(names["tiny"], names["damaged"])
    weights = tmp_path / "damaged" / "model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    result = run(*(argument.format(**names) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_port_in_use_is_said_before_anything_is_loaded(tiny_folder: Folder, import_seconds: float) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        before = child_seconds()
        result = run(str(tiny_folder("llama")), "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "cannot listen" in result.stderr
    assert child_seconds() - before < import_seconds / 2
