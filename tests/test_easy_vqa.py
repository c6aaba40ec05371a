"""easy-VQA on drawn pictures: colour, shape, box as drawn; valid rows; same bytes twice."""

import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw

from data import check_row
from prepare_data.easy_vqa import COLOURS, easy_vqa, explain, is_right

DRAWN = {  # number -> colour, shape, box with exclusive ends
    0: ("blue", "rectangle", [10, 20, 41, 31]),
    1: ("yellow", "circle", [3, 30, 34, 61]),
    2: ("brown", "triangle", [30, 10, 61, 41]),
}


def draw(colour: str, shape: str, box: list[int]) -> Image.Image:
    """A shape on a pale ground, its edges as sharp as Pillow makes them."""
    image = Image.new("RGB", (64, 64), (240, 250, 245))
    pen, (x1, y1, x2, y2) = ImageDraw.Draw(image), (*box[:2], box[2] - 1, box[3] - 1)
    if shape == "triangle":
        pen.polygon([(x1, y2), (x2, y2), ((x1 + x2) // 2, y1)], fill=COLOURS[colour])
    else:
        drawing = pen.rectangle if shape == "rectangle" else pen.ellipse
        drawing((x1, y1, x2, y2), fill=COLOURS[colour])
    return image


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package easy_vqa: three pictures, both splits alike."""
    paths = {number: str(tmp_path / f"{number}.png") for number in DRAWN}
    for number, path in paths.items():
        draw(*DRAWN[number]).save(path)
    asked = [("what color is the shape?", "blue", 0), ("is there a circle?", "no", 0),
             ("what shape is it?", "circle", 1), ("is there no triangle?", "no", 2)]
    questions = tuple(zip(*asked, strict=True))
    fake = SimpleNamespace(
        get_train_questions=lambda: questions, get_test_questions=lambda: questions,
        get_train_image_paths=lambda: paths, get_test_image_paths=lambda: paths)
    monkeypatch.setitem(sys.modules, "easy_vqa", fake)
    return fake


def test_rows_are_valid_and_the_same_twice(package, tmp_path):
    """Every row passes the check that training makes; a second run writes the same bytes."""
    report = easy_vqa(tmp_path / "a")
    easy_vqa(tmp_path / "b")
    assert report["train: questions written"] == report["test: boxes written"] == 3
    rows = {}
    for path in (tmp_path / "a").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        rows[path.stem] = [check_row(json.loads(line)) for line in path.read_text().splitlines()]
        assert all((tmp_path / "a" / row["image"]).is_file() for row in rows[path.stem])
    box, row = "[0.16, 0.31, 0.64, 0.48]", rows["train-boxes"][0]
    assert row["boxes"] == [[10, 20, 41, 31]] and row["conversations"][1]["value"] == box
    assert row["conversations"][0]["value"].endswith("this sentence describes: blue rectangle")
    caption = rows["train-captions"][0]["conversations"][1]["value"]
    assert caption == f"A blue rectangle at {box}."
    row = rows["train-questions"][0]
    assert len(row["conversations"]) == 4 and row["independent"]
    for number, (colour, shape, place) in DRAWN.items():
        assert rows["test-boxes"][number]["boxes"] == [place]
        assert f": {colour} {shape}" in rows["test-boxes"][number]["conversations"][0]["value"]


def test_small_shapes_are_trained_on_twice(package, tmp_path):
    """Below a 16th of the picture, in captions and boxes; questions and held-out rows stay."""
    for number, side in ((1, 15), (2, 16)):
        shape = draw(*DRAWN[number][:2], [5, 5, 5 + side, 5 + side])
        shape.save(package.get_train_image_paths()[number])
    report = easy_vqa(tmp_path / "out")
    assert {name: count for name, count in report.items() if count == 4} == {
        "train: captions written": 4, "train: boxes written": 4}
    boxes = (tmp_path / "out/train-boxes.jsonl").read_text().splitlines()
    assert boxes[1] == boxes[2] and '"id": "easy-vqa/train/boxes/1"' in boxes[1]


@pytest.mark.parametrize(("question", "answer", "right", "taught"), [
    ("what is the red shape?", "circle", True, "circle"),
    ("what color is the circle?", "blue", False, "blue"),
    ("is there a red shape?", "yes", True, "It is red, so yes."),
    ("is there not a red shape?", "no", True, "It is red, so no."),
    ("is no blue shape present?", "yes", True, "It is red, so yes."),
    ("does the image contain a triangle?", "no", True, "It is a circle, so no."),
    ("is a circle present?", "no", False, "It is a circle, so no.")])
def test_answers_say_what_is_there(question, answer, right, taught):
    """Of a red circle: whether the data set's answer is right, and the answer that is taught."""
    assert is_right(question, answer, "red", "circle") is right
    assert explain(question, answer, "red", "circle") == taught


def test_answers_settle_the_shape(package, tmp_path):
    """A shape that fills its box is a circle where an answer says that it is no rectangle."""
    asked = [("is a rectangle present?", "no", 0), ("is no circle present?", "no", 0),
             ("what is it?", "circle", 1), ("what is it?", "triangle", 2)]
    package.get_train_questions = lambda: tuple(zip(*asked, strict=True))
    easy_vqa(tmp_path / "out")
    first = json.loads((tmp_path / "out/train-captions.jsonl").read_text().splitlines()[0])
    assert first["conversations"][1]["value"] == "A blue circle at [0.16, 0.31, 0.64, 0.48]."


def test_most_training_pictures_have_no_negated_question(package, tmp_path):
    """Picture 2 has its negated question in the held-out rows; in training it has the other."""
    asked = [("what is it?", shape, number) for number, (_, shape, _) in DRAWN.items()]
    asked += [("is there not a triangle?", "no", 2)]
    package.get_train_questions = package.get_test_questions = lambda: tuple(
        zip(*asked, strict=True))
    easy_vqa(tmp_path / "out")
    last = {split: (tmp_path / f"out/{split}-questions.jsonl").read_text().splitlines()[2]
            for split in ("train", "test")}
    assert [turn["value"] for turn in json.loads(last["train"])["conversations"]] == [
        "<image>\nwhat is it?", "triangle"]
    assert len(json.loads(last["test"])["conversations"]) == 4
