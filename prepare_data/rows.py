"""What a reader of a published data set yields: rows, and why a record gave none.

A row is as convert_data.py says. Boxes in rows are pixels, x1, y1, x2, y2, ends exclusive.
"""

import zlib
from collections.abc import Iterable, Iterator

from tokenization.templates import IMAGE
from data import GROUNDING_PROMPT, boxes_to_text
from prepare_data.source_files import is_box, is_whole

NOT_XYXY = "a box is not x1, y1, x2, y2: is it x, y, width, height?"
NOT_XYWH = "a box is not x, y, width, height: is it x1, y1, x2, y2?"


class Drop(Exception):
    """Why a record gives no row. A `fault` says that the file is not as it was published."""

    def __init__(self, reason: str, fault: bool = True):
        super().__init__(reason)
        self.reason, self.fault = reason, fault


class Note(str):
    """What was mended in a record that gives a row all the same."""


Item = dict | Drop | Note


def conversation(pairs: Iterable[tuple[str, str]], image: bool = True) -> list[dict]:
    """Question-answer pairs as alternating turns, the picture, if any, ahead of the first."""
    turns = []
    for question, answer in pairs:
        question = question if turns or not image else IMAGE + question
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def make_row(
    source: str, split: str, key, image: str | None, turns: list[dict], workflow="mm", **boxes
) -> dict:
    """A row; `boxes` is what a row with boxes has on top."""
    return {"id": f"{source}/{split}/{key}", "image": image, "workflow": workflow,
            "source": source, "split": split, **boxes, "conversations": turns}


def grounding_row(
    source: str, split: str, key, image: str, size: tuple[int, int], expression: str, boxes: list
) -> dict:
    """A row that asks for `boxes` (pixels, xyxy) of a picture of `size` (width, height).

    Every other prompt, by chance of its id, ends in a full stop: the official prompt has none, the
    paper's figures have one. Drop where a box is not xyxy, or nothing is left of it.
    """
    (width, height), inside = size, []
    if not expression.strip():
        raise Drop("the expression is empty")
    if not boxes:
        raise Drop("there is no box")
    for box in boxes:
        if not (is_box(box) and box[0] <= box[2] and box[1] <= box[3]):
            raise Drop(NOT_XYXY)
        clipped = [min(max(v, 0), limit)
                   for v, limit in zip(box, (width, height) * 2, strict=True)]
        inside.append([int(v) if v == int(v) else round(v, 2) for v in clipped])
    answer = boxes_to_text(inside, width, height)
    if answer.count("[") < len(boxes):
        raise Drop("a box is outside the picture, or empty once rounded", fault=False)
    stop = "." * (zlib.crc32(f"{source}/{split}/{key}".encode(errors="replace")) & 1)
    question = GROUNDING_PROMPT.format(expression.strip().rstrip(".")) + stop
    return make_row(source, split, key, image, conversation([(question, answer)]), "grounding",
                    width=width, height=height, boxes=inside)


def field(record, name: str, *kinds: type):
    """A field of a record; Drop where it is missing or of another type."""
    if not isinstance(record, dict):
        raise Drop("not a record")
    value = record.get(name)
    if type(value) not in kinds or type(value) is int and not is_whole(value):
        raise Drop(f"{name!r} is missing, or no {' or '.join(k.__name__ for k in kinds)}")
    return value


def text(record, name: str) -> str:
    """A text field, its ends stripped; Drop where it is missing or empty."""
    value = field(record, name, str).replace("<image>", "").strip()
    if not value:
        raise Drop(f"{name!r} is empty")
    return value


def each(records: Iterable, make, *settings) -> Iterator[Item]:
    """Items of `make(number, record, *settings)` for each record, and a Drop that it raises."""
    for number, record in enumerate(records):
        try:
            yield from make(number, record, *settings)
        except Drop as drop:
            yield drop
