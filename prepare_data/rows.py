"""What all converters share: how rows are made, and the one loop that checks and writes them.

A reader of a published data set yields items. An item is a row, as `data.check_row` wants it, or
the exception that says why a record was left out.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from functools import lru_cache
from pathlib import Path

from clip import open_image
from common.files import new_file
from data import RowError, check_row, path_below
from tokenization.templates import IMAGE

COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.jpg$")


class Drop(Exception):
    """Why a record is left out, although its file is as it was published."""


# What plain code raises over a record that is not as published; SyntaxError: of broken XML.
MALFORMED = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)
Item = dict | Exception


def each(records: Iterable, make: Callable[..., Iterable[Item]]) -> Iterator[Item]:
    """The items of `make(record)` for each record; a record over which it raises ends in that."""
    for record in records:
        try:
            yield from make(record)
        except (Drop, *MALFORMED) as error:
            yield error


def clean(text: str) -> str:
    """A text without image placeholders, its ends stripped. ValueError where nothing is left."""
    text = text.replace("<image>", "").strip()
    if not text:
        raise ValueError("a text is empty")
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
    source: str, split: str, key, image: str | None, turns: list[dict], workflow="mm", **fields
) -> dict:
    """A row. key: unique in its source and split. fields: those that not every row has."""
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
    except RowError:
        raise ValueError("the picture is missing, or not below the root") from None
    except ValueError:
        raise ValueError("the picture is broken") from None


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
    if size and "boxes" in row and size != (row["width"], row["height"]):
        raise ValueError("the picture is not of the size that its boxes are for")


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
    excluded: Set[int] = frozenset(),
    root: Path | None = None,  # None: pictures are not opened
    limit: int | None = None,  # stop after so many rows
    max_malformed: float = 0.01,  # share
) -> Counter:
    """Write the rows among `items` to `out`. Print and return the number of rows by outcome.

    `out` appears when all is done, or not at all. ValueError where no row was written, or where
    more than the share `max_malformed` of the items is malformed.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = Counter()
    with new_file(out) as new:
        with open(new, "wb") as file:
            for item in items:
                try:
                    if isinstance(item, Exception):
                        raise item
                    if item["image"] is not None:
                        check_image(item, excluded, root)
                    line = json.dumps(check_row(item), ensure_ascii=False).encode()
                except Drop as drop:
                    counts[f"dropped: {drop}"] += 1
                except MALFORMED as error:
                    counts[f"malformed: {type(error).__name__}: {error}"[:120]] += 1
                else:
                    file.write(line + b"\n")
                    counts["written"] += 1
                    if counts["written"] == limit:
                        break
        check_counts(counts, max_malformed)
    return counts
