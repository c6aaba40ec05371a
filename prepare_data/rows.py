"""What all converters share: how a row is made, and the loop that checks rows and writes them.

A reader of a published data set yields rows as `data.check_row` wants them, in an order that
depends on the file alone. What it leaves out, it counts.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from common.files import new_file
from data import check_row, pictures_of
from tokenization.templates import IMAGE, TAG

COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.jpg$")
# What plain code raises over a record that is not as published; SyntaxError: of broken XML.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError,
             ValueError)


class Drop(Exception):
    """Why a record is left out, although its file is as it was published."""


class Counts(Counter):
    """The number of rows by outcome."""

    @contextmanager
    def each(self) -> Iterator[None]:
        """Around the work on one record: what its content raises is counted, and the next comes."""
        try:
            yield
        except Drop as drop:
            self[f"dropped: {drop}"] += 1
        except MALFORMED as error:
            self[f"malformed: {type(error).__name__}: {error}"[:120]] += 1

    def check(self, max_malformed: float) -> None:
        """Print all. ValueError where a larger share is malformed, or nothing was written."""
        for outcome, count in self.most_common(50):
            print(f"{count:,}  {outcome}")
        malformed = sum(self[outcome] for outcome in self if outcome.startswith("malformed"))
        if malformed > max_malformed * self.total():
            raise ValueError(f"{malformed:,} of {self.total():,} are malformed, so nothing is "
                             "written; a higher --max-malformed accepts them")
        if not self["written"]:
            raise ValueError("no row to write: is INPUT this data set's file?")


def clean(text: str) -> str:
    """A text, its ends stripped. ValueError where nothing is left."""
    if not text.strip():
        raise ValueError("a text is empty")
    return text.strip()


def make_row(
    source: str, split: str, key, images: list[str], pairs: Iterable[tuple[str, str]],
    workflow: str = "mm", **fields,
) -> dict:
    """A row of questions and answers. Tags stay where they are; without any, pictures come first.
    ValueError for an empty text.

    key: unique in its file. fields: those that not every row has.
    """
    texts = [clean(text) for pair in pairs for text in pair]
    if not any(TAG in text for text in texts):
        texts[0] = IMAGE * len(images) + texts[0]
    image = images[0] if len(images) == 1 else images or None
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": f"{source}/{split}/{key}", "image": image, "source": source, "split": split,
            "workflow": workflow, **fields, "conversations": turns}


def read_list(path: Path, prefix: str = "item") -> Iterator:
    """The values at `prefix` in a JSON file of any size, one at a time.

    prefix: "item" for the elements of a list, "images.item" for those of an object's list "images".
    ValueError where the file is not JSON, or stops half way.
    """
    import ijson  # only here: the demo's data set does without it

    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:  # some editors write one
            file.seek(0)
        try:
            yield from ijson.items(file, prefix, use_float=True, buf_size=1 << 20)
        except ijson.JSONError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not JSON, or not all of it ({reason})") from None


def convert(
    rows: Iterable[dict],
    counts: Counts,  # those of the readers of `rows`
    out: Path,
    excluded: Set[int] = frozenset(),  # numbers of COCO pictures to leave out
    max_malformed: float = 0.01,  # share
) -> None:
    """Write rows to `out`, which appears when all is done, or not at all. Raises as `check`."""
    if out.exists():  # it may be an input: one of several, with OUT forgotten
        raise FileExistsError(f"{out} is there already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as new:
        with open(new, "wb") as file:
            for row in rows:
                with counts.each():
                    for name in pictures_of(check_row(row)):
                        number = COCO_NAME.search(name)
                        if number and int(number[1]) in excluded:
                            raise Drop("its picture is one that grounding is evaluated on")
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    counts["written"] += 1
        counts.check(max_malformed)
