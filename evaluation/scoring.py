"""What the benchmarks' official scorers do, as functions of saved answers alone.

Each `score_...` takes records, the lines of an answers file: what a reader of `benchmarks.py` put
down about a question, with "key" and "answer". Each returns a table: name of a row -> its columns.
Percentages are 0 to 100, "asked" counts what the row is over.

Sources: MME's eval tool (BradyFU), VLMEvalKit's exact matching and circular evaluation (MMBench),
MMMU's eval_utils, the official IAA release's compute_precision.py (RefCOCO).
"""

import ast
import random
import re
from collections import defaultdict
from collections.abc import Iterable

from data import Box, iou, padded_square, text_to_boxes

Record = dict
Table = dict[str, dict[str, float]]

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def percent(flags: Iterable[bool]) -> dict[str, float]:
    """{"score": share of true ones in percent, "asked": how many}."""
    flags = list(flags)
    return {"score": 100 * sum(flags) / len(flags), "asked": len(flags)}


def grouped(records: Iterable[Record], *names: str) -> dict:
    """Records by the values of these fields (of one field, its bare value), in order of coming."""
    groups = defaultdict(list)
    for record in records:
        values = tuple(record[name] for name in names)
        groups[values if len(names) > 1 else values[0]].append(record)
    return groups


# ---------------------------------------------------------------------------------- MME


def yes_or_no(answer: str) -> str:
    """yes, no or other, by the answer's first four characters; yes is looked for first."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score_mme(records: list[Record]) -> Table:
    """Perception (2000 at most), cognition (800), and each subtask (200).

    A subtask's score is its accuracy over questions plus that over pictures, both of whose
    questions must be right (acc+), in percent.
    """
    table = {}
    for subtask, asked in grouped(records, "subtask").items():
        right = [yes_or_no(r["answer"]) == r["expected"].lower() for r in asked]
        pictures = defaultdict(list)
        for record, ok in zip(asked, right, strict=True):
            pictures[record["picture"]].append(ok)
        both = percent(len(pair) == 2 and all(pair) for pair in pictures.values())
        table[subtask] = {"score": percent(right)["score"] + both["score"], "asked": len(asked)}
    order = [name for name in (*PERCEPTION, *COGNITION) if name in table]
    sums = {}
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [table[subtask] for subtask in subtasks if subtask in table]
        if found:
            sums[name] = {column: sum(row[column] for row in found) for column in found[0]}
    return sums | {name: table[name] for name in order}


# ---------------------------------------------------------------------------------- MMBench

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"(?:correct )?answer is \**([A-D])\b")
FULL_TURN = 1_000_000  # a question's rotations have its index plus multiples of this


def option_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer names, by letter or by text; "Z": refused; None: unresolved."""
    if any(phrase in answer for phrase in REFUSALS):
        return "Z"
    words = answer.translate(PUNCTUATION).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - 4:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    said = ANSWER_IS.search(answer)
    if said and said[1] in options:
        return said[1]
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    quoted = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return quoted[0] if len(quoted) == 1 else None


def score_mmbench(records: list[Record]) -> Table:
    """Circular: a question is right if each of its rotations is; by ability; and vanilla."""
    groups = []
    for rotations in grouped([r | {"base": r["index"] % FULL_TURN} for r in records],
                             "base").values():
        right = [option_letter(r["answer"], r["options"]) == r["expected"] for r in rotations]
        groups.append(rotations[0] | {"right": all(right)})
    table = {"circular": percent(group["right"] for group in groups)}
    first = [r for r in records if r["index"] < FULL_TURN]
    if first:
        table["vanilla"] = percent(option_letter(r["answer"], r["options"]) == r["expected"]
                                   for r in first)
    for field in ("l2-category", "category"):
        for name, part in sorted(grouped(groups, field).items()):
            if name:
                table[name] = percent(group["right"] for group in part)
    return table


# ---------------------------------------------------------------------------------- MMMU

TAIL = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = tuple(map(re.compile, (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # plain
)))


