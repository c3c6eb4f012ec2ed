"""Text sources: every reader, the errors a user meets, determinism; packages from an archive on disk only."""

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from compressor import data, packages
from compressor.data import load_text
from compressor.packages import Package, fetch_member


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 0

    def __call__(self, text: list[str], *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[list[int]]]:
        opening = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": [[*opening, *map(ord, document)] for document in text]}


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": letter * 10}) + "\n" for letter in "abcdefgh"))
    return path


def test_documents_are_whole_shuffled_by_the_seed_and_joined_by_eos(jsonl: Path) -> None:
    loaded = load_text(str(jsonl), Letters(), length=11, seed=3)
    assert loaded.blocks.shape == (8, 11)
    assert sorted(chr(block[0]) for block in loaded.blocks) == list("abcdefgh")
    assert bool((loaded.blocks[:, -1] == 0).all())
    assert torch.equal(loaded.blocks, load_text(str(jsonl), Letters(), length=11, seed=3).blocks)
    assert not torch.equal(loaded.blocks, load_text(str(jsonl), Letters(), length=11, seed=4).blocks)
    assert (loaded.report.documents, loaded.report.tokens, len(loaded.report.sha256)) == (8, 88, 64)


def test_every_block_opens_as_the_tokenizer_opens_texts(jsonl: Path) -> None:
    tokenizer = Letters()
    tokenizer.bos_token_id = 1
    blocks = load_text(str(jsonl), tokenizer, length=12, seed=3).blocks
    assert bool((blocks[:, 0] == 1).all())
    assert torch.equal(blocks[:, 1:], load_text(str(jsonl), Letters(), length=11, seed=3).blocks)


def test_max_tokens_bounds_what_is_read(jsonl: Path) -> None:
    assert load_text(str(jsonl), Letters(), length=5, max_tokens=23).blocks.shape == (4, 5)


def test_split_keeps_both_sides(jsonl: Path) -> None:
    loaded = load_text(str(jsonl), Letters(), length=11)
    train, validation = loaded.split(2)
    assert torch.equal(torch.cat([train, validation]), loaded.blocks)
    for held_out in (0, 8):
        with pytest.raises(ValueError, match="at least one must stay"):
            loaded.split(held_out)


def test_a_text_file_keeps_paragraphs_together(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(letter * 3000 for letter in "abc"))
    report = load_text(str(path), Letters(), length=16).report
    assert report.documents == 2
    assert report.tokens == 9000 + 2 + 2 - (9004 % 16)


def test_a_line_of_jsonl_ends_with_a_newline_alone(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a\u2028b\u2029c\x85d"}\r\n{"text": "e\u2028f"}\n', encoding="utf-8", newline="")
    loaded = load_text(str(path), Letters(), length=12)
    assert sorted("".join(map(chr, loaded.blocks[0])).split("\0")[:2]) == ["a\u2028b\u2029c\x85d", "e\u2028f"]


def test_half_a_character_is_read_as_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "c\\uD83D"}\n')
    assert "c\ufffd" in "".join(map(chr, load_text(str(path), Letters(), length=6).blocks[0]))
    assert f"{path}, line 2 holds half" in caplog.text


def test_ids_take_four_bytes_each() -> None:
    ids, used = data._tokenize(["ab", "c"], Letters(), None)
    assert (ids.itemsize, list(ids), used) == (4, [97, 98, 0, 99, 0], 2)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"body": ["abcd", "efgh"]}), path)
    assert load_text(str(path), Letters(), length=5, field="body").blocks.shape == (2, 5)
    with pytest.raises(ValueError, match="no 'text'"):
        load_text(str(path), Letters(), length=5)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="not a parquet file"):
        load_text(str(path), Letters(), length=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n \n", "holds no text"),
        ("a.txt", b"short", "6 tokens; a block takes 64"),
        ("a.txt", b"caf\xe9", "not UTF-8 .byte 3"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"tex', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "a field 'text'"),
        ("a.jsonl", b'"just a string"\n', "a field 'text'"),
        ("a.JSONL", b'{"body": "a"}\n', "a field 'text'"),
        ("a.json", b'[{"text": "a"}]', "is a JSON file, which is not read. Write it as .jsonl"),
        ("a.TSV", b"text\na", "is a TSV file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(path), Letters(), length=64)


@pytest.mark.parametrize("source", ["missing.txt", "/no/such/file.jsonl", "a b", "."])
def test_missing_text_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="accepted is 'default'"):
        load_text(source, Letters(), length=64)


def test_a_hub_name_without_the_datasets_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package 'datasets'"):
        load_text("someone/some-text", Letters(), length=64)


def test_a_hub_name_is_streamed_until_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> Any:
            assert (name, split, streaming) == ("someone/some-text", "train", True)
            return ({"text": "x" * 400} for _ in iter(int, 1))

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert load_text("someone/some-text", Letters(), length=10, max_tokens=100).blocks.shape == (10, 10)


@pytest.mark.parametrize(
    ("source", "hub"),
    [("someone/some-text", True), ("default", False), ("data/x.jsonl", False), ("a/b/c", False), (__file__, False)],
)
def test_what_can_only_be_a_hub_id(source: str, hub: bool) -> None:
    assert data.is_hub_id(source) is hub


def test_heldout_documents_share_no_long_phrase_with_the_default_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"w{number}" for number in range(40)]
    shared = "Before, " + " ".join(words[5:18]).upper() + "! after"
    fresh = " ".join(reversed(words))
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (shared, fresh)))
    monkeypatch.setattr(data, "_default_text", lambda: ([" ".join(words)], ""))
    monkeypatch.setattr(data, "fetch_member", lambda package, member: path)
    assert data._heldout_text()[0] == [fresh]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one file, its archive laid into the cache by hand."""
    monkeypatch.setenv("HALFWEIGHT_CACHE", str(tmp_path))
    archive = tmp_path / "archives" / "tiny-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("tiny/a.txt", "hello")
    digests = [packages.hashlib.sha256(content).hexdigest() for content in (archive.read_bytes(), b"hello")]
    entry = Package("tiny==1.0", archive.name, digests[0], "CC0", {"tiny/a.txt": digests[1]})
    monkeypatch.setitem(packages.PACKAGES, "tiny", entry)
    return archive


def test_a_member_is_verified_cached_and_fetched_again_when_altered(package: Path) -> None:
    path = fetch_member("tiny", "tiny/a.txt")
    assert path.read_text() == "hello"
    path.write_text("tampered")
    assert fetch_member("tiny", "tiny/a.txt").read_text() == "hello"
    package.unlink()
    assert fetch_member("tiny", "tiny/a.txt") == path
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_an_altered_archive_is_refused_and_leaves_nothing(package: Path) -> None:
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(ValueError, match="recorded sha256"):
        fetch_member("tiny", "tiny/a.txt")
    assert list((package.parents[1] / "packages" / "tiny").iterdir()) == []


def test_offline_says_what_is_needed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package.unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"could not download tiny==1\.0: .*placed in"):
        fetch_member("tiny", "tiny/a.txt")


def test_unknown_packages_and_members_are_refused(package: Path) -> None:
    with pytest.raises(ValueError, match="known are"):
        fetch_member("huge", "a")
    with pytest.raises(ValueError, match="has no 'b'"):
        fetch_member("tiny", "b")
