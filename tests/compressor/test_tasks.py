"""Tasks: the forms that labelled data comes in, what is refused, and the metrics' own definitions."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.models import load_model
from compressor.tasks import TASKS, Example, Task, TaskSource, load_task, readers
from compressor.tasks.encoding import Answers, Labelled, cut_prompt, encode
from compressor.tasks.evaluation import write
from compressor.tasks.glue import GLUE
from compressor.tasks.metrics import METRICS, check_metrics, measure
from compressor.tasks.packaged import _word_examples
from compressor.tasks.readers import read_records
from compressor.tasks.task import split_of
from tests.tiny import make_tokenizer


def write_tsv(path: Path, header: list[str] | None, rows: list[list[str]]) -> None:
    path.write_text("\n".join("\t".join(row) for row in ([header] if header else []) + rows) + "\n")


def test_colas_archive_has_no_header(tmp_path: Path) -> None:
    rows = [["gj04", str(place % 2), "*", f"sentence {place}"] for place in range(40)]
    write_tsv(tmp_path / "train.tsv", None, rows)
    write_tsv(tmp_path / "dev.tsv", None, rows[:5])
    task = load_task("cola", TaskSource(str(tmp_path)))
    assert task.metrics[0] == "matthews" and task.labels == ("unacceptable", "acceptable")
    assert [example.label for example in task.test] == [0, 1, 0, 1, 0]
    assert task.test[0].text == "sentence 0"
    assert len(task.train) + len(task.validation) == 40 and task.validation


def test_quotation_marks_are_text_in_glues_tsv(tmp_path: Path) -> None:
    """A reader that honours quotes swallows the lines between two of them."""
    header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    rows = [[str(i % 2), "1", "2", f'"He said {i}', f"it's {i}"] for i in range(30)]
    write_tsv(tmp_path / "train.tsv", header, rows)
    write_tsv(tmp_path / "dev.tsv", header, rows[:3])
    task = load_task("mrpc", TaskSource(str(tmp_path)))
    assert [(e.text, e.pair, e.label) for e in task.test] == [
        ('"He said 0', "it's 0", 0), ('"He said 1', "it's 1", 1), ('"He said 2', "it's 2", 0),
    ]  # fmt: skip


def test_a_few_torn_lines_as_qqp_has_them_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    rows = [[str(i), "1", "2", f"a {i}?", f"b {i}?", str(i % 2)] for i in range(2200)]
    torn = [["7", "1", "2", "What is"], ["this?", "And that?", "0"]]
    write_tsv(tmp_path / "train.tsv", header, rows[:50] + torn + rows[50:])
    write_tsv(tmp_path / "dev.tsv", header, rows[:3])
    task = load_task("qqp", TaskSource(str(tmp_path)))
    assert len(task.train) + len(task.validation) == 2200
    assert "2 torn lines are left out; line 52 has 4 fields" in caplog.text
    write_tsv(tmp_path / "train.tsv", header, rows[:50] + torn + rows[50:1500])
    with pytest.raises(ValueError, match="line 52 has 4 fields; 6 are expected"):
        load_task("qqp", TaskSource(str(tmp_path)))


def test_mnli_takes_the_matched_development_set(tmp_path: Path) -> None:
    header = ["index", "sentence1", "sentence2", "label1", "gold_label"]
    names = ("entailment", "neutral", "contradiction")
    rows = [[str(i), f"a {i}", f"b {i}", names[i % 3], names[i % 3]] for i in range(30)]
    write_tsv(tmp_path / "train.tsv", header, rows)
    write_tsv(tmp_path / "dev_matched.tsv", header, rows[:3])
    write_tsv(tmp_path / "dev_mismatched.tsv", header, rows[3:20])
    task = load_task("mnli", TaskSource(str(tmp_path)))
    assert [example.label for example in task.test] == [0, 1, 2]


def test_stsb_is_a_regression_with_pearson(tmp_path: Path) -> None:
    records = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i / 8} for i in range(40)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    task = load_task("stsb", TaskSource(str(tmp_path)))
    assert task.kind == "regression" and task.head_labels == () and task.metrics == ("pearson", "spearman")
    assert task.test[3].label == 0.375


def test_every_glue_task_reads_the_hubs_fields(tmp_path: Path) -> None:
    for name, spec in GLUE.items():
        folder = tmp_path / name
        folder.mkdir()
        label = 1 if spec.labels else 2.5
        records = [{**{field: f"{field} {i}" for field in spec.fields}, "label": label} for i in range(30)]
        unlabelled = {**records[0], "label": -1}
        for split in ("train", "validation"):
            lines = map(json.dumps, [*records, unlabelled] if spec.labels else records)
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        task = load_task(name, TaskSource(str(folder)))
        assert len(task.test) == 30 and {example.label for example in task.test} == {label}
        assert (task.test[0].pair is None) == (len(spec.fields) == 1)


def test_e2e_gathers_the_references_of_one_meaning(tmp_path: Path) -> None:
    lines = ["mr,ref", *(f'"name[{i}], food[x]",Place {i} has x.' for i in range(30))]
    (tmp_path / "trainset.csv").write_text("\n".join(lines))
    (tmp_path / "devset.csv").write_text('mr,ref\n"name[A], food[x]",One.\n"name[A], food[x]",Two.\n')
    task = load_task("e2e", TaskSource(str(tmp_path)))
    assert [example.references for example in task.test] == [(" One.", " Two.")]
    assert task.train[0].text.startswith("name[")


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str | None]]:
    """A hub that has these splits whatever it is asked for; what it was asked for."""
    asked: list[tuple[str, str | None]] = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, configuration: str | None) -> Any:
            asked.append((name, configuration))
            if name == "someone/gone":
                raise FileNotFoundError("no such data set\nwith much advice")
            return splits

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    return asked


def test_glue_comes_from_the_hub_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNLI's development set has two halves there; the test split, without labels, is not looked at."""
    train = [{"premise": f"p {i}", "hypothesis": f"h {i}", "label": i % 3} for i in range(40)]
    splits = {
        "train": train,
        "validation_matched": train[:4],
        "validation_mismatched": train[5:20],
        "test_matched": [{"premise": "p", "hypothesis": "h", "label": -1}],
    }
    asked = hub(monkeypatch, splits)
    task = load_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert [(e.text, e.pair, e.label) for e in task.test] == [(f"p {i}", f"h {i}", i % 3) for i in range(4)]
    assert len(task.train) + len(task.validation) == 40


