"""Classifiers and sentence encoders: the numbers of transformers, batches that change nothing, the HTTP contract."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from compressor.checkpoint import write_manifest
from compressor.scheme import Scheme
from serve.api.app import build_app
from serve.api.limits import Gate, Limits
from serve.api.metrics import EncoderMetrics
from serve.api.state import EncoderState
from serve.engine.async_encoder import AsyncEncoder, Job, choose
from serve.engine.encoder import EncoderEngine
from serve.engine.encoder_models import EncoderInput
from serve.engine.llm_engine import NotFiniteError
from tests.serve.encoders import (
    LABELS,
    POSITIONS,
    SCHEMES,
    VOCABULARY,
    pack_encoder,
    save_encoder,
    tiny_encoder,
    write_tokenizer,
)
from tests.serve.test_api import assert_error
from tests.serve.test_server import client, eventually, gauge, run, server

TEXTS = ["the film was good", "a very very long film and not good", "bad", "we saw the end but it was not the end and"]
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made("bert", head=False)` is a folder with that model, made once."""
    found: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in found:
            found[key] = save_encoder(tmp_path_factory.mktemp(kind), kind, **options)
        return found[key]

    return make


@pytest.fixture(scope="module")
def classifier(made: Made) -> EncoderEngine:
    return EncoderEngine.from_folder(made("bert"), dtype="float32", max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def embedder(made: Made) -> EncoderEngine:
    return EncoderEngine.from_folder(made("bert", head=False), dtype="float32")


def inputs_of(engine: EncoderEngine, *texts: Any) -> list[EncoderInput]:
    pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
    return [EncoderInput(*engine.tokenizer.encode_typed(*pair)) for pair in pairs]


def by_transformers(model: Any, given: EncoderInput) -> Any:
    """Alone, without padding."""
    types = {"token_type_ids": torch.tensor([given.types])} if model.config.model_type == "bert" else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([given.ids]), **types)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("form", ["dense", *SCHEMES])
def test_logits_are_those_of_transformers(made: Made, tmp_path: Path, kind: str, form: str) -> None:
    """Several lengths together, against each alone by transformers with the weights that the formats stand for.

    The kernels of packed linears round activations to int8, group by group.
    """
    reference, folder = tiny_encoder(kind), made(kind)
    if form != "dense":
        folder, unpacked = pack_encoder(folder, tmp_path / "packed", SCHEMES[form])
        reference.load_state_dict(unpacked)
    for dtype, tolerance in (("float32", 1e-5 if form == "dense" else 0.05), ("bfloat16", 0.05)):
        engine = EncoderEngine.from_folder(folder, dtype=dtype)
        engine.self_test()
        inputs = inputs_of(engine, *TEXTS, ("the film", "was not good"))
        found = engine.forward(inputs)
        wanted = torch.cat([by_transformers(reference, one).logits for one in inputs])
        assert (found - wanted).norm() < tolerance * wanted.norm()
        assert (wanted - wanted[0]).abs().max() > 0.1  # the head does see the texts
        assert engine.formats == (("dense",) if form == "dense" else tuple(sorted({"dense", "int8", form})))
        assert engine.labels == LABELS and engine.max_model_len == POSITIONS


def test_query_key_and_value_of_different_formats(made: Made, tmp_path: Path) -> None:
    schemes = {"query": Scheme("int8", -1), "key": Scheme("sparse24_int4", 32), "value": None}
    folder, unpacked = pack_encoder(
        made("bert"), tmp_path / "packed", lambda name: schemes.get(name.rpartition(".")[2], SCHEMES["int8"])
    )
    reference, engine = tiny_encoder("bert"), EncoderEngine.from_folder(folder)
    reference.load_state_dict(unpacked)
    inputs = inputs_of(engine, *TEXTS)
    wanted = torch.cat([by_transformers(reference, one).logits for one in inputs])
    assert (engine.forward(inputs) - wanted).norm() < 0.05 * wanted.norm()


