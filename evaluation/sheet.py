"""One picture of what a trained model does: held-out pictures of the demo with its answers.

The model's boxes are drawn in blue, the right ones in dashed green. Where an answer is wrong, the
right one stands below it in red.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clip import open_image
from common.files import new_file
from data import text_to_boxes
from evaluation.answers import Question, Record
from evaluation.easy_vqa import answer_kind, is_right

COLUMNS = 4
WANTED = {"colour": 2, "shape": 2, "yes/no": 4, "box": 4}  # questions of each kind
SIDE, MARGIN, LINES = 256, 24, 4  # of a picture and around it, in pixels; lines of text below it
QUESTION_PX, ANSWER_PX, LINE_PX = 17, 20, 26
INK, GREY, RED, GREEN, BLUE = "#1a1a1a", "#666666", "#d0021b", "#0a8f3c", "#1f5fff"


def kind(question: Question) -> str:
    """A key of WANTED."""
    facts = question.facts
    return "box" if "box" in facts else answer_kind(facts["expected"])


def choose(questions: list[Question], seed: int) -> list[Question]:
    """Questions of each kind as WANTED, no picture twice, no question asked twice; or fewer."""
    shuffled, chosen, used = list(questions), [], set()
    random.Random(seed).shuffle(shuffled)
    for name, number in WANTED.items():
        for question in (q for q in shuffled if kind(q) == name):
            text = question.image if name == "box" else question.text
            if number and not used & {question.image, text}:
                chosen.append(question)
                used |= {question.image, text}
                number -= 1
    return chosen


def draw(questions: list[Question], records: list[Record]) -> Image.Image:
    """The sheet. records: of the questions, in any order."""
    by_key = {record["key"]: record for record in records}
    rows = -(-len(questions) // COLUMNS)
    wide, high = SIDE + MARGIN, SIDE + MARGIN + LINES * LINE_PX
    sheet = Image.new("RGB", (COLUMNS * wide + MARGIN, rows * high + MARGIN), "white")
    for place, question in enumerate(questions):
        corner = MARGIN + place % COLUMNS * wide, MARGIN + place // COLUMNS * high
        draw_tile(sheet, corner, question, by_key[question.key])
    return sheet


def draw_tile(
    sheet: Image.Image, corner: tuple[int, int], question: Question, record: Record
) -> None:
    """A picture, enlarged, its boxes, and below it the question and the answer."""
    picture, pen, (left, top) = open_image(question.image), ImageDraw.Draw(sheet), corner
    scale = SIDE / max(picture.size)
    size = round(picture.width * scale), round(picture.height * scale)
    sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), corner)
    pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline="#cccccc")
    answer, right, question_text = record["answer"], is_right(record), question.text
    if "box" in record:
        question_text = "Where is " + question.text.rpartition(": ")[2] + "?"
        draw_dashed(pen, [v * scale + corner[i % 2] for i, v in enumerate(record["box"])])
        for box in text_to_boxes(answer, *picture.size)[:1]:
            pen.rectangle([v * scale + corner[i % 2] for i, v in enumerate(box)], outline=BLUE,
                          width=3)
    small, large = (ImageFont.load_default(px) for px in (QUESTION_PX, ANSWER_PX))
    y = top + SIDE + 8
    for line in wrap(question_text, small, 2):
        pen.text((left, y), line, GREY, small)
        y += LINE_PX
    pen.text((left, y), wrap(answer or "(no answer)", large, 1)[0], INK, large)
    if not right:
        expected = "the box in dashes" if "box" in record else record["expected"]
        pen.text((left, y + LINE_PX), f"right: {expected}", RED, large)


def draw_dashed(pen: ImageDraw.ImageDraw, box: list[float], dash: int = 8) -> None:
    """A rectangle x1, y1, x2, y2 of dashes."""
    x1, y1, x2, y2 = (round(v) for v in box)
    for x in range(x1, x2, 2 * dash):
        for y in (y1, y2):
            pen.line((x, y, min(x + dash, x2), y), GREEN, 3)
    for y in range(y1, y2, 2 * dash):
        for x in (x1, x2):
            pen.line((x, y, x, min(y + dash, y2)), GREEN, 3)


def wrap(text: str, font: ImageFont.FreeTypeFont, lines: int) -> list[str]:
    """The text in at most so many lines of a picture's width; what does not fit ends in dots."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if font.getlength(longer) <= SIDE or not found[-1]:
            found[-1] = longer
        elif len(found) < lines:
            found.append(word)
        else:
            found[-1] += " ..."
            break
    return found


def write(path: Path, questions: list[Question], records: list[Record]) -> None:
    """Draw the sheet into a file, as a whole or not at all."""
    with new_file(path) as new:
        draw(questions, records).save(new)