def test_a_hub_data_set_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"review": f"text {i}", "stars": i % 2} for i in range(200)]
    asked = hub(monkeypatch, {"train": rows[:150], "test": rows[150:]})
    task = load_task("custom", TaskSource("someone/reviews", text="review", label="stars"))
    assert asked == [("someone/reviews", None)]
    assert [example.text for example in task.test] == [f"text {i}" for i in range(150, 200)]
    assert task.labels == ("0", "1") and task.validation and len(task.train) + len(task.validation) == 150
    with pytest.raises(ValueError, match=r"'someone/gone' could not be read: no such data set\. Accepted is"):
        load_task("custom", TaskSource("someone/gone"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package 'datasets'"):
        load_task("custom", TaskSource("someone/reviews"))


def test_e2e_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"meaning_representation": f"name[{i // 2}]", "target": f"Place {i}."} for i in range(40)]
    hub(monkeypatch, {"train": rows, "validation": rows[:4]})
    task = load_task("e2e")
    assert [example.references for example in task.test] == [(" Place 0.", " Place 1."), (" Place 2.", " Place 3.")]


def test_a_custom_file_is_split_and_its_labels_found(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("review,stars\n" + "\n".join(f"text {i},{i % 3 + 8}" for i in range(200)))
    task = load_task("custom", TaskSource(str(file), text="review", label="stars"))
    assert task.labels == ("8", "9", "10")
    texts = [{example.text for example in part} for part in (task.train, task.validation, task.test)]
    assert all(texts) and sum(map(len, texts)) == len(set.union(*texts)) == 200


@pytest.mark.parametrize(
    ("name", "source", "why"),
    [
        ("sst3", TaskSource(), "no task 'sst3'; accepted: rotten-tomatoes"),
        ("custom", TaskSource(), "needs task.source"),
        ("custom", TaskSource("./nowhere.jsonl"), "is not there; accepted is"),
        ("custom", TaskSource("x", kind="translation"), "task kind 'translation'"),
        ("rotten-tomatoes", TaskSource("x"), "brings its own examples"),
    ],
)
def test_what_is_wrong_is_said(name: str, source: TaskSource, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_task(name, source)


def test_a_line_of_jsonl_ends_with_a_newline_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b\u2029c\x85d"}\r\n{"text": "e"}\n', encoding="utf-8", newline="")
    assert read_records(file) == [{"text": "a\u2028b\u2029c\x85d"}, {"text": "e"}]


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("a.jsonl", '{"text": "a"\n', "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is not an object"),
        ("a.tsv", "text\tlabel\none\n", "line 2 has 1 fields; 2 are expected"),
        ("a.csv", "text,label\n", "holds no records"),
        ("a.xlsx", "x", "is not understood"),
    ],
)
def test_torn_files_are_named(name: str, text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=why):
        read_records(tmp_path / name)