def test_packed_classifier_loads_with_transformers(made: Made, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    import compressor.hf  # noqa: F401  what `import compressor` does when transformers loads

    folder, unpacked = pack_encoder(made("bert"), tmp_path / "packed", SCHEMES["sparse24_int4"])
    engine, reference = EncoderEngine.from_folder(folder), tiny_encoder("bert")
    reference.load_state_dict(unpacked)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(LABELS))
    for given in inputs_of(engine, *TEXTS):
        found, wanted = by_transformers(model, given).logits, by_transformers(reference, given).logits
        assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("head", [True, False])
def test_others_run_through_transformers(tmp_path: Path, head: bool) -> None:
    import transformers as t

    torch.manual_seed(0)
    config = t.DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, hidden_dim=128, n_layers=2, n_heads=4, initializer_range=0.2
    )
    model = (t.DistilBertForSequenceClassification if head else t.DistilBertModel)(config).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "bert")
    engine = EncoderEngine.from_folder(tmp_path, dtype="float32")
    engine.self_test()
    inputs = inputs_of(engine, *TEXTS)
    for row, given in zip(engine.forward(inputs), inputs, strict=True):
        out = by_transformers(model, given)
        assert torch.allclose(row, out.logits[0] if head else out.last_hidden_state[0].mean(0), atol=1e-4)
    assert engine.width == (2 if head else 64) and engine.max_model_len == 512


def test_bert_needs_nothing_of_transformers(made: Made) -> None:
    """Importing it would take longer than everything else."""
    program = (
        "import sys; from serve.engine.encoder import EncoderEngine; "
        f"EncoderEngine.from_folder({str(made('roberta'))!r}).self_test(); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_embeddings_are_means_of_length_one(made: Made, embedder: EncoderEngine) -> None:
    reference = tiny_encoder("bert", head=False)
    inputs = inputs_of(embedder, *TEXTS)
    found = embedder.activated(embedder.forward(inputs))
    for row, given in zip(found, inputs, strict=True):
        mean = by_transformers(reference, given).last_hidden_state[0].mean(0)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-5)


def test_pooling_follows_the_folder(made: Made, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path, "roberta", head=False)
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in
               (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json, which is not there"):
        EncoderEngine.from_folder(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    for mode, expected in (("cls_token", lambda h: h[0]), ("max_tokens", lambda h: h.amax(0))):
        record = {"word_embedding_dimension": 64, f"pooling_mode_{mode}": True, "pooling_mode_mean_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(record))
        engine = EncoderEngine.from_folder(folder, dtype="float32")
        inputs = inputs_of(engine, *TEXTS[:2])
        hidden = by_transformers(tiny_encoder("roberta", head=False), inputs[0]).last_hidden_state[0]
        assert torch.allclose(engine.forward(inputs)[0], expected(hidden), atol=1e-4)
        assert engine.max_model_len == 20
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    with pytest.raises(ValueError, match="pooling_mode_lasttoken; served"):
        EncoderEngine.from_folder(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"problem_type": "single_label_classification"}, lambda logits: logits.softmax(-1)),
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression", "id2label": {0: "score"}}, lambda logits: logits),
        ({"problem_type": None, "id2label": {0: "score"}}, torch.sigmoid),
    ],
)
def test_probabilities_by_the_kind_of_problem(made: Made, tmp_path: Path, options: Any, expected: Any) -> None:
    engine = EncoderEngine.from_folder(save_encoder(tmp_path, "bert", **options), dtype="float32")
    logits = engine.forward(inputs_of(engine, *TEXTS))
    assert torch.equal(engine.activated(logits), expected(logits))
    assert engine.width == logits.shape[1] == len(options.get("id2label", LABELS))


def test_pairs_are_cut_like_transformers_does(classifier: EncoderEngine, made: Made) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(made("bert"))
    for first, second in ((3, 20), (20, 3), (10, 10), (11, 10), (10, 11), (1, 1)):
        pair = " ".join(["good"] * first), " ".join(["bad"] * second)
        for limit in (3, 8, 13, 14, 40):
            wanted = theirs(*pair, truncation="longest_first", max_length=limit, return_token_type_ids=True)
            ids, types = classifier.tokenizer.encode_typed(*pair, max_length=limit)
            assert (ids.count(ids[1]), len(ids)) == (wanted["input_ids"].count(ids[1]), len(wanted["input_ids"]))
            assert sum(types) == sum(wanted["token_type_ids"])
    with pytest.raises(ValueError, match="no room for the 3 special ones"):
        classifier.tokenizer.encode_typed("good", "bad", max_length=2)


