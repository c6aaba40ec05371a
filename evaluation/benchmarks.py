"""The benchmarks: their published files read into questions, with the official prompts.

A reader takes the folder or file that is published and the folder of pictures, where that is a
thing of its own, and returns questions; what scoring needs to know of one stands in its `facts`
and is saved beside the answer. A file that is not what it should be is a ValueError of one line.

Sources: the official IAA release (MME, RefCOCO prompts), MMMU's authors (prompt for LLaVA-1.5);
the paper's figures are of Tables 2 and 4. MMBench, a table with a file to submit, is in mmbench.py.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from evaluation.ask import Question
from tokenization.templates import IMAGE
from data import GROUNDING_PROMPT, ONE_LETTER, ONE_WORD, JsonlDataset, path_below
from prepare_data.source_files import read_parquet
from evaluation.mmbench import UNSCORED_TEST, mmbench_submission, read_mmbench, score_or_count
from evaluation.scoring import (
    COGNITION,
    PERCEPTION,
    Record,
    Table,
    answer_kind,
    score_easy_vqa,
    score_mme,
    score_mmmu,
    score_refcoco,
)

LETTERS = "ABCDEFGHIJ"


# ---------------------------------------------------------------------------------- MME

YES_NO = " Please answer yes or no."


def read_mme(data: Path, images: Path | None) -> list[Question]:
    """The folder of 14 subtasks: two questions a picture, in a text file of the picture's name."""
    roots = [data, *sorted(data.glob("*")), *sorted(data.glob("*/*"))]
    root = next((folder for folder in roots if (folder / "existence").is_dir()), data)
    missing = [name for name in (*PERCEPTION, *COGNITION) if not (root / name).is_dir()]
    if missing:
        raise ValueError(f"{data}: not MME's folder, or half of it: no {', '.join(missing)}")
    found = []
    for subtask in (*PERCEPTION, *COGNITION):
        texts, pictures = root / subtask / "questions_answers_YN", root / subtask / "images"
        if not texts.is_dir():
            texts = pictures = root / subtask
        shown = {p.stem: p for p in sorted(pictures.glob("*")) if p.suffix in (".jpg", ".png")}
        asked = {p.stem: p for p in sorted(texts.glob("*.txt"))}
        alone = sorted(shown.keys() ^ asked.keys())
        if alone or not asked:
            what = f"picture or text of {alone[0]} is missing" if alone else "nothing in it"
            raise ValueError(f"{root / subtask}: {what}")
        for stem, text in asked.items():
            for number, (question, answer) in enumerate(read_pair(text), 1):
                facts = {"subtask": subtask, "picture": stem, "expected": answer}
                question = question.replace(YES_NO, "") + ONE_WORD
                found.append(Question(f"{subtask}/{stem}/{number}", question, shown[stem],
                                      facts=facts))
    return found


def read_pair(path: Path) -> list[list[str]]:
    """The two lines `question<TAB>Yes|No` of an MME text file."""
    lines = read_text(path).replace("\r", "").split("\n")
    pairs = [line.strip().split("\t") for line in lines if line.strip()]
    if [len(pair) for pair in pairs] != [2, 2] or not all(a in ("Yes", "No") for _, a in pairs):
        raise ValueError(f"{path}: not two lines of a question, a tab, and Yes or No")
    return pairs


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark. ValueError names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason})") from None


# ---------------------------------------------------------------------------------- MMMU

DISCIPLINES = {
    "Art & Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health & Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities & Social Science": "History Literature Psychology Sociology",
    "Tech & Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items()
                 for subject in subjects.split()}
MMMU_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")


def read_mmmu(data: Path, images: Path | None) -> list[Question]:
    """Parquet files of the validation split, `<Subject>/validation-*.parquet`, or one such file.

    Of several pictures the first is shown, as by the authors' LLaVA runner.
    """
    files = sorted(data.rglob("validation-*.parquet")) if data.is_dir() else [data]
    if not files:
        raise ValueError(f"{data}: no validation-*.parquet below it")
    found = []
    for path in files:
        for row in read_parquet(path, [*MMMU_COLUMNS]):
            try:
                found.append(mmmu_question(row))
            except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError,
                    RecursionError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ValueError(f"{path}: {reason}") from None
    return found


def mmmu_question(row: dict) -> Question:
    """A row as its authors ask LLaVA-1.5; `<image 1>` stays in the text. ValueError names it."""
    key, answer = row["id"], row["answer"]
    subject = key.removeprefix("validation_").rpartition("_")[0]
    picture = (row["image_1"] or {}).get("bytes")
    if not picture:
        raise ValueError(f"{key} has no picture in image_1")
    if row["question_type"] == "multiple-choice":
        texts = ast.literal_eval(row["options"])
        options = dict(zip(LETTERS, texts, strict=False))
        if len(options) != len(texts) or answer not in options:
            raise ValueError(f"{key}: {len(texts)} options, of which the answer is {answer!r}")
        choices = "".join(f"({letter}) {text}\n" for letter, text in options.items())
        text, expected = f"{row['question']}\n\n{choices}\n{ONE_LETTER}", [answer]
    else:
        expected = ast.literal_eval(answer) if answer.startswith("[") else [answer]
        options, text = None, f"{row['question']}\n{ONE_WORD}"
    facts = {"subject": subject, "discipline": DISCIPLINE_OF.get(subject, "other"),
             "options": options, "expected": [str(value) for value in expected]}
    return Question(key, text, picture, facts=facts)


# ---------------------------------------------------------------------------------- RefCOCO