def test_long_fields_other_suffixes_and_halves_of_characters_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.CSV").write_text(f"text,label\n{'a' * 200_000},b\n")
    assert len(read_records(tmp_path / "a.CSV")[0]["text"]) == 200_000
    with monkeypatch.context() as patch:
        patch.setattr(readers, "_FIELD_CHARACTERS", 1000)
        with pytest.raises(ValueError, match="line 2 is not CSV: field larger than field limit"):
            read_records(tmp_path / "a.CSV")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d b \\ud83d\\ude00"}')
    assert read_records(tmp_path / "a.jsonl")[1] == {"text": "\ufffd b \U0001f600"}
    assert "line 2 holds half of a UTF-16 pair" in caplog.text


def test_labels_that_are_blank_or_of_another_kind_are_named(tmp_path: Path) -> None:
    def load(train: str, test: str = "text,label\na,1\n", kind: str = "classification") -> Task:
        (tmp_path / "train.csv").write_text(
            "text,label\n" + "".join(f"text {n},{n % 2 + 1}\n" for n in range(60)) + train
        )
        (tmp_path / "test.csv").write_text(test)
        return load_task("custom", TaskSource(str(tmp_path), kind=kind))

    assert load("").labels == ("1", "2") and load("").test[0].label == 0
    with pytest.raises(ValueError, match="record 61 has no label"):
        load("text,\n")
    with pytest.raises(ValueError, match=r"record 1 has the label '0'; accepted: 1, 2$"):
        load("", "text,label\na,0\n")
    for label in ("high", "nan"):
        with pytest.raises(ValueError, match=f"record 61 has the label '{label}'; a regression needs"):
            load(f"text,{label}\n", kind="regression")