def test_broken_checkpoints_are_refused(made: Made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_encoder(tmp_path / "bert", "bert")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"classifier.bias": torch.full((3,), torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(NotFiniteError, match="self-test"):
        EncoderEngine.from_folder(folder).self_test()
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\.weight.*incomplete"):
        EncoderEngine.from_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["GPT2ForSequenceClassification"], "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unsupported architecture GPT2ForSequenceClassification"):
        EncoderEngine.from_folder(folder)
    packed, _ = pack_encoder(made("bert"), tmp_path / "packed", SCHEMES["sparse24_int8"])
    tensors = load_file(packed / "model.safetensors")
    for name in [name for name in tensors if name.endswith("query.weight_meta")]:
        tensors[name] = torch.zeros_like(tensors[name])  # both kept values of four in the first place
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    write_manifest(packed)
    with pytest.raises(ValueError, match="query: "):
        EncoderEngine.from_folder(packed)
    with (packed / "model.safetensors").open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"altered")
    with pytest.raises(ValueError, match="altered"):
        EncoderEngine.from_folder(packed)


def jobs(*lengths: list[int]) -> list[Job]:
    loop = asyncio.new_event_loop()
    made = [Job([EncoderInput([1] * n, [0] * n) for n in own], True, loop.create_future()) for own in lengths]
    loop.close()
    return made


def test_batches_hold_little_padding_and_everyones_turn() -> None:
    first, second = jobs([40, 5, 41, 200], [39, 4, 6])
    chosen = [(job is first, len(job.inputs[place])) for job, place in choose([second, first], 8, 256)]
    assert chosen[0] == (False, 4)
    assert sorted(length for _, length in chosen) == [4, 5, 6]
    second.waiting, first.waiting = [0], [0, 2, 3]
    assert sorted(len(job.inputs[place]) for job, place in choose([first, second], 8, 256)) == [39, 40, 41]
    assert len(choose([first, second], 8, 80)) == 2 and len(choose([first, second], 1, 256)) == 1
    first.waiting = [3]
    assert [len(job.inputs[place]) for job, place in choose([first], 8, 64)] == [200]


