"""easy-VQA, the demo's data: held-out questions and boxes, as `prepare_data easy-vqa` writes them.

A question is right where the answer's last word is the expected one: the data set's own answer to
"It is red, so no." is "no". A box is right where the first box of the answer overlaps the measured
one with an IoU of 0.5 or more.
"""

from collections import Counter
from pathlib import Path

from data import TAG, check_row, iou, path_below, text_to_boxes
from evaluation.answers import Question, Record, Table, percent, read_lines

MAX_TOKENS = {"mm": 12, "grounding": 48}  # of an answer, by workflow
KINDS = ("colour", "shape", "yes/no")  # of questions whose answer is a word


def last_word(answer: str) -> str:
    """The last word of an answer, without its full stop; "" where there is none."""
    return (answer.rstrip(".").split() or [""])[-1]


def answer_kind(answer: str) -> str:
    """The kind of question that has this answer: one of KINDS, or "box"."""
    if answer.startswith("["):
        return "box"
    if last_word(answer) in ("yes", "no"):
        return "yes/no"
    return "shape" if last_word(answer) in ("rectangle", "circle", "triangle") else "colour"


def pairs(row: dict) -> list[tuple[str, str]]:
    """The questions and answers of a row. RowError where it is no row."""
    texts = [turn["value"].replace(TAG, "").strip() for turn in check_row(row)["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def read(data: Path, images: Path | None = None) -> list[Question]:
    """The held-out questions and boxes, each with the commonest training answer to its kind."""
    counts = Counter(read_lines(data / "train-questions.jsonl",
                                lambda row, _: [last_word(answer) for _, answer in pairs(row)]))
    # Rare ones come first here: of each kind the commonest is what stays.
    commonest = {answer_kind(answer): answer for answer, _ in reversed(counts.most_common())}

    def make(row: dict, workflow: str) -> list[Question]:
        facts = {} if workflow == "mm" else {
            "box": row["boxes"][0], "width": row["width"], "height": row["height"]}
        image, questions = path_below(data, row["image"]), []
        for place, (text, answer) in enumerate(pairs(row), 1):
            facts |= {"expected": answer, "commonest": commonest.get(answer_kind(answer), "")}
            questions.append(Question(f"{row['id']}/{place}", text, image, MAX_TOKENS[workflow],
                                      workflow, dict(facts)))
        return questions

    return [*read_lines(data / "test-questions.jsonl", lambda row, _: make(row, "mm")),
            *read_lines(data / "test-boxes.jsonl", lambda row, _: make(row, "grounding"))]


def is_right(record: Record) -> bool:
    """Whether the answer to a question, or to a request for a box, is right."""
    if "box" not in record:
        return last_word(record["answer"]) == last_word(record["expected"])
    found = text_to_boxes(record["answer"], record["width"], record["height"])
    return bool(found) and iou(found[0], record["box"]) >= 0.5


def score(records: list[Record]) -> Table:
    """A column for each kind, all questions, and boxes. The last row is the share of right ones.

    The row above it is what the commonest training answer to each kind would get.
    """
    words = [record for record in records if "box" not in record]
    groups = {kind: [record for record in words if answer_kind(record["expected"]) == kind]
              for kind in KINDS}
    groups |= {"all": words, "boxes, IoU 0.5": [r for r in records if "box" in r]}
    groups = {name: group for name, group in groups.items() if group}
    guess = {name: percent(record["commonest"] == last_word(record["expected"])
                           for record in group)
             for name, group in groups.items() if "box" not in group[0]}
    return {"asked": {name: len(group) for name, group in groups.items()},
            "commonest answer, %": guess,
            "right, %": {name: percent(map(is_right, group)) for name, group in groups.items()}}