def choice_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer names by `(X)`, ` X ` or its text, the last of several, or None."""
    for character in ",.!?;:'":
        answer = answer.strip(character)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: answer.rfind(form.format(letter)) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=places.get)
    if len(answer.split()) <= 5:
        return None
    places = {letter: answer.lower().rfind(text.lower()) for letter, text in options.items()}
    return max(places, key=places.get) if max(places.values()) >= 0 else None


def key_parts(answer: str) -> list[str]:
    """The parts of an open answer that may hold the result: shortest tails after such as "is"."""
    answer = answer.strip().strip(".").lower()
    pieces = answer.split("\n")
    parts = []
    for number, piece in enumerate(pieces, 1):
        shortest = ""
        for mark in (*TAIL, "=") if number == len(pieces) else TAIL:
            tail = piece.split(mark)[-1].strip() if mark in piece else None
            if tail is not None and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest not in ("", ":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [answer]


def normalised(text: str) -> list[str | float]:
    """A number as a float of two places; a single character with a space at either side; lower."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_right(answer: str, expected: list[str]) -> bool:
    """Whether an open answer holds an expected text, or equals an expected number."""
    parts = key_parts(answer)
    numbers = [number for part in parts for pattern in NUMBERS for number in pattern.findall(part)]
    said = [value for text in (*parts, *numbers) for value in normalised(text)]
    wanted = [value for text in expected for value in normalised(text)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in wanted
               for value in said)


def score_mmmu(records: list[Record]) -> Table:
    """All, by discipline and by subject; an unresolved choice is drawn, seeded by the question."""
    drawn, judged = 0, []
    for record in records:
        options, expected = record["options"], record["expected"]
        if options is None:
            right = open_right(record["answer"], expected)
        else:
            letter = choice_letter(record["answer"], options)
            drawn += letter is None
            letter = letter or random.Random(record["key"]).choice(list(options))
            right = [letter] == expected
        judged.append(record | {"right": right})
    table = {"all": percent(r["right"] for r in judged) | {"drawn": drawn}}
    for field in ("discipline", "subject"):
        for name, part in sorted(grouped(judged, field).items()):
            table[name] = percent(r["right"] for r in part)
    return table


# ---------------------------------------------------------------------------------- RefCOCO


def official_box(piece: str, width: int, height: int) -> Box:
    """A Python list of numbers, in fractions of the padded square, as a box in pixels.

    Raises whatever a malformed piece raises. (The official scorer calls eval; this reads literals.)
    """
    x1, y1, x2, y2 = ast.literal_eval(piece)[:4]
    side, left, top = padded_square(width, height)
    return x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top


def box_verdict(record: Record) -> dict[str, bool]:
    """any: one of the answer's boxes reaches IoU 0.5, none before it is malformed (the official
    rule); first: the first one does; lenient: the first box found anywhere in the text does;
    malformed: reading stopped at a piece that is no box.
    """
    size, truth = (record["width"], record["height"]), record["box"]
    verdict = {"any": False, "first": False, "malformed": False}
    for place, piece in enumerate(record["answer"].split("; ")):
        try:
            hit = iou(official_box(piece, *size), truth) >= 0.5
        except (ValueError, TypeError, LookupError, SyntaxError, ArithmeticError, MemoryError,
                RecursionError):
            verdict["malformed"] = True
            break
        if hit:
            verdict |= {"any": True, "first": place == 0}
            break
    found = text_to_boxes(record["answer"], *size)
    return verdict | {"lenient": bool(found) and iou(found[0], truth) >= 0.5}


def score_refcoco(records: list[Record]) -> Table:
    """For each split: precision at IoU 0.5 by three rules, and malformed answers in percent."""
    table = {}
    for (name, split), asked in grouped(records, "set", "split").items():
        verdicts = [box_verdict(record) for record in asked]
        rules = {rule: percent(v[rule] for v in verdicts)["score"] for rule in verdicts[0]}
        score = {"score": rules.pop("any")}  # the official figure
        table[f"{name} {split}"] = score | rules | {"asked": len(asked)}
    return table


# ---------------------------------------------------------------------------------- easy-VQA


def answer_kind(answer: str) -> str:
    """The table's row for an expected answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("rectangle", "circle", "triangle") else "colour"


def score_easy_vqa(records: list[Record]) -> Table:
    """Answers that are the expected word, by kind, beside the commonest training answer's share;
    boxes, where some were asked for, by the first one's IoU with the measured one.
    """
    words = [record for record in records if "box" not in record]
    kinds = {kind: [] for kind in ("colour", "shape", "yes/no")}
    for record in words:
        kinds[answer_kind(record["expected"])].append(record)
    table = {}
    for kind, asked in (kinds | {"all": words}).items():
        if asked:
            guess = percent(r["commonest"] == r["expected"] for r in asked)["score"]
            right = percent(r["answer"] == r["expected"] for r in asked)
            table[kind] = {"score": right["score"], "commonest answer": guess, "asked": len(asked)}
    boxes = [box_verdict(record)["lenient"] for record in records if "box" in record]
    return table | ({"grounding, IoU 0.5": percent(boxes)} if boxes else {})