@asynccontextmanager
async def serving(
    engine: EncoderEngine, key: str | None = None, max_queue: int = 64, **limits: Any
) -> AsyncIterator[Any]:
    wrapped = AsyncEncoder(engine, max_queue)
    state = EncoderState(wrapped, "tiny", Limits(**limits), EncoderMetrics(wrapped, "tiny"), "folder", ready=True)
    gate = Gate(build_app(state), key, state.limits)
    wrapped.start()
    transport = httpx.ASGITransport(app=gate, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            http.state, http.gate = state, gate
            yield http
    finally:
        wrapped.stop()
        assert wrapped.num_open == 0 and wrapped.num_waiting == 0


def ask(engine: EncoderEngine, path: str, body: Any = None, method: str = "POST", **settings: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with serving(engine, **settings) as http:
            return await http.request(method, path, json=body)

    return asyncio.run(go())


def test_classify_has_vllms_shape(classifier: EncoderEngine) -> None:
    answer = ask(classifier, "/classify", {"model": "tiny", "input": TEXTS, "user": "me"}).json()
    inputs = inputs_of(classifier, *TEXTS)
    tokens = sum(map(len, inputs))
    wanted = classifier.forward(inputs).softmax(-1)
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["id"].startswith("classify-") and answer["object"] == "list" and answer["model"] == "tiny"
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    for one, row in zip(answer["data"], wanted, strict=True):
        assert one["probs"] == pytest.approx(row.tolist(), abs=1e-5) and one["num_classes"] == 3
        assert one["label"] == LABELS[int(row.argmax())]
    raw = ask(classifier, "/classify", {"input": TEXTS[0], "use_activation": False}).json()["data"][0]["probs"]
    assert torch.tensor(raw).softmax(-1).tolist() == pytest.approx(answer["data"][0]["probs"], abs=1e-5)


def test_inputs_of_every_kind(classifier: EncoderEngine) -> None:
    [ids] = (one.ids for one in inputs_of(classifier, TEXTS[0]))

    def probs(given: Any, **more: Any) -> list[list[float]]:
        response = ask(classifier, "/classify", {"input": given, **more})
        assert response.status_code == 200, response.text
        return [one["probs"] for one in response.json()["data"]]

    [text] = probs(TEXTS[0])
    for same in ([TEXTS[0]], ids, [ids]):
        assert probs(same)[0] == pytest.approx(text, abs=1e-6)
    pairs = probs([["the film", "was good"], ["the film", "was bad"]])
    wanted = classifier.forward(inputs_of(classifier, ("the film", "was good"), ("the film", "was bad"))).softmax(-1)
    assert torch.allclose(torch.tensor(pairs), wanted, atol=1e-5)
    assert probs("")[0] == pytest.approx(probs([[1, 2]])[0], abs=1e-6)  # the special tokens alone
    cut = probs(TEXTS[3], truncate_prompt_tokens=5)[0]
    assert cut == pytest.approx(probs("we saw the")[0], abs=1e-6)
    left = probs(TEXTS[3], truncate_prompt_tokens=4, truncation_side="left", add_special_tokens=False)[0]
    assert left == pytest.approx(probs("not the end and", add_special_tokens=False)[0], abs=1e-6)
    assert probs(ids, truncate_prompt_tokens=2)[0] == pytest.approx(probs(ids[:2])[0], abs=1e-6)
    long = "good " * 100
    for text in (long, long * 1000):
        assert probs(text, truncate_prompt_tokens=-1)[0] == pytest.approx(probs("good " * (POSITIONS - 2))[0], abs=1e-6)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": "good " * 100}, "context_length_exceeded"),
        ({"input": [["good", "good"], ["good", "good " * 100_000]]}, "context_length_exceeded"),
        ({"input": [1] * (POSITIONS + 1)}, "context_length_exceeded"),
        ({"input": "good", "truncate_prompt_tokens": POSITIONS + 1}, None),
        ({"input": "good", "truncate_prompt_tokens": 0}, None),
        ({"input": "good", "truncate_prompt_tokens": 1}, None),
        ({"input": "", "add_special_tokens": False}, None),
        ({"input": [VOCABULARY]}, None),
        ({"input": []}, None),
        ({"input": [["a", "b", "c"]]}, None),
        ({"input": [["a", 1]]}, None),
        ({"input": ["good"] * 3000}, None),
        ({"input": {"text": "good"}}, None),
        ({}, None),
        ([], "invalid_json"),
    ],
)
def test_bad_inputs_are_told(classifier: EncoderEngine, body: Any, code: str | None) -> None:
    assert_error(ask(classifier, "/classify", body), 400, code)


def test_other_routes(classifier: EncoderEngine, embedder: EncoderEngine) -> None:
    card = ask(classifier, "/v1/models", method="GET").json()["data"][0]
    assert (card["id"], card["labels"], card["max_model_len"]) == ("tiny", list(LABELS), POSITIONS)
    assert "labels" not in ask(embedder, "/v1/models", method="GET").json()["data"][0]
    for engine, own, others in (
        (classifier, "/classify", ("/v1/embeddings", "/v1/completions", "/v1/chat/completions")),
        (embedder, "/v1/embeddings", ("/classify", "/v1/completions", "/v1/chat/completions")),
    ):
        for path in others:
            assert_error(ask(engine, path, {"input": "x"}), 404, "not_supported")
        paths = ask(engine, "/openapi.json", method="GET").json()["paths"]
        assert own in paths and not any(path in paths for path in others)
        assert_error(ask(engine, own, {"input": "x", "model": "other"}), 404, "model_not_found")
        assert "encoder" not in ask(engine, "/health", method="GET", key="sesame").text
        assert_error(ask(engine, own, {"input": "x"}, key="sesame"), 401)
        assert_error(ask(engine, own, {"input": "x" * 500}, max_body_bytes=100), 413)
        assert "One text a line" in ask(engine, "/", method="GET").text
        assert ask(engine, "/ready", method="GET").status_code == 200
    tokens = ask(classifier, "/tokenize", {"prompt": TEXTS[0]}).json()
    assert tokens["tokens"] == inputs_of(classifier, TEXTS[0])[0].ids and tokens["max_model_len"] == POSITIONS
    assert ask(classifier, "/detokenize", {"tokens": tokens["tokens"][1:-1]}).json()["prompt"] == TEXTS[0]


