"""What all converters share: how a row is made, and the loop that checks rows and writes them.

A reader of a published data set yields rows as `data.check_row` wants them, in an order that
depends on the file alone. What it leaves out, it counts.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle
from pathlib import Path

from clip import open_image
from common.files import new_file
from data import TAG, check_row, frame_of, path_below
from tokenization.templates import IMAGE

COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.jpg$")
# What plain code raises over a record that is not as published; SyntaxError: of broken XML.
MALFORMED = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)


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
            raise ValueError("no row to write: is it the file that this data set has?")


def clean(text: str) -> str:
    """A text, its ends stripped. ValueError where nothing is left."""
    if not text.strip():
        raise ValueError("a text is empty")
    return text.strip()


def make_row(
    source: str, split: str, key, image: str | None, pairs: Iterable[tuple[str, str]],
    workflow: str = "mm", **fields,
) -> dict:
    """A row of questions and answers; the tag of an image opens the first, wherever it stood.

    key: unique in its source and split. fields: those that not every row has.
    """
    texts = [text.strip() for pair in pairs for text in pair]
    if image is not None:
        texts[0] = IMAGE + texts[0].replace(TAG, "", 1).strip()
    turns = [{"from": speaker, "value": text}
             for speaker, text in zip(cycle(("human", "gpt")), texts, strict=False)]
    return {"id": f"{source}/{split}/{key}", "image": image, "source": source, "split": split,
            "workflow": workflow, **fields, "conversations": turns}


def read_list(path: Path, prefix: str = "item") -> Iterator:
    """The values at `prefix` in a JSON file of any size, one at a time.

    prefix: "item" for the elements of a list, "images.item" for those of an object's list "images".
    ValueError where the file is not JSON, or stops half way.
    """
    import ijson  # only here: the demo's data set does without it

    with open(path, "rb") as file:
        try:
            yield from ijson.items(file, prefix, use_float=True, buf_size=1 << 20)
        except ijson.JSONError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: not JSON, or not all of it ({reason})") from None


@lru_cache(maxsize=1024)  # the rows of one picture follow each other
def picture_size(root: Path, name: str) -> tuple[int, int]:
    """(width, height) of a picture below `root`, decoded whole. ValueError where it cannot be."""
    try:
        return open_image(path_below(root, name)).size
    except ValueError:  # one reason for all pictures, to count them
        raise ValueError("the picture is missing, broken, or not below the root") from None


def check_image(row: dict, excluded: Set[int], root: Path | None) -> None:
    """Drop where a row's picture is excluded; ValueError where it leads out of the root.

    excluded: numbers of COCO pictures. root: given, the picture is opened below it, and ValueError
    also says that it cannot be, or is not of the size that its boxes are for.
    """
    name = row["image"]
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError("the image's path leaves the root of the pictures")
    number = COCO_NAME.search(name)
    if number and int(number[1]) in excluded:
        raise Drop("its picture is one that grounding is evaluated on")
    size = picture_size(root, name) if root else None
    if size and frame_of(row) not in (None, size):
        raise ValueError("the picture is not of the size that its boxes are for")


def convert(
    rows: Iterable[dict],
    counts: Counts,  # those of the readers of `rows`
    out: Path,
    excluded: Set[int] = frozenset(),
    root: Path | None = None,  # None: pictures are not opened
    limit: int | None = None,  # stop after so many rows
    max_malformed: float = 0.01,  # share
) -> None:
    """Write rows to `out`, which appears when all is done, or not at all. Raises as `check`."""
    if out.exists():
        raise FileExistsError(f"{out} is there already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as new:
        with open(new, "wb") as file:
            for row in rows:
                with counts.each():
                    if row["image"] is not None:
                        check_image(row, excluded, root)
                    line = json.dumps(check_row(row), ensure_ascii=False).encode()
                    file.write(line + b"\n")
                    counts["written"] += 1
                if counts["written"] == limit:
                    break
        counts.check(max_malformed)
