"""RefCOCO, RefCOCO+ and RefCOCOg: expressions answered by boxes, scored by the official rule.

Sources: the official IAA release (prompt, compute_precision.py). Its files `REC_*.jsonl` are read,
and the rows that `prepare_data refcoco` writes.
"""

import ast
import re
from pathlib import Path

from data import GROUNDING_PROMPT, Box, iou, padded_square, path_below, text_to_boxes
from evaluation.answers import Question, Record, Table, percent, read_questions
from tokenization.templates import IMAGE

MAX_TOKENS = {"grounding": 128}
OFFICIAL_NAME = re.compile(r"REC_(refcoco[+g]?)_[a-z]+_(val|testA|testB|test)")


def read(data: Path, images: Path | None) -> list[Question]:
    """The expressions of a JSONL file, or of all in a folder; images: the root of the pictures."""
    if images is None:
        raise ValueError("refcoco: --images FOLDER is needed, the root of the pictures")
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise FileNotFoundError(f"{data}: no *.jsonl in it")
    return [question for path in files for question in read_questions(
        path, lambda row, number, stem=path.stem: [make_question(row, stem, number, images)])]


def make_question(row: dict, stem: str, number: int, images: Path) -> Question:
    """A row of either form, of line `number` in the file named `stem`.

    The official prompt has no full stop at its end, though training rows may have one.
    """
    if "expression" in row:  # the official form; shikra's files have no sent_id
        official = OFFICIAL_NAME.fullmatch(stem)
        name, split = official.groups() if official else (stem, "")
        key, picture = f"{name}/{split}/{row.get('sent_id', number)}", row["img_path"]
        text, box = GROUNDING_PROMPT.format(row["expression"]), row["bbox"]
    else:
        name, split, key, picture = (row[field] for field in ("source", "split", "id", "image"))
        text = row["conversations"][0]["value"].removeprefix(IMAGE).strip().removesuffix(".")
        box, = row["boxes"]
    width, height = row["width"], row["height"]
    x1, y1, x2, y2 = box
    if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1) or max(box) <= 1:
        raise ValueError(f"box {box} is not x1, y1, x2, y2 in pixels of {width} x {height}")
    facts = {"set": f"{name} {split}".strip(), "box": box, "width": width, "height": height}
    return Question(key, text, path_below(images, picture), "grounding", facts)


def official_box(piece: str, width: int, height: int) -> Box:
    """A Python list of numbers, fractions of the padded square, as a box in pixels.

    Raises whatever a malformed piece raises. The official scorer calls eval; this reads literals.
    """
    x1, y1, x2, y2 = ast.literal_eval(piece)[:4]
    side, left, top = padded_square(width, height)
    return x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top


def first_box_hits(record: Record) -> bool:
    """Whether the first box found anywhere in the answer's text has an IoU of 0.5 or more."""
    found = text_to_boxes(record["answer"], record["width"], record["height"])
    return bool(found) and iou(found[0], record["box"]) >= 0.5


def box_verdict(record: Record) -> dict[str, bool]:
    """What each rule says of an answer.

    any: one of its boxes hits and no piece before it is malformed (the official rule);
    first: the first piece hits; malformed: reading stopped at a piece that is no box;
    lenient: `first_box_hits`.
    """
    verdict = {"any": False, "first": False, "malformed": False,
               "lenient": first_box_hits(record)}
    for place, piece in enumerate(record["answer"].split("; ")):
        try:
            box = official_box(piece, record["width"], record["height"])
            hit = iou(box, record["box"]) >= 0.5
        except (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError, MemoryError,
                RecursionError):
            return verdict | {"malformed": True}
        if hit:
            return verdict | {"any": True, "first": place == 0}
    return verdict


def score(records: list[Record]) -> Table:
    """For each set and split: precision at IoU 0.5 by three rules, and malformed answers, in %."""
    table = {}
    for name in dict.fromkeys(record["set"] for record in records):
        verdicts = [box_verdict(record) for record in records if record["set"] == name]
        shares = {rule: percent(v[rule] for v in verdicts) for rule in verdicts[0]}
        table[name] = {"official": shares.pop("any"), **shares, "asked": len(verdicts)}
    return table
