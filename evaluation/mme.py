"""MME: 14 subtasks, two yes/no questions per picture; the official prompt and score.

Sources: the official IAA release (prompt), the authors' eval tool (BradyFU, score).
"""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from data import ONE_WORD
from evaluation.answers import Record, Table, read_text

SUBTASKS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning"),
}


def read(data: Path, images: Path | None = None) -> list[Record]:
    """The published folder of 14 subtasks. ValueError says what of it is missing or damaged."""
    root = next((folder.parent for folder in data.rglob("existence")
                 if any(folder.rglob("[!.]*.txt"))), data)  # a Mac adds such folders, too
    questions = []
    for subtask in sum(SUBTASKS.values(), ()):  # texts and pictures in two folders, or in one
        files = list((root / subtask).rglob("[!.]*.*"))  # a Mac adds ._NAME
        texts = {path.stem: path for path in files if path.suffix == ".txt"}
        pictures = {path.stem: path for path in files if path.suffix in (".jpg", ".png")}
        alone = sorted(texts.keys() ^ pictures.keys())
        if alone or not texts:
            raise ValueError(f"{data}: not MME's folder, or half of it: in {subtask}, "
                             f"picture or text of {alone[0] if alone else 'all'} is missing")
        for stem, path in sorted(texts.items()):
            lines = map(str.strip, read_text(path).split("\n"))
            lines = [line.split("\t") for line in lines if line]
            if [len(pair) for pair in lines] != [2, 2] or {a for _, a in lines} - {"Yes", "No"}:
                raise ValueError(f"{path}: not two lines of a question, a tab, and Yes or No")
            questions += [
                {"key": f"{subtask}/{stem}/{number}", "workflow": "mm", "max_tokens": 128,
                 "image": pictures[stem], "subtask": subtask, "expected": answer,
                 "prompt": text.replace(" Please answer yes or no.", "") + ONE_WORD}
                for number, (text, answer) in enumerate(lines, 1)]
    return questions


def yes_or_no(answer: str) -> str:
    """yes, no or other, by the answer's first four characters; yes is looked for first."""
    return next((word for word in ("yes", "no") if word in answer.lower()[:4]), "other")


def score(records: list[Record]) -> Table:
    """Perception (2000 at most) and cognition (800), each ahead of its subtasks (200).

    A subtask's score is the accuracy over questions plus the accuracy over pictures, both of whose
    questions must be right (acc+), in percent.
    """
    right, table = defaultdict(lambda: defaultdict(list)), {}
    for record in records:
        right[record["subtask"]][record["image"]].append(
            yes_or_no(record["answer"]) == record["expected"].lower())
    for name, subtasks in SUBTASKS.items():
        rows = {}
        for subtask in filter(right.__contains__, subtasks):
            pairs = right[subtask].values()
            flags = sum(pairs, [])
            rows[subtask] = {"score": 100 * (fmean(flags) + fmean(map(all, pairs))),
                             "asked": len(flags)}
        if rows:
            table[name] = {column: sum(row[column] for row in rows.values())
                           for column in ("score", "asked")}
            table |= rows
    return table