OFFICIAL_NAME = re.compile(r"REC_(refcoco[+g]?)_[a-z]+_(val|testA|testB|test)")


def read_refcoco(data: Path, images: Path | None) -> list[Question]:
    """JSONL files of expressions, in the official form or as convert_data.py writes them."""
    if images is None:
        raise ValueError("refcoco: --images FOLDER is needed, the root of the pictures")
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files:
        raise ValueError(f"{data}: no *.jsonl in it")
    found = []
    for path in files:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    found.append(expression_question(row, path.stem, number, images))
                except KeyError as error:
                    raise ValueError(f"{path}:{number}: {error} is missing") from None
                except (ValueError, TypeError, AttributeError, IndexError,
                        RecursionError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
    return found


def expression_question(row: dict, stem: str, number: int, images: Path) -> Question:
    """A row of either form: official (`expression`, `bbox`), or a conversation with its boxes.

    The official prompt has no full stop at its end, though training rows may have one. number: of
    the line, for files without `sent_id`, as shikra's.
    """
    official = OFFICIAL_NAME.fullmatch(stem)
    if "expression" in row:
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
    facts = {"set": name, "split": split, "box": box, "width": width, "height": height}
    return Question(key, text, path_below(images, picture), "grounding", facts)


# ---------------------------------------------------------------------------------- easy-VQA


def read_easy_vqa(data: Path, images: Path | None) -> list[Question]:
    """The demo's held-out questions and boxes, as convert_data.py wrote them."""
    found = read_questions(data)
    for row in all_rows(data, "test-boxes"):
        text = row["conversations"][0]["value"].removeprefix(IMAGE)
        facts = {"box": row["boxes"][0], "width": row["width"], "height": row["height"]}
        picture = path_below(data, row["image"])
        found.append(Question(row["id"], text, picture, "grounding", facts))
    return found


def read_questions(data: Path) -> list[Question]:
    """Every held-out question of easy-VQA by itself, and the commonest answer to its kind."""
    counts: dict[str, Counter] = {}
    for row in all_rows(data, "train-questions"):
        for turn in row["conversations"][1::2]:
            counts.setdefault(answer_kind(turn["value"]), Counter())[turn["value"]] += 1
    commonest = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    found = []
    for row in all_rows(data, "test-questions"):
        picture = path_below(data, row["image"])
        turns = [turn["value"].removeprefix(IMAGE) for turn in row["conversations"]]
        for number, (text, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True), 1):
            facts = {"expected": answer, "commonest": commonest.get(answer_kind(answer))}
            found.append(Question(f"{row['id']}/{number}", text, picture, facts=facts))
    return found


def all_rows(data: Path, name: str) -> Iterator[dict]:
    """The rows of `name`.jsonl."""
    dataset = JsonlDataset([data / f"{name}.jsonl"], data)
    return map(dataset.row, range(len(dataset)))


# ---------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, asked and scored."""

    read: Callable[[Path, Path | None], list[Question]]  # of DATA and --images
    score: Callable[[list[Record]], Table]
    tokens: dict[str, int]  # workflow -> new tokens an answer may have
    paper: Table = field(default_factory=dict)  # the paper's figures for rows of the score
    published: dict[str, int] = field(default_factory=dict)  # "asked" of a whole, published set
    export: Callable[[list[Record], Path], str] | None = None  # a file for the official scorer


def paper(*figures: float) -> dict[str, float]:
    """Figures of the paper's rows, of the last ones where there are fewer."""
    names = ("LLaVA-Llama3", "IAA-8", "IAA-14")
    return dict(zip(names[-len(figures) :], figures, strict=True))


MMBENCH = {  # language -> figures of the test split: the paper has none of dev
    "en": paper(68.9, 72.7, 74.9),
    "cn": paper(61.6, 69.2, 70.5),
}
REFCOCO = {  # split -> expressions, IAA-8, IAA-14
    "refcoco val": (10834, 89.2, 90.2),
    "refcoco testA": (5657, 92.6, 92.9),
    "refcoco testB": (5095, 83.7, 85.4),
    "refcoco+ val": (10758, 82.1, 83.4),
    "refcoco+ testA": (5726, 88.6, 89.0),
    "refcoco+ testB": (4889, 73.7, 76.7),
    "refcocog val": (4896, 84.4, 85.0),
    "refcocog test": (9602, 84.7, 85.1),
}
BENCHMARKS = {
    "mme": Benchmark(
        read_mme, score_mme, {"mm": 128}, {"perception": paper(1506.0, 1581.8, 1591.5)},
        {"perception": 2114, "cognition": 260}),
    **{f"mmbench-{language}": Benchmark(
        partial(read_mmbench, language=language), score_or_count, {"mm": 128},
        {"circular": {f"{name} (test)": figure for name, figure in figures.items()}},
        {"circular": 1164, UNSCORED_TEST: 1784}, mmbench_submission)
       for language, figures in MMBENCH.items()},
    "mmmu": Benchmark(
        read_mmmu, score_mmmu, {"mm": 128}, {"all": paper(36.8, 39.8, 39.9)}, {"all": 900}),
    "refcoco": Benchmark(
        read_refcoco, score_refcoco, {"grounding": 128},
        {split: paper(*figures) for split, (_, *figures) in REFCOCO.items()},
        {split: expressions for split, (expressions, *_) in REFCOCO.items()}),
    "easy-vqa": Benchmark(read_easy_vqa, score_easy_vqa, {"mm": 8, "grounding": 48}),
}
