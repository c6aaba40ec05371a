"""What all converters share: how rows are made, and the one loop that checks and writes them.

A reader of a published data set yields items. An item is a row, as `data.check_row` wants it, or a
`Drop` that says why a record, or a part of one, was left out.
"""

import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import lru_cache
from pathlib import Path

import numpy as np

from clip import open_image
from common.files import new_file
from data import GROUNDING_PROMPT, boxes_to_text, check_row
from tokenization.templates import IMAGE

SEED = 0  # of the sample that --max-rows draws
COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.jpg$")
ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
OUTSIDE = "the image's path leaves the root of the pictures"
# What a reader's plain code raises where a record lacks a field or has another type in its place.
WRONG_TYPES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Drop(Exception):
    """Why a record, or a part of it, is left out.

    malformed: the file is not as it was published. Too many of these end a conversion.
    """

    def __init__(self, reason: str, malformed: bool = True):
        super().__init__(reason)
        self.malformed = malformed


Item = dict | Drop


# ---------------------------------------------------------------------------------- making rows


def each(records: Iterable, make: Callable[..., Iterable[Item]]) -> Iterator[Item]:
    """The items of `make(record)` for each record.

    An exception that `make` raises over a record becomes a Drop, and the next record follows.
    """
    for record in records:
        try:
            yield from make(record)
        except Drop as drop:
            yield drop
        except WRONG_TYPES as error:
            yield Drop(f"a record is not as published ({type(error).__name__}: {error})"[:120])


def clean(text: str) -> str:
    """A text without image placeholders, its ends stripped. Drop where nothing is left."""
    text = text.replace("<image>", "").strip()
    if not text:
        raise Drop("a text is empty")
    return text


def conversation(pairs: Iterable[tuple[str, str]], image: bool = True) -> list[dict]:
    """Pairs of question and answer as turns. The placeholder of an image opens the first."""
    turns = []
    for question, answer in pairs:
        opening = IMAGE if image and not turns else ""
        turns += [{"from": "human", "value": opening + clean(question)},
                  {"from": "gpt", "value": clean(answer)}]
    return turns


def make_row(
    source: str, split: str, key, image: str | None, turns: list[dict], workflow="mm", **boxes
) -> dict:
    """A row. key: unique in its source and split. boxes: more fields, of a row with boxes."""
    return {"id": f"{source}/{split}/{key}", "image": image, "workflow": workflow,
            "source": source, "split": split, **boxes, "conversations": turns}


def grounding_row(
    source: str, split: str, key, image: str, size: tuple[int, int], expression: str, boxes: list
) -> dict:
    """A row that asks where `expression` is in a picture of `size` (width, height).

    boxes: pixels, x1, y1, x2, y2, ends exclusive. Drop where one is not that, or is empty once it
    is written with two decimals. Half of the prompts, by a hash of their id, end in a full stop:
    the official prompt has none, the paper's figures have one.
    """
    (width, height), inside = size, []
    for x1, y1, x2, y2 in boxes:
        if x1 > x2 or y1 > y2:
            raise Drop("the corners of a box are swapped")
        clipped = (min(max(x1, 0), width), min(max(y1, 0), height),
                   min(max(x2, 0), width), min(max(y2, 0), height))
        inside.append([int(v) if v == int(v) else round(v, 2) for v in clipped])
    answer = boxes_to_text(inside, width, height)
    if answer.count("[") < len(boxes):
        raise Drop("a box is outside the picture, or empty once rounded", malformed=False)
    stop = "." * (zlib.crc32(f"{source}/{split}/{key}".encode()) & 1)
    question = GROUNDING_PROMPT.format(clean(expression).rstrip(".")) + stop
    return make_row(source, split, key, image, conversation([(question, answer)]), "grounding",
                    width=width, height=height, boxes=inside)


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


# ---------------------------------------------------------------------------------- writing rows


@lru_cache(maxsize=1024)  # the rows of one picture follow each other
def picture_size(root: Path, name: str) -> tuple[int, int]:
    """(width, height) of a picture below `root`, decoded whole. Drop where it cannot be used."""
    if not (root / name).resolve().is_relative_to(root):  # it is a link
        raise Drop(OUTSIDE)
    try:
        return open_image(root / name).size
    except FileNotFoundError:
        raise Drop("the picture is missing") from None
    except ValueError:
        raise Drop("the picture is broken") from None


def check_image(row: dict, excluded: Set[int], root: Path | None) -> None:
    """Drop where a row's picture is outside the root, excluded, or (given a root) unusable."""
    name = row["image"]
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise Drop(OUTSIDE)
    number = COCO_NAME.search(name) if excluded else None
    if number and int(number[1]) in excluded:
        raise Drop("its picture is one that grounding is evaluated on", malformed=False)
    size = picture_size(root, name) if root else None
    if size and "boxes" in row and size != (row["width"], row["height"]):
        raise Drop("the picture is not of the size that its boxes are for")


def keep_sample(path: Path, rows: int, wanted: int) -> None:
    """Keep `wanted` of the `rows` lines of a file, drawn with a fixed seed, in their order."""
    kept = np.zeros(rows, bool)
    kept[np.random.default_rng(SEED).permutation(rows)[:wanted]] = True
    with new_file(path) as new, open(path, "rb") as lines, open(new, "wb") as file:
        file.writelines(line for line, keep in zip(lines, kept, strict=True) if keep)


def check_counts(counts: Counter, max_malformed: float) -> None:
    """Print the number of rows by outcome. ValueError where too few of them are good."""
    for outcome, count in counts.most_common(50):
        print(f"{count:,}  {outcome}")
    malformed = sum(count for outcome, count in counts.items() if outcome.startswith("malformed"))
    if malformed > max_malformed * counts.total():
        raise ValueError(f"{malformed:,} of {counts.total():,} are malformed, so nothing is "
                         "written; a higher --max-malformed accepts them")
    if not counts["written"]:
        raise ValueError("no row to write: is it the file that this data set has?")


def convert(
    items: Iterable[Item],
    out: Path,
    excluded: Set[int] = frozenset(),  # numbers of COCO pictures
    root: Path | None = None,  # every picture is decoded below it; None: pictures are not checked
    text_rows: bool = True,  # False: rows without a picture are dropped
    limit: int | None = None,  # stop after so many rows
    max_rows: int | None = None,  # keep a random sample of so many
    max_malformed: float = 0.01,  # share
) -> Counter:
    """Write the rows among `items` to `out`. Print and return the number of rows by outcome.

    `out` appears when all is done, or not at all. ValueError where no row was written, or where
    more than the share `max_malformed` of the items is malformed.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    root, counts = root and root.resolve(), Counter()
    with new_file(out) as new:
        with open(new, "wb") as file:
            for item in items:
                try:
                    if isinstance(item, Drop):
                        raise item
                    if item["image"] is not None:
                        check_image(item, excluded, root)
                    elif not text_rows:
                        raise Drop("text only", malformed=False)
                    line = ENCODE(check_row(item)).encode()
                except (Drop, ValueError) as error:  # the latter: not a row, half a character
                    malformed = getattr(error, "malformed", True)
                    counts[f"{'malformed' if malformed else 'dropped'}: {error}"] += 1
                    continue
                file.write(line + b"\n")
                counts["written"] += 1
                if counts["written"] % 100_000 == 0:
                    print(f"{counts['written']:,} rows", file=sys.stderr)
                if counts["written"] == limit:
                    break
        check_counts(counts, max_malformed)
        if max_rows and max_rows < counts["written"]:
            keep_sample(new, counts["written"], max_rows)
            print(f"{max_rows:,}  of them kept, drawn by chance")
    return counts
