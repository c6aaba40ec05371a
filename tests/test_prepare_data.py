"""Each command of prepare_data on a small file of the published layout, dirty records included."""

import json
import pickle
import resource
import sys
from pathlib import Path

import pytest
from conftest import last_line, talk, write_rows
from PIL import Image

pytest.importorskip("ijson", reason="pip install -r requirements/data.txt")

from data import GROUNDING_PROMPT, ONE_WORD, check_row
from prepare_data import __main__ as command
from prepare_data.boxes import refer_list
from prepare_data.questions import ONE_LETTER
from prepare_data.rows import Counts, convert, make_row


def write(path: Path, value) -> Path:
    """A text, or JSON of anything else, in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file, each as training wants it."""
    return [check_row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs a command twice and returns (outcomes as printed, rows)."""

    def call(name: str, *args) -> tuple[dict[str, int], list[dict]]:
        args = sorted(args, key=lambda arg: not isinstance(arg, Path))
        contents = []
        for out in (tmp_path / "first.jsonl", tmp_path / "second.jsonl"):
            out.unlink(missing_ok=True)
            monkeypatch.setattr(sys, "argv", ["prepare_data", name, *map(str, [*args, out])])
            command.main()
            contents.append(out.read_bytes())
            printed = capsys.readouterr().out.splitlines()
        assert contents[0] == contents[1]
        counts = {outcome: int(count) for count, outcome in (line.split("  ") for line in printed)}
        return counts, read(out)

    return call


@pytest.fixture
def fails(run, tmp_path):
    """A function that runs a command, sees it end with one line and no file, and returns that."""

    def call(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        said = last_line(run, *args)
        assert said.startswith("prepare_data: ") and sorted(tmp_path.rglob("*")) == before
        return said

    return call


def brief(rows: list[dict]) -> list[tuple]:
    """(id, image, texts of the turns) of each row."""
    return [(row["id"], row["image"], *(turn["value"] for turn in row["conversations"]))
            for row in rows]


def asked(row: dict) -> tuple[str, str]:
    """(what a grounding row asks for, its answer), without the full stop of every other prompt."""
    question, answer = (turn["value"] for turn in row["conversations"])
    opening, asks_for = question.split(": ")
    assert f"{opening}: {{}}" == f"<image>\n{GROUNDING_PROMPT}"
    return asks_for.removesuffix("."), answer


def test_records_of_llava(tmp_path, run):
    """Tags stay where they are, without one pictures come first; several files; dirt is counted."""
    pair, two = talk("<image>\nWhat?", "That."), ["a.jpg", "b.jpg"]
    source = write(tmp_path / "llava_v1_5_mix665k.json", [
        {"id": "12", "image": "coco/train2017/000000000012.jpg",
         "conversations": talk("<image>\nHow many mugs?", "2", " Are they blue?\n", "No ")},
        {"id": "q_0", "conversations": talk("ahead", "Erkläre", "„Rekursion“", first=1)},
        {"id": "2", "image": two, "conversations": talk("See <image>.", "A", "And\n<image>", "B")},
        {"id": "e", "image": "vg/a.jpg", "conversations": talk("<image>\nWhat?", " ")},
        {"id": "f", "image": "vg/a.jpg", "conversations": talk("", "That.")},
        {"id": "t", "conversations": talk("a", "b", "last")},
        {"id": 7, "image": 7, "conversations": pair}])
    counts, rows = run("llava-mix665k", source, "--max-malformed", 0.8)
    assert counts == {
        "written": 3,
        "malformed: ValueError: a text is empty": 2,
        "malformed: ValueError: human and gpt do not take turns": 1,
        "malformed: RowError: 'image' must be a path, a list of paths, or null": 1}
    assert brief(rows) == [
        ("llava_mix665k/train/12#0", "coco/train2017/000000000012.jpg",
         "<image>\nHow many mugs?", "2", "Are they blue?", "No"),
        ("llava_mix665k/train/q_0#1", None, "Erkläre", "„Rekursion“"),
        ("llava_mix665k/train/2#2", two, "See <image>.", "A", "And\n<image>", "B")]
    captions = [{"id": "001", "image": "00/001.jpg", "conversations": talk(said, "mug")}
                for said in ("Caption.\n<image>", "<image>\n")]
    assert brief(run("llava-pretrain", write(tmp_path / "b.json", captions))[1]) == [
        ("llava_pretrain/train/001#0", "llava_pretrain/00/001.jpg", "Caption.\n<image>", "mug"),
        ("llava_pretrain/train/001#1", "llava_pretrain/00/001.jpg", "<image>", "mug")]
    chinese = [{"id": "c", "image": image, "conversations": talk("描述。", "水壶。")}
               for image in ("allava_vflan/a.jpg", two)]
    evol = {"idx": 5, "conversations": talk("Explain.", "Well.")}
    files = [write(tmp_path / "c.json", "\ufeff" + json.dumps(chinese)),  # a byte order mark
             write(tmp_path / "e.json", [evol])]
    assert brief(run("allava", *files)[1]) == [
        ("allava/train/c#0", "allava_vflan/a.jpg", "<image>\n描述。", "水壶。"),
        ("allava/train/c#1", two, "<image>\n<image>\n描述。", "水壶。"),
        ("allava/train/5#0", None, "Explain.", "Well.")]


@pytest.mark.parametrize(("record", "texts", "reason"), [
    ({"images": ["a.jpg"]}, ["<image>\nWhat?", "A bus."], "a picture under 'images'"),
    ({}, ["What?\n<image>", "A bus."], "0 pictures, but '<image>' 1 times in questions")])
def test_a_picture_that_nobody_shows(tmp_path, fails, capsys, record, texts, reason):
    """By data.py's rule, each such record is counted with its reason; all of them are an error."""
    talks = [record | {"id": str(n), "conversations": talk(*texts)} for n in range(20)]
    source = write(tmp_path / "a.json", talks)
    assert "20 of 20 are malformed" in fails("llava-mix665k", source)
    assert f"20  malformed: RowError: {reason}" in capsys.readouterr().out


def test_docvqa(tmp_path, run):
    """A row a question, a picture named by its content; no picture, a bad id, an id twice."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    picture, root, part = tmp_path / "p.png", tmp_path / "root", tmp_path / "set/train-0.parquet"
    Image.new("P", (4, 3)).save(picture)
    pairs = {"en": [{"question": "Total?", "answer": "42"}, {"question": "", "answer": "B"},
                    {"question": "Whose?", "answer": "A"}]}
    contents = {"d1": picture.read_bytes(), "d2": b"<html>", "../d3": b""}
    records = [{"id": name, "qa": pairs, "image": {"bytes": content, "path": None}}
               for name, content in contents.items()]
    records.append(records[0])
    write_table(pyarrow.Table.from_pylist(records), write(part, ""))
    counts, rows = run("docvqa-cmarkea", part.parent, "--images", str(root), "--max-malformed", 0.7)
    assert counts == {"written": 2, "malformed: KeyError: b'<ht'": 1,
                      "malformed: ValueError: 'id' is another picture's": 1,
                      "malformed: ValueError: a text is empty": 1,
                      "malformed: ValueError: 'id' is no file name": 1}
    assert brief(rows) == [
        ("docvqa_cmarkea/train/d1/0", "docvqa/train/d1.png", "<image>\nTotal?", "42"),
        ("docvqa_cmarkea/train/d1/2", "docvqa/train/d1.png", "<image>\nWhose?", "A")]
    (written,) = root.rglob("*.*")
    assert written.name == "d1.png" and written.read_bytes() == picture.read_bytes()


def test_vsr(tmp_path, run):
    """Yes and No, the picture's folder from its link."""
    record = {"image": "000000000017.jpg", "label": 1, "caption": "The lamp is left of the sofa.",
              "image_link": "http://example.invalid/train2017/000000000017.jpg"}
    other = record | {"label": 0, "image_link": "http://example.invalid/val2017/000000000017.jpg"}
    lines = [record, other, record | {"label": 2}]
    source = write_rows(tmp_path / "train.jsonl", lines)
    question = f"<image>\nIs this statement about the picture true? {record['caption']}{ONE_WORD}"
    assert brief(run("vsr", source, "--max-malformed", 0.5)[1]) == [
        ("vsr/train/000000", "coco/train2017/000000000017.jpg", question, "Yes"),
        ("vsr/train/000001", "coco/val2017/000000000017.jpg", question, "No")]


def test_scienceqa(tmp_path, run):
    """Context, options and letter; text-only problems; no test problems."""
    problem = {"question": "Which is a liquid?", "choices": ["stone", "milk"], "answer": 1,
               "hint": "", "image": None, "split": "train"}
    write(tmp_path / "problems.json", {
        "7": problem, "8": problem | {"hint": "Look.", "image": "image.png"}, "9": problem,
        "10": problem | {"answer": 2}})
    write(tmp_path / "pid_splits.json", {"train": ["7", "10"], "val": ["8"], "test": ["9"]})
    counts, rows = run("scienceqa", tmp_path, "--max-malformed", 0.34)
    assert counts == {"written": 2, "malformed: IndexError: string index out of range": 1}
    options = f"Which is a liquid?\nA. stone\nB. milk{ONE_LETTER}"
    assert brief(rows) == [("scienceqa/train/7", None, options, "B"),
                           ("scienceqa/val/8", "scienceqa/images/val/8/image.png",
                            f"<image>\nContext: Look.\n{options}", "B")]


def reference(number: int, split: str, image: int, *sentences: str) -> dict:
    """An entry of REFER's pickled list; box 900 + number."""
    return {"ref_id": number, "ann_id": 900 + number, "image_id": image, "split": split,
            "file_name": f"COCO_train2014_{image:012}_7.jpg",
            "sentences": [{"sent": s, "sent_id": 10 * number + n} for n, s in enumerate(sentences)]}


def box(number: int, image: int, category: int, *bbox: float, crowd: int = 0) -> dict:
    """An entry of COCO's annotations."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox,
            "iscrowd": crowd}


def pictures(name: str, *numbers: int) -> list[dict]:
    """Entries of COCO's images."""
    return [{"id": number, "file_name": f"{name}{number:012}.jpg", "width": 640, "height": 480}
            for number in numbers]


@pytest.fixture
def refer(tmp_path) -> Path:
    """refcoco, refcoco+, refcocog in small: picture 12 trains here and is tested on in RefCOCOg."""
    root, bbox = tmp_path / "refer", (100.0, 50.0, 200.0, 200.0)
    boxes = [box(900 + n, image, 47, *bbox) for n, image in ((1, 13), (2, 12), (3, 14))]
    instances = {"images": pictures("COCO_train2014_", 12, 13, 14),
                 "annotations": [*boxes, box(905, 13, 47, *bbox, crowd=1)]}
    train = [reference(1, "train", 13, "left mug", " ", "mug on left"),
             reference(2, "train", 12, "cup"), reference(3, "testA", 14, "man"),
             reference(4, "train", 13, "no box"), reference(5, "train", 13, "people")]
    for name, references in {"refcoco/refs(unc).p": train,
                             "refcoco+/refs(unc).p": [reference(1, "train", 13, "mug")],
                             "refcocog/refs(umd).p": [reference(2, "test", 12, "a cup")]}.items():
        write(root / name, "").write_bytes(pickle.dumps(references, protocol=2))
        write((root / name).parent / "instances.json", instances)
    return root


def test_refcoco_leaves_out_what_is_evaluated_on(refer, run):
    """A row a sentence, the box as xyxy; pictures of any set's val or test are left out."""
    accept = ("--max-malformed", 0.5)
    counts, (first, second) = run("refcoco", refer / "refcoco", *accept)
    assert counts == {
        "written": 2, "dropped: a crowd": 1,
        "dropped: its picture is one that grounding is evaluated on": 1,
        "malformed: KeyError: 904": 1, "malformed: ValueError: a text is empty": 1}
    assert first["image"] == "coco/train2014/COCO_train2014_000000000013.jpg"
    assert [first[name] for name in ("id", "workflow", "width", "height", "boxes")] == [
        "refcoco/train/ref1/sent10", "grounding", 640, 480, [[100, 50, 300, 250]]]
    assert asked(first) == ("left mug", "[0.16, 0.2, 0.47, 0.52]")
    assert asked(second)[0] == "mug on left"
    sets = [refer / name for name in ("refcoco", "refcoco+", "refcocog")]
    assert [row["id"] for row in run("refcoco", *sets, *accept)[1]] == [
        "refcoco/train/ref1/sent10", "refcoco/train/ref1/sent12", "refcoco+/train/ref1/sent10"]
    (tested,) = run("refcoco", refer / "refcoco", *accept, "--split", "testA")[1]
    assert tested["id"] == "refcoco/testA/ref3/sent30"


def test_hostile_pickles_are_refused(refer, fails):
    """One that names a function, one cut short, 9 bytes that claim memory. Python 2's are read."""
    path = refer / "refcoco/refs(unc).p"
    for content in (pickle.dumps([Path]), pickle.dumps([1] * 99)[:-5], pickle.dumps(7)):
        path.write_bytes(content)
        assert "refused" in fails("refcoco", path.parent)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "not as published" in fails("refcoco", path.parent)
    for text in ("caf\\xe9", "caf\\xc3\\xa9"):  # Latin-1, UTF-8
        path.write_bytes(f"(lp0\nS'{text}'\np1\na.".encode())
        assert refer_list(path.parent) == ["café"]
    path.write_bytes(b"\x80\x02]r\xff\xff\xff\x0f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refer_list(path.parent) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


COCO = {
    "annotations": [  # ahead of the images: the order of the parts is not fixed
        box(1, 12, 90, 300.55, 50, 200, 200), box(2, 12, 90, 100, 50, 200, 200),
        box(4, 12, 90, 100, 50, 200, 200), box(5, 12, 1, 0, 0, 100, 100, crowd=1),
        box(6, 12, 1, 0, 0, 50, 50), box(7, 13, 1, 0, 0, 10, 100),
        box(8, 13, 90, 600, 400, 100, 100), box(9, 99, 1, 0, 0, 50, 50), box(10, 13, 1, 0, 0, 50),
        *(box(20 + n, 14, 1, 12 * n, 0, 20, 20) for n in range(21)),
        *(box(50 + n, 15, 1, 12 * n, 0, 20, 20) for n in range(20)),
        box(80, 15, 2, 0, 0, 50, 50), box(81, 15, 90, 400, 300, 600, 470)],
    "images": pictures("", 14, 12, 13, 15),
    "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]}


def test_coco(tmp_path, refer, run, fails):
    """A row a picture and category; crowds, long lists and tiny boxes drop the whole row."""
    source = write(tmp_path / "instances_train2017.json", COCO)
    assert "--exclude-images REFER" in fails("coco", source)
    assert "refs(unc).p is missing: it names" in fails("refcoco", tmp_path / "only/refcoco")
    accept = ("--max-malformed", 0.5, "--exclude-images")
    counts, (first, second, third) = run("coco", source, *accept, "none")
    assert counts == {
        "written": 3,
        "dropped: a crowd, not every one of it boxed": 1,
        "dropped: more than 20 boxes": 1,
        "dropped: a box too small for two decimals": 1,
        "malformed: ValueError: not enough values to unpack (expected 4, got 3)": 1,
        "malformed: boxes of an unknown picture": 1,
        "malformed: ValueError: a box is not x, y, width, height: is it x1, y1, x2, y2?": 1,
        "malformed: KeyError: 2": 1}
    assert first["id"] == "coco/train2017/12/90" and first["image"].endswith("/000000000012.jpg")
    assert first["boxes"] == [[100, 50, 300, 250], [300.55, 50, 500.55, 250]]  # once each, by x1
    assert asked(first) == ("toothbrush", "[0.16, 0.2, 0.47, 0.52]; [0.47, 0.2, 0.78, 0.52]")
    assert second["boxes"] == [[600, 400, 640, 480]]  # clipped
    assert asked(third)[0] == "person" and len(third["boxes"]) == 20
    kept = run("coco", source, *accept, str(refer))[1]
    assert [row["id"] for row in kept] == ["coco/train2017/13/90", "coco/train2017/15/1"]


def test_objects365(tmp_path, run):
    """The last two parts of the file's name, the first of alternative category names."""
    image = {"id": 3, "file_name": "images/v1/patch8/a.jpg", "width": 480, "height": 640}
    (row,) = run("objects365", write(tmp_path / "zhiyuan_objv2_train.json", {
        "images": [image], "annotations": [box(1, 3, 11, -20, 0, 500, 640)],
        "categories": [{"id": 11, "name": "Cup/Bottle"}]}))[1]
    assert (row["id"], row["image"]) == ("objects365/train/3/11", "objects365/train/patch8/a.jpg")
    assert asked(row) == ("cup", "[0.12, 0.0, 0.88, 1.0]")


BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
ENTITIES = f"""<annotation><size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>101</name><name>105</name>{BOX.format(11, 21, 110, 220)}
<object><name>101</name>{BOX.format(201, 31, 260, 230)}
<object><name>102</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
SENTENCES = """[/EN#101/people Two cooks] stir [/EN#0/notvisual it] in [/EN#102/scene a kitchen] .
[/EN#105/people/clothing The cook 's hat] is white .
[/EN#101/people Two cooks] , [/EN#105/people someone] , [/EN#101/people someone] .
[/EN#105/people A stranger] sails .
"""


def test_flickr30k(tmp_path, run):
    """Plural boxes, 1-based pixels, distinct phrases; scenes, ambiguous and unrelated ones go."""
    write(tmp_path / "Annotations/900001.xml", ENTITIES)
    write(tmp_path / "Annotations/900002.xml", "<annotation>")
    write(tmp_path / "Sentences/900001.txt", SENTENCES.replace("stir", "\u2028stir"))  # one line
    write(tmp_path / "train.txt", "900001\n900002\n")
    write(tmp_path / "UNRELATED_CAPTIONS", "# format: <imageID> <sentence number>\n900001 4\n")
    counts, (first, second) = run("flickr30k", tmp_path, "--max-malformed", 0.5)
    assert counts == {
        "written": 2, "dropped: the phrase has no box": 2,
        "dropped: the phrase names different things in one picture": 1,
        "malformed: ParseError: no element found: line 1, column 12": 1}
    assert first["image"] == "flickr30k-images/900001.jpg"
    assert first["boxes"] == [[10, 20, 110, 220], [200, 30, 260, 230]]
    assert asked(first) == ("two cooks", "[0.02, 0.16, 0.22, 0.56]; [0.4, 0.18, 0.52, 0.58]")
    assert (second["id"], asked(second)[0]) == ("flickr30k/train/900001/3", "the cook's hat")


def test_one_percent_may_be_malformed(tmp_path):
    """More are an error, and as after an exception there is no file, nor a part of one."""
    good = [make_row("s", "t", number, [], [("q", "a")]) for number in range(99)]
    bad = [make_row("s", "t", 0, [], [("q", "\ud800")]), good[0] | {"image": 7}]
    out = tmp_path / "o"
    with pytest.raises(ValueError, match="2 of 101 are malformed, so nothing is written"):
        convert(good + bad, Counts(), out)
    with pytest.raises(ZeroDivisionError):
        convert((1 / (2 - number) and row for number, row in enumerate(good)), Counts(), out)
    assert not list(tmp_path.iterdir())
    convert(good + bad[:1], Counts(), out)
    assert len(read(out)) == 99
    with pytest.raises(FileExistsError, match="there already"):
        convert(good, Counts(), out)


@pytest.mark.parametrize("name", sorted(command.READERS))
def test_a_wrong_input_is_one_line(tmp_path, fails, name):
    """A file or folder that is not the data set's, or half of it; no file at all."""
    options = ["--exclude-images", "none", "--images", str(tmp_path / "root")]
    empty, half = write(tmp_path / "a.json", "[]"), write(tmp_path / "b.json", '[{"id": ')
    for source in (empty, half, tmp_path, tmp_path / "missing"):
        fails(name, source, *options)
