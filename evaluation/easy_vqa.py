"""easy-VQA, the demo's data: held-out questions and boxes, as `prepare_data easy-vqa` writes them.

A question is right where the answer's last word is the expected one: the data set's own answer to
"It is red, so no." is "no". A box is right where the first box of the answer overlaps the measured
one with an IoU of 0.5 or more.

`choose` and `draw` make a sheet, one picture of what a model does. A right answer is green there. A
wrong one is red, with the right one below it. The model's box is blue, the right box is green.
"""

import random
import textwrap
from collections import Counter
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

from clip import open_image
from data import GROUNDING_PROMPT, check_row, iou, path_below, text_to_boxes
from evaluation.answers import Record, Table, read_lines
from tokenization.templates import without_tags

BOXES = "boxes, IoU 0.5"
SHEET = {"colour": 2, "shape": 2, "yes/no": 4, BOXES: 4}  # how many of each kind, in rows of 4
KINDS = {"yes": "yes/no", "no": "yes/no", "rectangle": "shape", "circle": "shape",
         "triangle": "shape"}  # last word of an answer -> kind of its question
TILE = (256, 324)  # width and height in pixels
RED, GREEN, BLUE = "#d0021b", "#0a8f3c", "#1f5fff"


def last_word(answer: str) -> str:
    """The last word of an answer, without its full stop; "" where there is none."""
    return (answer.rstrip(".").split() or [""])[-1]


def answer_kind(answer: str) -> str:
    """The kind of question that has this answer: a key of SHEET."""
    return BOXES if answer.startswith("[") else KINDS.get(last_word(answer), "colour")


def pairs(row: dict) -> list[tuple[str, str]]:
    """The questions and answers of a row. RowError where it is no row."""
    texts = [without_tags(turn["value"]).strip() for turn in check_row(row)["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def read(data: Path, images: Path | None = None) -> list[Record]:
    """The held-out questions and boxes, each with the commonest training answer to its kind."""
    counts = Counter(read_lines(data / "train-questions.jsonl",
                                lambda row, _: [last_word(answer) for _, answer in pairs(row)]))
    # Rare ones come first here: of each kind the commonest is what stays.
    commonest = {answer_kind(answer): answer for answer, _ in reversed(counts.most_common())}

    def make(row: dict, _) -> list[Record]:
        facts = {"workflow": "mm", "max_tokens": 12, "image": path_below(data, row["image"])}
        if "boxes" in row:
            facts |= {"workflow": "grounding", "max_tokens": 48, "box": row["boxes"][0],
                      "width": row["width"], "height": row["height"]}
        return [facts | {"key": f"{row['id']}/{place}", "prompt": text, "expected": answer,
                         "commonest": commonest.get(answer_kind(answer), "")}
                for place, (text, answer) in enumerate(pairs(row), 1)]

    return [question for name in ("questions", "boxes")
            for question in read_lines(data / f"test-{name}.jsonl", make)]


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
    table = {"asked": {}, "commonest answer, %": {}, "right, %": {}}
    for column in ("colour", "shape", "yes/no", "all", BOXES):
        group = [r for r in records if column == answer_kind(r["expected"])
                 or column == "all" and "box" not in r]
        if group:
            table["asked"][column] = len(group)
            table["right, %"][column] = 100 * fmean(map(is_right, group))
        if group and column != BOXES:
            table["commonest answer, %"][column] = 100 * fmean(
                r["commonest"] == last_word(r["expected"]) for r in group)
    return table


def choose(questions: list[Record]) -> list[Record]:
    """Questions of each kind as SHEET says, at random but always the same, none of them twice."""
    shuffled, chosen = random.Random(0).sample(questions, len(questions)), []
    for kind, number in SHEET.items():
        different = {q["prompt"]: q for q in shuffled if answer_kind(q["expected"]) == kind}
        chosen += [*different.values()][:number]
    return chosen


def draw(records: list[Record]) -> Image.Image:
    """The sheet: a tile a record, four in a row."""
    sheet = Image.new("RGB", (4 * TILE[0], -(-len(records) // 4) * TILE[1]), "white")
    for n, record in enumerate(records):
        sheet.paste(draw_tile(record), (n % 4 * TILE[0], n // 4 * TILE[1]))
    return sheet


def draw_tile(record: Record) -> Image.Image:
    """A picture with its boxes; the question above it, the answer below."""
    tile, picture = Image.new("RGB", TILE, "white"), open_image(record["image"])
    pen, font, scale = ImageDraw.Draw(tile), ImageFont.load_default(15), 224 / max(picture.size)
    size = [round(scale * side) for side in picture.size]
    tile.paste(picture.resize(size, Image.Resampling.BICUBIC), (16, 48))
    if "box" in record:
        said = text_to_boxes(record["answer"], *picture.size)[:1]
        for box, colour in ((record["box"], GREEN), *((box, BLUE) for box in said)):
            x1, y1, x2, y2 = (round(scale * value) for value in box)
            end = max(16 + x1, 15 + x2), max(48 + y1, 47 + y2)  # Pillow draws the last pixel too
            pen.rectangle((16 + x1, 48 + y1, *end), outline=colour, width=3)
    question = record["prompt"].replace(GROUNDING_PROMPT.format(""), "find: ")
    answer = textwrap.shorten(record["answer"], 30, placeholder=" ...") or "(no answer)"
    right = is_right(record)
    pen.text((16, 4), textwrap.fill(question, 32), "black", font)
    pen.text((16, 276), answer if right else f"{answer}\nright: {record['expected']}",
             GREEN if right else RED, font)
    return tile
