"""MME: 14 subtasks of yes/no questions, two a picture, asked and scored officially.

Sources: the official IAA release (prompt), the authors' eval tool (BradyFU, score).
"""

from collections import defaultdict
from pathlib import Path

from data import ONE_WORD
from evaluation.answers import Question, Record, Table, percent, read_text

MAX_TOKENS = 128  # of an answer
YES_NO = " Please answer yes or no."
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def read(data: Path, images: Path | None = None) -> list[Question]:
    """The published folder of 14 subtasks. ValueError says what of it is missing or damaged."""
    root = next((folder.parent for folder in data.rglob("existence")), data)
    questions = []
    for subtask in (*PERCEPTION, *COGNITION):  # texts and pictures in two folders, or in one
        files = list((root / subtask).rglob("[!.]*.*"))  # a Mac adds ._NAME
        texts = {path.stem: path for path in files if path.suffix == ".txt"}
        pictures = {path.stem: path for path in files if path.suffix in (".jpg", ".png")}
        alone = sorted(texts.keys() ^ pictures.keys())
        if alone or not texts:
            raise ValueError(f"{data}: not MME's folder, or half of it: in {subtask}, "
                             f"picture or text of {alone[0] if alone else 'all'} is missing")
        for stem, path in sorted(texts.items()):
            for number, (text, answer) in enumerate(read_pair(path), 1):
                facts = {"subtask": subtask, "picture": stem, "expected": answer}
                text = text.replace(YES_NO, "") + ONE_WORD
                questions.append(Question(f"{subtask}/{stem}/{number}", text, pictures[stem],
                                          MAX_TOKENS, facts=facts))
    return questions


def read_pair(path: Path) -> list[list[str]]:
    """The two lines `question<TAB>Yes|No` about a picture."""
    lines = read_text(path).splitlines()
    pairs = [line.strip().split("\t") for line in lines if line.strip()]
    if [len(pair) for pair in pairs] != [2, 2] or not all(a in ("Yes", "No") for _, a in pairs):
        raise ValueError(f"{path}: not two lines of a question, a tab, and Yes or No")
    return pairs


def yes_or_no(answer: str) -> str:
    """yes, no or other, by the answer's first four characters; yes is looked for first."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(records: list[Record]) -> Table:
    """Perception (2000 at most), cognition (800), and each subtask (200).

    A subtask's score is the accuracy over questions plus the accuracy over pictures, both of whose
    questions must be right (acc+), in percent.
    """
    table = {}
    for subtask in (*PERCEPTION, *COGNITION):
        pictures = defaultdict(list)
        for record in records:
            if record["subtask"] == subtask:
                right = yes_or_no(record["answer"]) == record["expected"].lower()
                pictures[record["picture"]].append(right)
        if pictures:
            flags = [right for pair in pictures.values() for right in pair]
            table[subtask] = {"score": percent(flags) + percent(map(all, pictures.values())),
                              "asked": len(flags)}
    sums = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [table[subtask] for subtask in subtasks if subtask in table]
        if found:
            sums[name] = {column: sum(row[column] for row in found) for column in found[0]}
    return sums | table
