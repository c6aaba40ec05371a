"""benchmarks.py: small files of the published layouts, dirty rows and damaged files included."""

import base64
import io
import json
import zipfile

import pytest
from PIL import Image

from evaluation.benchmarks import BENCHMARKS
from data import GROUNDING_PROMPT
from evaluation.mmbench import mmbench_submission, score_or_count
from evaluation.scoring import COGNITION, PERCEPTION

SUFFIX = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def picture(colour="red"):
    """A JPEG's bytes."""
    file = io.BytesIO()
    Image.new("RGB", (40, 20), colour).save(file, "JPEG")
    return file.getvalue()


def read(name, data, images=None):
    """By the benchmark's own reader."""
    return BENCHMARKS[name].read(data, images)


# ------------------------------------------------------------------------------ MME


@pytest.fixture
def mme(tmp_path):
    """Two layouts, as published: with folders of pictures and texts, and all in one."""
    root = tmp_path / "MME" / "MME_Benchmark_release_version"
    for subtask in (*PERCEPTION, *COGNITION):
        folder = root / subtask
        nested = subtask in ("artwork", "posters")
        texts = folder / "questions_answers_YN" if nested else folder
        pictures = folder / "images" if nested else folder
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        (pictures / "0001.jpg").write_bytes(picture())
        (texts / "0001.txt").write_text(
            "Is it a café?  Please answer yes or no.\tYes\r\n"
            "Is it a hat? Please answer yes or no.\tNo\n\n", encoding="utf-8")
    return tmp_path / "MME"


def test_mme(mme):
    """14 subtasks; the prompt of the official file, which leaves one of two spaces."""
    questions = read("mme", mme)
    assert len(questions) == 28 and len({q.key for q in questions}) == 28
    first, second = (q for q in questions if q.facts["subtask"] == "artwork")
    assert (first.text, second.text) == ("Is it a café? " + SUFFIX, "Is it a hat?" + SUFFIX)
    assert first.image.parent.name == "images" and first.image.is_file()
    assert first.facts == {"subtask": "artwork", "picture": "0001", "expected": "Yes"}


@pytest.mark.parametrize("damage, message", [
    (lambda root: (root / "count/0001.jpg").unlink(), "count: picture or text of 0001 is missing"),
    (lambda root: (root / "count/0001.txt").write_text("Is it?\tYes\n"), "0001.txt: not two lines"),
    (lambda root: (root / "count/0001.txt").write_text("a\tyes\nb\tno\n"), "Yes or No"),
    (lambda root: (root / "count/0001.txt").write_bytes(b"\xff\tYes\nb\tNo\n"), "not UTF-8"),
    (lambda root: (root / "OCR").rename(root / "ocr_"), "no OCR"),
])
def test_mme_damaged(mme, damage, message):
    """Half a download, another folder, swapped columns: one line each."""
    damage(mme / "MME_Benchmark_release_version")
    with pytest.raises(ValueError, match=message) as error:
        read("mme", mme)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ MMBench

HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
        "l2-category", "comment", "split"]