def test_embeddings_have_openais_shape(embedder: EncoderEngine) -> None:
    answer = ask(embedder, "/v1/embeddings", {"input": TEXTS, "dimensions": 64}).json()
    rows = torch.tensor([one["embedding"] for one in answer["data"]])
    assert rows.shape == (4, 64) and torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-5)
    assert answer["object"] == "list" and answer["data"][1]["object"] == "embedding"
    packed = ask(embedder, "/v1/embeddings", {"input": TEXTS[1], "encoding_format": "base64"}).json()["data"][0]
    assert struct.unpack("<64f", base64.b64decode(packed["embedding"])) == pytest.approx(rows[1].tolist(), abs=1e-5)
    assert_error(ask(embedder, "/v1/embeddings", {"input": "x", "dimensions": 32}), 400)
    assert_error(ask(embedder, "/v1/embeddings", {"input": [["a", "b"]]}), 400)
    assert_error(ask(embedder, "/v1/embeddings", {"input": "x", "encoding_format": "int8"}), 400)


def test_together_as_alone(classifier: EncoderEngine) -> None:
    """40 clients at once, of mixed lengths: the answers of one after the other, in few batches."""
    bodies = [{"input": [TEXTS[i % 4], "good " * (1 + i % 30)]} for i in range(40)]

    async def all_at_once() -> tuple[list[Any], str]:
        async with serving(classifier, max_queue=512) as http:
            answers = await asyncio.gather(*(http.post("/classify", json=body) for body in bodies))
            metrics = (await http.get("/metrics")).text
            assert http.state.engine.stats.steps < 60
            stats = http.state.engine.stats
            assert stats.prompt_tokens == sum(answer.json()["usage"]["prompt_tokens"] for answer in answers)
            assert stats.computed_tokens < 1.3 * stats.prompt_tokens
            return [answer.json()["data"] for answer in answers], metrics

    found, metrics = asyncio.run(all_at_once())
    for body, data in zip(bodies, found, strict=True):
        for text, one in zip(body["input"], data, strict=True):
            [alone] = classifier.activated(classifier.forward(inputs_of(classifier, text)))
            assert one["probs"] == pytest.approx(alone.tolist(), abs=1e-5)
    assert 'vllm:request_success_total{model_name="tiny",finished_reason="stop"} 40' in metrics