def test_an_unknown_label_and_a_missing_field_are_named(tmp_path: Path) -> None:
    for records, why in (
        ([{"sentence": "a", "label": "maybe"}], "record 1 has the label 'maybe'; accepted: negative, positive"),
        ([{"text": "a", "label": 1}], "record 1 has no sentence; it has text, label"),
    ):
        for split in ("train", "dev"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
        with pytest.raises(ValueError, match=why):
            load_task("sst2", TaskSource(str(tmp_path)))


def test_a_key_always_falls_into_the_same_split() -> None:
    found = [split_of(f"film {i}", test=3, validation=1) for i in range(2000)]
    assert found == [split_of(f"film {i}", test=3, validation=1) for i in range(2000)]
    assert 0.25 < found.count("test") / 2000 < 0.35 and 0.07 < found.count("validation") / 2000 < 0.13


def test_story_words_hold_every_content_word_once() -> None:
    [example] = _word_examples('One day, the little cat saw a red ball in the garden. "No," he said.')
    assert example.text == "Words: ball, cat, day, garden, little, one, red, saw\nSentence:"
    assert example.references == (" One day, the little cat saw a red ball in the garden.",)


def test_metrics_by_their_definitions() -> None:
    predicted, true = [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0]
    found = measure(("accuracy", "f1", "matthews"), predicted, true)
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": 2 / 3, "matthews": 1 / 3})
    assert METRICS["matthews"]([0, 0, 0], [0, 1, 0]) == 0.0
    assert METRICS["f1"]([0, 1, 2], [0, 1, 1]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert METRICS["pearson"]([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(1.0)
    assert METRICS["spearman"]([1.0, 2.0, 40.0], [2.0, 4.0, 5.0]) == pytest.approx(1.0)
    assert METRICS["pearson"]([1.0, 1.0], [0.0, 1.0]) == 0.0


def test_text_metrics_take_the_best_of_several_references() -> None:
    answers = ["the cat sat on the mat today", "a dog"]
    references = [["no", "the cat sat on the mat today"], ["a dog"]]
    assert METRICS["bleu"](answers, references) == pytest.approx(100.0)
    assert METRICS["rouge_l"](answers, references) == pytest.approx(1.0)
    assert METRICS["rouge_l"](["the mat"], [["the cat"]]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("library", "needing"),
    [
        ("sklearn.metrics", {"f1", "matthews"}), ("scipy.stats", {"pearson", "spearman"}), ("sacrebleu", {"bleu"}),
        ("rouge_score.rouge_scorer", {"rouge_l"}),
    ],
)  # fmt: skip
def test_metrics_without_their_library_are_refused(
    library: str, needing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for name in METRICS:
        if name in needing:
            with pytest.raises(ValueError, match=r"halfweight\[tasks\]"):
                check_metrics([name])
        else:
            check_metrics([name])


def task_of(kind: str, examples: list[Example]) -> Task:
    return Task("t", kind, ("no", "yes") if kind == "classification" else (), ("accuracy",), examples, [], [])


def test_batches_are_padded_to_their_own_longest() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = [Example("a" * size, label=size % 2) for size in (3, 20, 9)]
    encoded = encode(tokenizer, task_of("classification", examples), examples, 16)
    assert isinstance(encoded, Labelled)
    batch = encoded.batch([0, 2])
    assert batch["input_ids"].shape == (2, 9) and batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert encoded.batch([0])["input_ids"].shape == (1, 3)
    assert encoded.batch([1])["attention_mask"].sum() == 16


def test_answers_end_and_only_they_are_marked() -> None:
    tokenizer = make_tokenizer()
    examples = [Example("Q:", references=("yes",)), Example("a long question", references=("no",))]
    encoded = encode(tokenizer, task_of("generation", examples), examples, 12)
    assert isinstance(encoded, Answers)
    ids, marks = encoded.batch([0, 1])
    assert marks.sum(1).tolist() == [4, 3]
    assert ids[0][marks[0]].tolist() == tokenizer("yes")["input_ids"] + [tokenizer.eos_token_id]
    assert len(encoded.prompts[1]) == 9, "the prompt gives way, not the answer"


def test_a_prompt_is_cut_behind_its_opening() -> None:
    prompt = [0, *range(1, 10)]
    assert cut_prompt(prompt, 1, 10) == prompt
    assert cut_prompt(prompt, 1, 4) == [0, 7, 8, 9]
    assert cut_prompt(prompt, 0, 4) == [6, 7, 8, 9]
    assert cut_prompt(prompt, 4, 3) == [7, 8, 9]


def test_a_long_prompt_leaves_its_answer_room(tiny_gpt2: Path) -> None:
    """GPT-2 has no position behind its last."""
    model, examples = load_model(tiny_gpt2), [Example("a" * 600, references=("b",)), Example("a", references=("b",))]
    model.generation_config.eos_token_id = None
    assert len(write(model, make_tokenizer(), examples, length=512, beams=1)) == 2
    asked: list[tuple[int, int]] = []
    model.generate = lambda **given: (
        asked.append((given["input_ids"].shape[1], given["max_new_tokens"])) or given["input_ids"]
    )
    write(model, make_tokenizer(), examples, length=64, batch=1)
    assert asked == [(1, 63), (48, 16)]


def test_names_of_tasks() -> None:
    assert {"rotten-tomatoes", "story-words", "cola", "stsb", "e2e", "custom"} <= set(TASKS)
