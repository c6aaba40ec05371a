"""easy-VQA, the demo's data: held-out questions and boxes, as `prepare_data easy-vqa` writes them.

A question is right where the answer is exactly the expected word. A box is right where the first
box of the answer overlaps the measured one with an IoU of 0.5 or more.
"""

from collections import Counter
from pathlib import Path

from data import path_below
from evaluation.answers import Question, Record, Table, percent, read_questions
from evaluation.refcoco import first_box_hits
from tokenization.templates import IMAGE

MAX_TOKENS = {"mm": 8, "grounding": 48}
KINDS = ("colour", "shape", "yes/no")


def answer_kind(answer: str) -> str:
    """The kind of question that has this answer: one of KINDS."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("rectangle", "circle", "triangle") else "colour"


def read(data: Path, images: Path | None = None) -> list[Question]:
    """The held-out questions and boxes. ValueError or FileNotFoundError names a bad file."""
    return [*read_words(data), *read_boxes(data)]


def read_words(data: Path) -> list[Question]:
    """The held-out questions, each with the commonest answer to its kind in the training rows."""
    counts = {kind: Counter() for kind in KINDS}

    def count(row: dict, number: int) -> list[Question]:
        words = [turn["value"] for turn in row["conversations"][1::2]]
        for answer in (word for word in words if not word.startswith("[")):  # that is a box
            counts[answer_kind(answer)][answer] += 1
        return []

    def make(row: dict, number: int) -> list[Question]:
        image = path_below(data, row["image"])
        turns = [turn["value"].removeprefix(IMAGE) for turn in row["conversations"]]
        return [
            Question(f"{row['id']}/{place}", text, image,
                     facts={"expected": answer, "commonest": commonest[answer_kind(answer)]})
            for place, (text, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True), 1)
        ]

    read_questions(data / "train-questions.jsonl", count)
    commonest = {kind: max(counter, key=counter.get, default="")
                 for kind, counter in counts.items()}
    return read_questions(data / "test-questions.jsonl", make)


def read_boxes(data: Path) -> list[Question]:
    """The held-out boxes, for the workflow "grounding"."""

    def make(row: dict, number: int) -> list[Question]:
        text = row["conversations"][0]["value"].removeprefix(IMAGE)
        facts = {"box": row["boxes"][0], "width": row["width"], "height": row["height"]}
        return [Question(row["id"], text, path_below(data, row["image"]), "grounding", facts)]

    return read_questions(data / "test-boxes.jsonl", make)


def is_right(record: Record) -> bool:
    """Whether the answer to a question, or to a request for a box, is right."""
    return first_box_hits(record) if "box" in record else record["answer"] == record["expected"]


def score(records: list[Record]) -> Table:
    """A column for each kind, all questions, and boxes. The last row is the share of right ones.

    The row above it is what the commonest training answer to each kind would get.
    """
    words = [record for record in records if "box" not in record]
    groups = {kind: [record for record in words if answer_kind(record["expected"]) == kind]
              for kind in KINDS}
    groups |= {"all": words, "boxes, IoU 0.5": [r for r in records if "box" in r]}
    groups = {name: group for name, group in groups.items() if group}
    guess = {name: percent(record["commonest"] == record["expected"] for record in group)
             for name, group in groups.items() if "box" not in group[0]}
    return {"asked": {name: len(group) for name, group in groups.items()},
            "commonest answer, %": guess,
            "right, %": {name: percent(map(is_right, group)) for name, group in groups.items()}}