class Slow:
    """Stands in for an engine's `forward`: waits until it may go on."""

    def __init__(self, engine: EncoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on, self.computing, original = threading.Event(), threading.Event(), engine.forward

        def forward(batch: Any) -> Any:
            self.computing.set()
            assert self.may_go_on.wait(10)
            return original(batch)

        monkeypatch.setattr(engine, "forward", forward)


def test_full_queue_and_hanging_up(classifier: EncoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(classifier, monkeypatch)

    async def go() -> None:
        async with serving(classifier, max_queue=4) as http:
            first = asyncio.ensure_future(http.post("/classify", json={"input": ["good"] * 30}))
            await asyncio.to_thread(slow.computing.wait)
            waiting = asyncio.ensure_future(http.post("/classify", json={"input": ["a bad film"] * 4}))
            while http.state.engine.num_open < 2:
                await asyncio.sleep(0.01)
            refused = await http.post("/classify", json={"input": ["good"] * 20})
            assert_error(refused, 429, "queue_full")
            assert refused.headers["retry-after"]
            waiting.cancel()  # hangs up while waiting: its place is free at once
            await asyncio.gather(waiting, return_exceptions=True)
            assert http.state.engine.num_open == 1
            slow.may_go_on.set()
            assert (await first).status_code == 200
            assert http.state.engine.stats.prompt_tokens == 30 * 3  # the other's were never computed
            assert 'finished_reason="abort"} 1' in (await http.get("/metrics")).text

    asyncio.run(go())


def test_a_failed_encoder_says_so(classifier: EncoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(batch: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(classifier, "forward", fails)

    async def go() -> None:
        async with serving(classifier) as http:
            assert_error(await http.post("/classify", json={"input": "good"}), 503, "engine_dead")
            assert_error(await http.post("/classify", json={"input": "good"}), 503, "engine_dead")
            assert_error(await http.get("/health"), 503, "engine_dead")

    asyncio.run(go())


def test_time_limit(classifier: EncoderEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(classifier, monkeypatch)
    assert_error(ask_slowly(classifier, slow), 504, "timeout")


def ask_slowly(engine: EncoderEngine, slow: Slow) -> httpx.Response:
    async def go() -> httpx.Response:
        async with serving(engine, request_timeout=0.2) as http:
            answer: httpx.Response = await http.post("/classify", json={"input": "good"})
            slow.may_go_on.set()
            return answer

    return asyncio.run(go())


@pytest.fixture(scope="module")
def url(made: Made) -> Iterator[str]:
    with server(made("bert", head=False), "--dtype", "float32") as (address, _):
        yield address


def test_openai_client_embeds(url: str, embedder: EncoderEngine) -> None:
    api = client(url)
    wanted = embedder.activated(embedder.forward(inputs_of(embedder, *TEXTS)))
    for form in ("float", "base64", openai.NOT_GIVEN):
        found = api.embeddings.create(model=api.models.list().data[0].id, input=TEXTS, encoding_format=form)
        rows = [one.embedding for one in found.data]
        if form != "base64":  # asked for by name, the client leaves it packed
            assert torch.allclose(torch.tensor(rows), wanted, atol=1e-5)
    with pytest.raises(openai.BadRequestError):
        api.embeddings.create(model="", input="good " * 100)
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="", prompt="good")


def test_hanging_up_frees_the_request(url: str) -> None:
    """Of 2,000 inputs, those that wait are dropped."""
    before = gauge(url, "halfweight:engine_steps_total")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/embeddings", json={"input": ["good film " * 20] * 2000}, timeout=0.15)
    assert eventually(lambda: gauge(url, "vllm:num_requests_waiting") == 0, seconds=2)
    assert eventually(lambda: gauge(url, "vllm:num_requests_running") == 0, seconds=2)
    steps = gauge(url, "halfweight:engine_steps_total")
    assert steps - before < 2000 / 12 / 2
    time.sleep(0.1)
    assert gauge(url, "halfweight:engine_steps_total") == steps


def test_sigterm_lets_answers_finish(made: Made) -> None:
    with server(made("roberta"), "--max-num-batched-tokens", "40", "--max-num-seqs", "1") as (url, process):
        answers: list[httpx.Response] = []
        body = {"input": ["good film " * 20] * 1000}
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/classify", json=body, timeout=60)))
        asking.start()
        assert eventually(lambda: gauge(url, "vllm:num_requests_waiting") > 0)
        process.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert httpx.post(f"{url}/classify", json=body).status_code == 503
        asking.join(60)
        assert len(answers[0].json()["data"]) == 1000
        assert process.wait(timeout=5) == 0


def test_check_and_flags_that_do_not_fit(made: Made) -> None:
    checked = run(str(made("bert")), "--check")
    assert checked.returncode == 0, checked.stderr
    assert "classified two inputs" in checked.stdout
    for arguments, message in (
        ((str(made("bert")), "--prompt-lookup", "4"), "--prompt-lookup"),
        ((str(made("bert")), "--runtime", "vllm"), "--runtime torch"),
        (("chat", str(made("bert"))), "cannot talk"),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2 and message in refused.stderr.splitlines()[-1]