def mmbench_file(path, rows, head=HEAD):
    """A TSV as published: quoted where needed."""
    lines = ["\t".join(head)]
    for row in rows:
        cells = (str(row.get(name, "")) for name in head)
        lines.append("\t".join(f'"{c}"' if "\n" in c else c for c in cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows():
    """A question, its rotation whose picture is a pointer, one with a hint and `None` to choose."""
    encoded = base64.b64encode(picture()).decode()
    common = {"category": "c", "l2-category": "l", "split": "dev"}
    return [
        {"index": 3, "question": "What?", "A": "kettle", "B": "hat", "answer": "A",
         "image": encoded, **common},
        {"index": 1_000_003, "question": "What?", "A": "hat", "B": "kettle", "answer": "B",
         "image": "3", **common},
        {"index": 4, "question": "Two\nlines?", "hint": "Look.", "A": "1", "B": "None",
         "C": "nan", "answer": "C", "image": base64.b64encode(picture("blue")).decode(), **common},
    ]


def test_mmbench(tmp_path, rows):
    """Prompts by hand; rotations share their picture; options end at the first empty cell."""
    path = mmbench_file(tmp_path / "dev.tsv", rows)
    first, turned, hinted = read("mmbench-en", path)
    assert first.text == "What?\nA. kettle\nB. hat" + LETTER
    assert turned.image == first.image == picture() and turned.facts["expected"] == "B"
    assert hinted.text == "Look.\nTwo\nlines?\nA. 1\nB. None\nC. nan" + LETTER
    assert hinted.facts["l2-category"] == "l"
    assert read("mmbench-cn", path)[0].text.endswith("B. hat\n请直接回答选项字母。")
    said = [q.facts | {"key": q.key, "answer": a} for q, a in zip(read("mmbench-en", path), "AAC",
                                                                  strict=True)]
    assert score_or_count(said)["circular"] == {"score": 50.0, "asked": 2}


def test_mmbench_test_split_becomes_a_submission(tmp_path, rows):
    """No answers: nothing is scored, and the workbook holds each rotation's answer in column 7."""
    for row in rows:
        del row["answer"]
    questions = read("mmbench-en", mmbench_file(tmp_path / "test.tsv", rows,
                                                [name for name in HEAD if name != "answer"]))
    said = [q.facts | {"key": q.key, "answer": "A & <b>\x07"} for q in questions]
    (row,) = score_or_count(said).values()
    assert row == {"asked": 2}
    assert str(tmp_path) in mmbench_submission(said, tmp_path)
    with zipfile.ZipFile(tmp_path / "submission.xlsx") as file:
        sheet = file.read("xl/sheet.xml").decode()
    lines = sheet.split("<row>")[1:]
    assert [line.count("<c") for line in lines] == [8] * 4
    assert lines[0].split("</c>")[6].endswith("prediction</t></is>")
    assert "<v>1000003</v>" in lines[3] and "A &amp; &lt;b&gt;</t>" in lines[3]


@pytest.mark.parametrize("damage, message", [
    (lambda text: text.replace("question", "quest", 1), "column 'question' is missing"),
    (lambda text: text[:-60], "cells missing"),
    (lambda text: text.replace("1000003\t", "x\t"), "invalid literal"),
    (lambda text: text.replace("\t3\t", "\t99\t"), "row 1000003: its picture"),
    (lambda text: text.replace("/9j/", "/9!/", 1), "row 3: its picture"),
    (lambda text: "", "is missing"),
])
def test_mmbench_damaged(tmp_path, rows, damage, message):
    """One line that names file and row."""
    path = mmbench_file(tmp_path / "dev.tsv", rows)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message) as error:
        read("mmbench-en", path)
    assert "dev.tsv" in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------ MMMU


def mmmu_rows():
    """A choice with a picture among its options, an open question, one with a list of answers."""
    common = {"explanation": "", "img_type": "['Photographs']", "topic_difficulty": "Easy",
              "subfield": "Tools", "image_1": {"bytes": picture(), "path": "1.png"}}
    return [
        {"id": "validation_Art_Theory_1", "question": "What does <image 1> show?",
         "options": "['a kettle', \"it's\", '<image 2>']", "answer": "B",
         "question_type": "multiple-choice", **common},
        {"id": "validation_Math_2", "question": "How many?", "options": "[]", "answer": "12",
         "question_type": "open", **common},
        {"id": "validation_Math_15", "question": "Which?", "options": "[]",
         "answer": "['1/2', '0.5']", "question_type": "open", **common},
    ]


def write_parquet(path, table):
    """With pyarrow, which requirements-eval.txt brings."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(table), path)


def test_mmmu(tmp_path):
    """Prompts by hand, from files by subject; only the validation split; one picture."""
    write_parquet(tmp_path / "Art_Theory/validation-00000-of-00001.parquet", mmmu_rows()[:1])
    write_parquet(tmp_path / "Math/validation-00000-of-00001.parquet", mmmu_rows()[1:])
    write_parquet(tmp_path / "Math/dev-00000-of-00001.parquet", mmmu_rows()[1:])
    choice, number, several = read("mmmu", tmp_path)
    assert choice.text == ("What does <image 1> show?\n\n(A) a kettle\n(B) it's\n(C) <image 2>\n"
                           "\n\nAnswer with the option's letter from the given choices directly.")
    assert number.text == "How many?\n" + SUFFIX and choice.image == picture()
    assert choice.facts["options"] == {"A": "a kettle", "B": "it's", "C": "<image 2>"}
    assert (choice.facts["subject"], choice.facts["discipline"]) == ("Art_Theory", "Art & Design")
    assert several.facts["expected"] == ["1/2", "0.5"] and several.facts["options"] is None


@pytest.mark.parametrize("change, message", [
    ({"options": "__import__('os').getcwd()"}, "malformed"), ({"image_1": None}, "no picture"),
    ({"answer": "D"}, "3 options, of which the answer is 'D'"), ({"options": "['a'"}, "never clos"),
    ({"options": "-" * 100_000 + "1"}, "validation-1.parquet: "),
])
def test_mmmu_damaged(tmp_path, change, message):
    """Nothing is executed; one line names the file."""
    path = tmp_path / "validation-1.parquet"
    write_parquet(path, [mmmu_rows()[0] | change])
    with pytest.raises(ValueError, match=message) as error:
        read("mmmu", path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_mmmu_not_parquet(tmp_path):
    """Half a file, other columns, an empty folder."""
    path = tmp_path / "validation-1.parquet"
    write_parquet(path, [{"id": "x", "question": "y"}])
    with pytest.raises(ValueError, match="no column"):
        read("mmmu", path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="validation-1.parquet: "):
        read("mmmu", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no validation"):
        read("mmmu", tmp_path / "empty")


# ------------------------------------------------------------------------------ RefCOCO

OFFICIAL = {"sent_id": 34, "img_path": "a.jpg", "expression": "left mug",
            "bbox": [10.0, 5.0, 30.0, 15.0], "width": 40, "height": 20}
OURS = {"id": "refcocog/test/ref1/sent2", "image": "a.jpg", "workflow": "grounding",
        "source": "refcocog", "split": "test", "width": 40, "height": 20, "boxes": [[0, 0, 9, 9]],
        "conversations": [
            {"from": "human", "value": "<image>\n" + GROUNDING_PROMPT.format("mug") + "."},
            {"from": "gpt", "value": "[0.0, 0.25, 0.22, 0.48]"}]}


@pytest.fixture
def expressions(tmp_path):
    """A folder with a file of either form, and the pictures' root."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture())
    for name, row in (("REC_refcoco+_unc_testA", OFFICIAL), ("mine", OURS)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n\n")
    return tmp_path


def test_refcoco(expressions):
    """Set and split from the file's name or the row; the prompt without a final full stop."""
    official, ours = read("refcoco", expressions, expressions / "images")
    assert official.key == "refcoco+/testA/34" and official.workflow == "grounding"
    assert official.text == GROUNDING_PROMPT.format("left mug")
    assert ours.text == GROUNDING_PROMPT.format("mug") and ours.key == OURS["id"]
    (expressions / "mine.jsonl").unlink()
    path, = expressions.glob("*.jsonl")
    path.write_text("\n" + json.dumps({k: v for k, v in OFFICIAL.items() if k != "sent_id"}))
    unnumbered, = read("refcoco", path, expressions / "images")
    assert unnumbered.key == "refcoco+/testA/2"  # by its line
    assert ours.facts == {"set": "refcocog", "split": "test", "box": [0, 0, 9, 9], "width": 40,
                          "height": 20}


@pytest.mark.parametrize("change, message", [
    ({"bbox": [30, 5, 10, 15]}, "is not x1, y1, x2, y2 in pixels of 40 x 20"),  # x, y, w, h
    ({"bbox": [0.1, 0.2, 0.3, 0.4]}, "in pixels"), ({"bbox": [1, 2, 3]}, "unpack"),
    ({"bbox": [10, 5, 90, 15]}, "in pixels"), ({"img_path": "../a.jpg"}, "is not below"),
    ({"img_path": "/etc/passwd"}, "is not below"), ({"img_path": "b.jpg"}, "does not exist"),
    ({"width": None}, "line|:1: "),
])
def test_refcoco_damaged(expressions, change, message):
    """File and line are named; nothing outside of the root is read."""
    path = expressions / "REC_refcoco+_unc_testA.jsonl"
    path.write_text(json.dumps(OFFICIAL | change) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read("refcoco", path, expressions / "images")
    assert f"{path.name}:1: " in str(error.value) and "\n" not in str(error.value)


def test_refcoco_needs_its_pictures_and_whole_lines(expressions):
    """No root, a missing field, a line cut off, an empty folder."""
    with pytest.raises(ValueError, match="--images"):
        read("refcoco", expressions)
    path = expressions / "mine.jsonl"
    path.write_text(json.dumps({k: v for k, v in OURS.items() if k != "boxes"}))
    with pytest.raises(ValueError, match="mine.jsonl:1: 'boxes' is missing"):
        read("refcoco", path, expressions)
    path.write_text(json.dumps(OURS)[:-9])
    with pytest.raises(ValueError, match="mine.jsonl:1: "):
        read("refcoco", path, expressions)
    with pytest.raises(ValueError, match="no .*jsonl"):
        read("refcoco", expressions / "images", expressions)


# ------------------------------------------------------------------------------ easy-VQA


def test_easy_vqa(tmp_path):
    """Questions with the commonest training answer of their kind, and boxes."""
    def row(number, turns, **extra):
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        said[0]["value"] = "<image>\n" + said[0]["value"]
        return {"id": f"x/{number}", "image": "a.png", "workflow": "mm", "conversations": said,
                **extra}

    (tmp_path / "a.png").write_bytes(picture())
    files = {
        "test-questions": [row(1, ["q1", "red", "q2", "yes"]), row(2, ["q3", "circle"])],
        "train-questions": [row(3, ["q", "blue", "q", "no", "q", "circle"]), row(4, ["q", "no"])],
        "test-boxes": [row(5, ["where?", "x"], width=40, height=20, boxes=[[10, 0, 30, 20]])],
    }
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    red, yes, circle, box = read("easy-vqa", tmp_path)
    assert (red.key, red.text, red.workflow) == ("x/1/1", "q1", "mm")
    assert [q.facts["commonest"] for q in (red, yes, circle)] == ["blue", "no", "circle"]
    assert box.workflow == "grounding" and box.facts["box"] == [10, 0, 30, 20]
