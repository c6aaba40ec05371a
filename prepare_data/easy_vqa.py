"""easy-VQA -> our JSONL: captions, questions and boxes of pictures of one coloured shape.

    captions    "A red circle at [0.41, 0.58, 0.89, 0.97]."
    questions   those of the data set, which do not see each other in their row; the answer to a
                yes/no question says first what is there: "It is red, so no."
    boxes       the official grounding prompt and the box

Source: easy-VQA (PyPI easy-vqa, MIT): 5,000 pictures of one shape, 48,248 questions, 13 answers.
The boxes are measured from the pixels: the published data have none.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from clip import open_image
from common.files import new_folder
from data import GROUNDING_PROMPT, boxes_to_text
from prepare_data.rows import make_row

COLOURS = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128),
    "green": (0, 255, 0), "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0),
}
FILL = {"rectangle": 1.0, "circle": np.pi / 4, "triangle": 0.5}  # share of its box that it covers
SMALL_PX = 256  # below this area, a 16th of the picture, boxes are hard: their rows come twice
NEGATIONS, YES_NO = {"no", "not"}, {"yes", "no"}


def measure_shape(image: Image.Image) -> tuple[str, float, list[int]]:
    """Colour, share of its box that the shape fills, box [x1, y1, x2, y2] in an RGB picture.

    The ends of the box are exclusive. The background is the commonest colour. The box holds all
    that is nearer to the shape's colour.
    """
    _, background = max(image.getcolors(image.width * image.height))
    pixels = np.asarray(image, int)  # (H, W, 3)
    paint = {name: np.abs(pixels - rgb).sum(-1) for name, rgb in COLOURS.items()}  # (H, W) each
    colour = max(paint, key=lambda name: (paint[name] <= 6).sum())
    inside = paint[colour] < np.abs(pixels - background).sum(-1)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    return colour, inside.sum() / ((box[2] - box[0]) * (box[3] - box[1])), box


def words(question: str) -> set[str]:
    """The words of a question."""
    return set(question.rstrip("?").split())


def is_right(question: str, answer: str, colour: str, shape: str) -> bool:
    """Whether the data set's answer is right for a picture of this shape in this colour."""
    if answer not in YES_NO:
        return answer in (colour, shape)
    there = bool(words(question) & {colour, shape})
    negated = bool(words(question) & NEGATIONS)
    return (answer == "yes") == (there != negated)


def explain(question: str, answer: str, colour: str, shape: str) -> str:
    """The answer that is taught: to a yes/no question, what is there comes first.

    Small models compare two words of a text sooner than a word with a picture.
    """
    if answer not in YES_NO:
        return answer
    seen = colour if words(question) & COLOURS.keys() else f"a {shape}"
    return f"It is {seen}, so {answer}."


def choose_to_teach(asked: list, number: int, colour: str, shape: str) -> list:
    """The questions of training picture `number`, so chosen that yes and no can be learnt.

    "Is there" and "is there not" have opposite answers. Where both are as frequent, the gradient of
    what the picture shows cancels, and a model stays with "no" to the one and "yes" to the other.
    So 3 of 5 pictures have no negated question. Questions about what is shown are rare:
    each comes twice, and at most three others stay.
    """
    if number % 5 > 1:
        asked = [pair for pair in asked if not words(pair[0]) & NEGATIONS] or asked
    open_questions = [pair for pair in asked if pair[1] not in YES_NO]
    yes_no = [pair for pair in asked if pair[1] in YES_NO]
    there = [pair for pair in yes_no if words(pair[0]) & {colour, shape}]
    absent = [pair for pair in yes_no if pair not in there]
    return open_questions + 2 * there + absent[:3]


def picture_rows(split: str, number: int, path: Path, asked: list) -> dict[str, dict]:
    """The rows about a picture by kind."""
    image = open_image(path)
    colour, fill, box = measure_shape(image)
    # The answers come before the measure: a small circle fills its box like a rectangle.
    shapes = [shape for shape in FILL if all(is_right(*pair, colour, shape) for pair in asked)]
    shape = min(shapes, key=lambda name: abs(FILL[name] - fill))
    if split == "train":
        asked = choose_to_teach(asked, number, colour, shape)
    asked = [(question, explain(question, answer, colour, shape)) for question, answer in asked]
    names, answer = [f"{split}/{number}.png"], boxes_to_text([box], *image.size)
    caption = ("Describe the picture.", f"A {colour} {shape} at {answer}.")
    grounding = (GROUNDING_PROMPT.format(f"{colour} {shape}"), answer)
    return {
        "captions": make_row("easy-vqa", split, f"captions/{number}", names, [caption]),
        "questions": make_row("easy-vqa", split, f"questions/{number}", names, asked,
                              independent=True),
        "boxes": make_row("easy-vqa", split, f"boxes/{number}", names, [grounding], "grounding",
                          width=image.width, height=image.height, boxes=[box]),
    }


def easy_vqa(out: Path) -> dict[str, int]:
    """Write `out/{train,test}-{captions,questions,boxes}.jsonl` and pictures; returns counts."""
    import easy_vqa as package

    counts = {}
    with new_folder(out) as new:
        for split, asked, images in (
            ("train", package.get_train_questions(), package.get_train_image_paths()),
            ("test", package.get_test_questions(), package.get_test_image_paths()),
        ):
            (new / split).mkdir()
            questions, lines = defaultdict(list), defaultdict(list)
            for question, answer, number in zip(*asked, strict=True):
                questions[number].append((question, answer))
            for number, path in sorted(images.items()):
                rows = picture_rows(split, number, path, questions[number])
                shutil.copyfile(path, new / split / f"{number}.png")
                (x1, y1, x2, y2), = rows["boxes"]["boxes"]
                often = 2 if split == "train" and (x2 - x1) * (y2 - y1) < SMALL_PX else 1
                for kind, row in rows.items():
                    lines[kind] += [json.dumps(row) + "\n"] * (1 if kind == "questions" else often)
            for kind, texts in lines.items():
                counts[f"{split}: {kind} written"] = len(texts)
                (new / f"{split}-{kind}.jsonl").write_text("".join(texts))
    return counts
