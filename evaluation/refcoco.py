"""RefCOCO, RefCOCO+ and RefCOCOg: expressions answered by boxes, scored by the official rule.

Sources: the official IAA release (prompt, compute_precision.py). Its files `REC_*.jsonl` are read,
and the rows that `prepare_data refcoco` writes.
"""

import ast
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from data import GROUNDING_PROMPT, check_row, iou, padded_square, path_below
from evaluation.answers import Record, Table, read_lines
from tokenization.templates import without_tags


def read(data: Path, images: Path | None) -> list[Record]:
    """The expressions of a JSONL file, or of all in a folder; images: what their paths start at."""
    if images is None:
        raise ValueError("refcoco: --images FOLDER is needed, the root of the pictures")
    files = sorted(data.glob("[!.]*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise FileNotFoundError(f"{data}: no *.jsonl in it")
    return [question for path in files for question in read_lines(
        path, lambda row, number, path=path: [make_question(row, path.stem, number, images)])]


def make_question(row: dict, stem: str, number: int, images: Path) -> Record:
    """A row of either form, of line `number` in the file named `stem`.

    The official prompt has no full stop at its end, though training rows may have one.
    """
    if "expression" in row:  # the official form; shikra's files have no sent_id
        key, picture = f"{stem}/{row.get('sent_id', number)}", row["img_path"]
        text, box = GROUNDING_PROMPT.format(row["expression"]), row["bbox"]
    else:
        question = check_row(row)["conversations"][0]["value"]
        stem, key, picture = f"{row['source']} {row['split']}", row["id"], row["image"]
        text = without_tags(question).strip().removesuffix(".")
        box, = row["boxes"]
    width, height = row["width"], row["height"]
    x1, y1, x2, y2 = box
    if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1) or max(box) <= 1:
        raise ValueError(f"box {box} is not x1, y1, x2, y2 in pixels of {width} x {height}")
    return {"key": key, "workflow": "grounding", "max_tokens": 128,
            "image": path_below(images, picture), "prompt": text, "set": stem, "box": box,
            "width": width, "height": height}


def official_hit(record: Record) -> bool:
    """Whether any box of the answer has an IoU of 0.5 or more, and no piece ahead of it is broken.

    A piece is a Python list of fractions of the padded square. The official scorer calls eval on
    it; this reads literals.
    """
    side, left, top = padded_square(record["width"], record["height"])
    try:
        for piece in record["answer"].split("; "):
            x1, y1, x2, y2 = ast.literal_eval(piece)[:4]
            box = x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top
            if iou(box, record["box"]) >= 0.5:
                return True
    except (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError, MemoryError,
            RecursionError):
        pass  # the official scorer stops here too
    return False


def score(records: list[Record]) -> Table:
    """For each set and split: precision at IoU 0.5 by the official rule, in %."""
    hits = defaultdict(list)
    for record in records:
        hits[record["set"]].append(official_hit(record))
    return {name: {"official": 100 * fmean(flags), "asked": len(flags)}
            for name, flags in hits.items()}
