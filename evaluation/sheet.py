"""One picture of what a trained model does: held-out pictures of the demo with its answers.

A right answer is green. A wrong one is red, and the right one stands below it. The model's box is
blue, the right box is dashed.
"""

import random
import textwrap
from pathlib import Path

from clip import open_image
from common.files import new_file
from data import GROUNDING_PROMPT, text_to_boxes
from evaluation.answers import Question, Record
from evaluation.easy_vqa import answer_kind, is_right

COLUMNS = 4
WANTED = {"colour": 2, "shape": 2, "yes/no": 4, "box": 4}  # questions of each kind
RED, GREEN, BLUE = "#d0021b", "#0a8f3c", "#1f5fff"


def choose(questions: list[Question]) -> list[Question]:
    """Questions of each kind as WANTED, no picture twice, no question asked twice; or fewer."""
    shuffled, chosen, used = list(questions), [], set()
    random.Random(0).shuffle(shuffled)
    for kind, number in WANTED.items():
        for question in shuffled:
            wanted = number and answer_kind(question.facts["expected"]) == kind
            if wanted and not used & {question.image, question.text}:
                chosen.append(question)
                used |= {question.image, question.text}
                number -= 1
    return chosen


def draw(records: list[Record], path: Path) -> None:
    """Write the sheet, a tile a record, as a whole or not at all."""
    from matplotlib import rcParams  # here: no other command needs it
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a $ in an answer is a $
    rows = -(-len(records) // COLUMNS)
    figure = Figure(figsize=(11, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis, record in zip(axes, records, strict=False):
        draw_tile(axis, record)
    for axis in axes[len(records) :]:
        axis.remove()
    with new_file(path) as new:
        figure.savefig(new, dpi=100)


def draw_tile(axis, record: Record) -> None:
    """A picture with its boxes; the question above it, the answer below."""
    picture, right = open_image(record["image"]), is_right(record)
    question = record["prompt"].replace(GROUNDING_PROMPT.format(""), "find: ")
    answer = textwrap.shorten(record["answer"], 30, placeholder=" ...") or "(no answer)"
    axis.imshow(picture, interpolation="bicubic")
    axis.set(xticks=[], yticks=[])
    axis.set_title(textwrap.fill(question, 32), loc="left", fontsize=11)
    axis.set_xlabel(answer if right else f"{answer}\nright: {record['expected']}", loc="left",
                    fontsize=12, color=GREEN if right else RED)
    if "box" in record:
        said = [(box, BLUE, "-") for box in text_to_boxes(record["answer"], *picture.size)[:1]]
        for (x1, y1, x2, y2), colour, style in (*said, (record["box"], GREEN, "--")):
            xs, ys = (x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1)
            # A pixel's centre, not its corner, has whole coordinates here.
            axis.plot([x - 0.5 for x in xs], [y - 0.5 for y in ys], style, color=colour, lw=2)
