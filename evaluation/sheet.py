"""One picture of what a trained model does: held-out pictures of the demo with its answers.

Right answers are green. Below a wrong one stands the right one in red. The model's boxes are blue,
the right boxes are dashed.
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
QUESTION_PX, ANSWER_PX, LINE_PX, DASH = 17, 20, 26, 8
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
    picture = open_image(question.image)
    scale, text = SIDE / max(picture.size), question.text
    tile = picture.resize([round(edge * scale) for edge in picture.size],
                          Image.Resampling.LANCZOS)
    if "box" in record:
        text = f"find: {text.rpartition(': ')[2]}"
        draw_dashed(ImageDraw.Draw(tile), [round(v * scale) for v in record["box"]])
        for box in text_to_boxes(record["answer"], *picture.size)[:1]:
            ImageDraw.Draw(tile).rectangle([v * scale for v in box], outline=BLUE, width=3)
    sheet.paste(tile, corner)
    pen, (left, y) = ImageDraw.Draw(sheet), corner
    pen.rectangle((left - 1, y - 1, left + tile.width, y + tile.height), outline="#cccccc")
    small, large = (ImageFont.load_default(px) for px in (QUESTION_PX, ANSWER_PX))
    right = is_right(record)
    lines = [(line, GREY, small) for line in wrap(text, small, 2)]
    lines.append((wrap(record["answer"] or "(no answer)", large, 1)[0], GREEN if right else INK,
                  large))
    if not right:
        expected = "the dashed box" if "box" in record else record["expected"]
        lines.append((f"right: {expected}", RED, large))
    for number, (line, colour, font) in enumerate(lines):
        pen.text((left, y + SIDE + 8 + number * LINE_PX), line, colour, font)


def draw_dashed(pen: ImageDraw.ImageDraw, box: list[int]) -> None:
    """A rectangle x1, y1, x2, y2 of dashes, its lines within it."""
    x1, y1, x2, y2 = box
    for start in range(0, max(x2 - x1, y2 - y1), 2 * DASH):
        across, down = (range(a + start, min(a + start + DASH, b)) for a, b in ((x1, x2), (y1, y2)))
        for side in (y1 + 1, y2 - 2):
            pen.line([(x, side) for x in across], GREEN, 3)
        for side in (x1 + 1, x2 - 2):
            pen.line([(side, y) for y in down], GREEN, 3)


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
