"""Each command of prepare_data on a small file of the published layout, dirty records included."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("ijson", reason="pip install -r requirements/data.txt")

from data import check_row
from prepare_data import __main__ as command
from prepare_data.boxes import refer_list
from prepare_data.rows import Drop, convert, grounding_row, make_row, read_list

ONE_WORD = "\nAnswer the question using a single word or phrase."
ONE_LETTER = "\nAnswer with the option's letter from the given choices directly."
ASK = "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "


def write(path: Path, value) -> Path:
    """A text, or JSON of anything else, in a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    """The file to write."""
    return tmp_path / "out.jsonl"


@pytest.fixture
def run(monkeypatch, capsys, out, tmp_path_factory):
    """A function that runs a command into `out`, anew, and returns the outcomes that it prints.

    The rows are written once more, elsewhere: any command gives the same bytes twice.
    """

    def call(name: str, *args) -> dict[str, int]:
        again = tmp_path_factory.mktemp("again") / out.name
        for path in (again, out):
            path.unlink(missing_ok=True)
            inputs = [arg for arg in args if isinstance(arg, Path)]
            options = [str(arg) for arg in args if not isinstance(arg, Path)]
            argv = ["prepare_data", name, *map(str, inputs), str(path), *options]
            monkeypatch.setattr(sys, "argv", argv)
            command.main()
            printed = capsys.readouterr().out.splitlines()
        assert again.read_bytes() == out.read_bytes()
        counts = (line.split("  ", 1) for line in printed)
        return {outcome: int(count.replace(",", "")) for count, outcome in counts}

    return call


@pytest.fixture
def fails(run, out, tmp_path):
    """A function that runs a command, sees it end with one line and no file, and returns that."""

    def call(*args) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            run(*args)
        assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
        assert sorted(tmp_path.rglob("*")) == before
        return stopped.value.code

    return call


def rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, each as training wants it."""
    return [check_row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def brief(path: Path) -> list[tuple]:
    """(id, image, texts of the turns) of each row."""
    return [(row["id"], row["image"], *(turn["value"] for turn in row["conversations"]))
            for row in rows(path)]


def talk(*texts: str) -> list[dict]:
    """Turns of human and gpt."""
    return [{"from": ("human", "gpt")[place % 2], "value": text}
            for place, text in enumerate(texts)]


def asked(row: dict) -> tuple[str, str]:
    """(what a grounding row asks for, its answer), without the full stop of every other prompt."""
    question, answer = (turn["value"] for turn in row["conversations"])
    assert question.startswith(ASK)
    return question.removeprefix(ASK).removesuffix("."), answer


# ---------------------------------------------------------------------------------- LLaVA's form

MIX = [
    {"id": "000000000012", "image": "coco/train2017/000000000012.jpg",
     "conversations": talk(f"<image>\nHow many mugs are there?{ONE_WORD}", "2",
                           " Are they blue?\n", "No ")},
    {"id": "q_0", "model": "", "conversations": talk("Erkläre Rekursion.", "Siehe „Rekursion“.")},
    {"id": "q_0", "conversations": talk("ahead", "Hello.", "<image> and", "fine", "last")[1:]},
    {"id": "e", "image": "vg/a.jpg", "conversations": talk("<image>\nWhat?", " ")},
    {"id": "t", "conversations": [*talk("a", "b"), *talk("", "c")[1:], *talk("d")]},
    {"id": "u", "image": "../../etc/passwd.jpg", "conversations": talk("<image>\nWhat?", "That.")},
    {"id": 7, "image": 7, "conversations": talk("<image>\nWhat?", "That.")},
    "no object",
]


def test_llava_mix665k(tmp_path, out, run):
    """Rows with and without a picture, a leading answer, a trailing question; dirt is counted."""
    source = write(tmp_path / "llava_v1_5_mix665k.json", MIX)
    assert run("llava-mix665k", source, "--max-malformed", 0.7) == {
        "written": 3,
        "malformed: a text is empty": 1,
        "malformed: human and gpt do not take turns": 1,
        "malformed: the image's path leaves the root of the pictures": 1,
        "malformed: 'image' is no path": 1,
        "malformed: a record is not as published (TypeError: string indices must be integers, "
        "not 'str')": 1,
        "dropped: an answer ahead of the first question": 1,
        "dropped: a last question without an answer": 1,
    }
    assert out.read_text(encoding="utf-8").splitlines()[0] == (
        '{"id": "llava_mix665k/train/000000000012#0", '
        '"image": "coco/train2017/000000000012.jpg", "workflow": "mm", '
        '"source": "llava_mix665k", "split": "train", "conversations": ['
        '{"from": "human", "value": "<image>\\nHow many mugs are there?\\nAnswer the question '
        'using a single word or phrase."}, {"from": "gpt", "value": "2"}, '
        '{"from": "human", "value": "Are they blue?"}, {"from": "gpt", "value": "No"}]}')
    assert brief(out)[1:] == [
        ("llava_mix665k/train/q_0#1", None, "Erkläre Rekursion.", "Siehe „Rekursion“."),
        ("llava_mix665k/train/q_0#2", None, "and", "fine"),
    ]


def test_text_rows_can_be_left_out(tmp_path, out, run):
    source = write(tmp_path / "m.json", MIX[:2])
    assert run("llava-mix665k", source, "--no-text-rows") == {"written": 1, "dropped: text only": 1}


def test_llava_pretrain(tmp_path, out, run):
    """The placeholder moves to the front, wherever it stands; the caption stays."""
    record = {"id": "001234567", "image": "00123/001234567.jpg",
              "conversations": talk("Give a short caption.\n<image>", "a red kettle on a stove")}
    run("llava-pretrain", write(tmp_path / "b.json", [record]))
    assert brief(out) == [
        ("llava_pretrain/train/001234567#0", "llava_pretrain/00123/001234567.jpg",
         "<image>\nGive a short caption.", "a red kettle on a stove")]


def test_allava(tmp_path, out, run):
    """Files one after another, text-only Evol rows, Chinese with a lost placeholder, a limit."""
    english = [{"id": "allava_laion_inst_77", "image": "allava_laion/images/77.jpeg",
                "conversations": talk("<image>\nWhy is the kettle dented?", "The dent suggests."),
                "original_caption": "kettle sale", "url": "http://example.invalid/77"}]
    evol = [{"idx": 5, "conversations": talk("Explain.", "Well.")}]
    chinese = [{"id": "c1", "image": "allava_vflan/images/images_191task_1k/a.jpg",
                "conversations": talk("描述这张图片。", "一把红色的水壶。")},
               {"id": "c2", "image": "allava_vflan/b.jpg",
                "conversations": talk("<image>\nDescribe.", "A kettle.")}]
    files = [write(tmp_path / "ALLaVA-Instruct-LAION-4V.json", english),
             write(tmp_path / "Evol-Instruct-GPT4-Turbo-143K.json", evol),
             write(tmp_path / "ALLaVA-Caption-VFLAN-4V_Chinese.json", chinese)]
    assert run("allava", *files) == {"written": 3, "dropped: not translated": 1}
    assert brief(out) == [
        ("allava_instruct_laion_4v/train/allava_laion_inst_77#0", "allava_laion/images/77.jpeg",
         "<image>\nWhy is the kettle dented?", "The dent suggests."),
        ("allava_evol_instruct_gpt4_turbo_143k/train/5#0", None, "Explain.", "Well."),
        ("allava_caption_vflan_4v_chinese/train/c1#0",
         "allava_vflan/images/images_191task_1k/a.jpg", "<image>\n描述这张图片。",
         "一把红色的水壶。"),
    ]
    assert "描述".encode() in out.read_bytes()  # as it is, not as \uXXXX
    first_two = out.read_bytes().splitlines()[:2]
    run("allava", *files, "--limit", 2)
    assert out.read_bytes().splitlines() == first_two


# ---------------------------------------------------------------------------------- questions


def docvqa_parquet(folder: Path) -> Path:
    """cmarkea/doc-vqa in small: three rows, the last with an id that climbs."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    picture = folder / "p.png"
    folder.mkdir(parents=True)
    Image.new("P", (4, 3)).save(picture)
    pairs = {"en": [{"question": "What is the total?", "answer": "42 units"},
                    {"question": "Whose?", "answer": "Ours."}],
             "fr": [{"question": "Quel est le total ?", "answer": "42 unités"}]}
    data = [{"id": name, "paper_id": None, "source": "infoVQA", "qa": pairs,
             "image": {"bytes": content, "path": None}}
            for name, content in (("d1", picture.read_bytes()), ("d2", b"<html>"), ("../d3", b""))]
    write_table(pyarrow.Table.from_pylist(data), folder / "train-00000-of-00001.parquet")
    return folder


def test_docvqa(tmp_path, out, run):
    """A row a question, the picture's bytes written once, named by content; bad ones drop."""
    source, root = docvqa_parquet(tmp_path / "doc-vqa"), tmp_path / "root"
    assert run("docvqa-cmarkea", source, "--images", str(root), "--max-malformed", 0.7) == {
        "written": 2, "malformed: the picture's bytes are no PNG, JPEG, GIF or WebP": 1,
        "malformed: 'id' is no file name": 1}
    assert brief(out) == [
        ("docvqa_cmarkea/train/d1/0", "docvqa/train/d1.png", "<image>\nWhat is the total?",
         "42 units"),
        ("docvqa_cmarkea/train/d1/1", "docvqa/train/d1.png", "<image>\nWhose?", "Ours.")]
    assert (root / "docvqa/train/d1.png").read_bytes() == (source / "p.png").read_bytes()
    assert [path.name for path in root.rglob("*.*")] == ["d1.png"]


def test_parquet_that_cannot_be_read(tmp_path, fails, monkeypatch):
    """A file cut short, and pyarrow missing: one line."""
    source = docvqa_parquet(tmp_path / "doc-vqa")
    part = source / "train-00000-of-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    arguments = ("docvqa-cmarkea", source, "--images", str(tmp_path))
    assert "train-00000-of-00001.parquet: not a readable parquet file" in fails(*arguments)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -r requirements/data.txt" in fails(*arguments)


def test_vsr(tmp_path, out, run, fails):
    """Yes and No, the picture's folder from its link or from where it is; no test rows unasked."""
    record = {"image": "000000000017.jpg", "label": 1, "relation": "left of", "annotator_id": 3,
              "image_link": "http://example.invalid/train2017/000000000017.jpg",
              "caption": "The lamp is left of the sofa.", "vote_true_validator_id": "[1, 2]"}
    other = record | {"image": "000000000018.jpg", "label": 0,
                      "image_link": "http://example.invalid/val2017/000000000018.jpg"}
    lines = [record, other, record | {"image": "../17.jpg"}, record | {"label": 2}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n" + "[" * 9000
    source = write(tmp_path / "train.jsonl", text)
    counts = run("vsr", source, "--max-malformed", 0.7)
    assert counts["written"] == 2 and sum(counts.values()) == 6
    question = f"<image>\nIs this statement about the picture true? {record['caption']}{ONE_WORD}"
    assert brief(out) == [
        ("vsr/train/000000", "coco/train2017/000000000017.jpg", question, "Yes"),
        ("vsr/train/000001", "coco/val2017/000000000018.jpg", question, "No")]
    write(tmp_path / "root/vsr/000000000018.jpg", "")
    run("vsr", source, "--max-malformed", 0.7, "--images", str(tmp_path / "root"))
    assert [row["image"] for row in rows(out)] == ["coco/train2017/000000000017.jpg",
                                                   "vsr/000000000018.jpg"]
    out.unlink()
    assert "--with-test" in fails("vsr", write(tmp_path / "all_vsr_validated_data.jsonl", text))


def test_scienceqa(tmp_path, out, run):
    """Context, options and letter; text-only problems; test problems are off by default."""
    problem = {"question": "Which is a liquid?", "choices": ["stone", "milk"], "answer": 1,
               "hint": "", "image": None, "split": "train"}
    problems = {"7": problem, "8": problem | {"hint": "Look.", "image": "image.png"},
                "9": problem, "10": problem | {"answer": 2}}
    folder = tmp_path / "scienceqa"
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["7", "10"], "val": ["8"], "test": ["9"],
                                       "minitrain": ["9"]})
    assert run("scienceqa", folder, "--max-malformed", 0.25) == {
        "written": 2, "dropped: of split test": 1,
        "malformed: 'answer' is not one of 'choices'": 1}
    options = f"Which is a liquid?\nA. stone\nB. milk{ONE_LETTER}"
    assert brief(out) == [
        ("scienceqa/train/7", None, options, "B"),
        ("scienceqa/val/8", "scienceqa/images/val/8/image.png",
         f"<image>\nContext: Look.\n{options}", "B")]
    run("scienceqa", folder, "--max-malformed", 0.25, "--with-test")
    assert brief(out)[2][0] == "scienceqa/test/9"


# ---------------------------------------------------------------------------------- boxes


def reference(number: int, split: str, image: int, *sentences: str) -> dict:
    """An entry of REFER's pickled list; box 900 + number."""
    return {"ref_id": number, "ann_id": 900 + number, "category_id": 47, "image_id": image,
            "file_name": f"COCO_train2014_{image:012}_7.jpg", "split": split,
            "sent_ids": list(range(len(sentences))),
            "sentences": [{"raw": s.title(), "sent": s, "sent_id": 10 * number + place,
                           "tokens": s.split()} for place, s in enumerate(sentences)]}


def refer(root: Path) -> Path:
    """refcoco, refcoco+, refcocog in small: picture 12 trains here and is tested on in RefCOCOg."""
    images = [{"id": n, "file_name": f"COCO_train2014_{n:012}.jpg", "width": 640, "height": 480}
              for n in (12, 13, 14)]
    boxes = [{"id": 900 + n, "image_id": image, "category_id": 47, "iscrowd": 0,
              "bbox": [100.0, 50.0, 200.0, 200.0]} for n, image in ((1, 13), (2, 12), (3, 14))]
    boxes.append(boxes[0] | {"id": 905, "iscrowd": 1})
    instances = {"images": images, "annotations": boxes,
                 "categories": [{"id": 47, "name": "cup", "supercategory": "kitchen"}]}
    lists = {"refcoco/refs(unc).p": [reference(1, "train", 13, "left mug", " ", "mug on left"),
                                     reference(2, "train", 12, "cup"),
                                     reference(3, "testA", 14, "man"),
                                     reference(4, "train", 13, "no box"),
                                     reference(5, "train", 13, "people")],
             "refcoco+/refs(unc).p": [reference(1, "train", 13, "mug")],
             "refcocog/refs(umd).p": [reference(2, "test", 12, "a cup")]}
    for name, references in lists.items():
        write(root / name, "").write_bytes(pickle.dumps(references, protocol=2))
        write((root / name).parent / "instances.json", instances)
    return root


def test_refcoco_leaves_out_what_is_evaluated_on(tmp_path, out, run):
    """A row a sentence, the box as xyxy; pictures of any set's val or test are left out."""
    root, accept = refer(tmp_path / "refer"), ("--max-malformed", 0.5)
    assert run("refcoco", root / "refcoco", *accept) == {
        "written": 2, "dropped: of split testA": 1, "dropped: a crowd": 1,
        "dropped: its picture is one that grounding is evaluated on": 1,
        "malformed: its box is not in instances.json": 1, "malformed: a text is empty": 1}
    first, second = rows(out)
    assert first["id"] == "refcoco/train/ref1/sent10"
    assert first["image"] == "coco/train2014/COCO_train2014_000000000013.jpg"
    assert (first["workflow"], first["width"], first["height"]) == ("grounding", 640, 480)
    assert first["boxes"] == [[100, 50, 300, 250]]
    assert asked(first) == ("left mug", "[0.16, 0.2, 0.47, 0.52]")
    assert asked(second)[0] == "mug on left"
    run("refcoco", root / "refcoco", *accept, "--exclude-images", "none")
    assert [asked(row)[0] for row in rows(out)] == ["left mug", "mug on left", "cup"]
    run("refcoco", *(root / name for name in ("refcoco", "refcoco+", "refcocog")), *accept)
    assert [row["id"] for row in rows(out)] == [
        "refcoco/train/ref1/sent10", "refcoco/train/ref1/sent12", "refcoco+/train/ref1/sent10"]
    run("refcoco", root / "refcoco", *accept, "--split", "testA")
    assert [row["id"] for row in rows(out)] == ["refcoco/testA/ref3/sent30"]


class Hostile:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(Path.cwd() / "executed"),)


def test_a_hostile_pickle_does_not_execute(tmp_path, fails, monkeypatch):
    """A pickle that names a function, one cut short, one of Python 2 with Latin-1 in it."""
    monkeypatch.chdir(tmp_path)
    root = refer(tmp_path / "refer")
    path = root / "refcoco" / "refs(unc).p"
    for content in (pickle.dumps([Hostile()]), pickle.dumps([1] * 99)[:-5], pickle.dumps(7)):
        path.write_bytes(content)
        assert "refused" in fails("refcoco", root / "refcoco")
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"(lp0\nS'caf\\xe9'\np1\na.")
    assert refer_list(root / "refcoco") == ["café"]


def box(number: int, image: int, category: int, *bbox: float, crowd: int = 0) -> dict:
    """An entry of COCO's annotations."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox),
            "iscrowd": crowd, "area": 1.0, "segmentation": []}


COCO = {
    "info": {"year": 2017}, "licenses": [{"id": 1}],
    "annotations": [  # ahead of the images: the order of the parts is not fixed
        box(1, 12, 90, 300.55, 50, 200, 200), box(2, 12, 90, 100, 50, 200, 200),
        box(3, 12, 90, 100, 50, 200, 0), box(4, 12, 90, 100, 50, 200, 200),
        box(5, 12, 1, 0, 0, 100, 100, crowd=1), box(6, 12, 1, 0, 0, 50, 50),
        box(7, 13, 1, 0, 0, 10, 100), box(8, 13, 90, 600, 400, 100, 100),
        box(9, 99, 1, 0, 0, 50, 50), box(10, 13, 1, 0, 0, 50),
        *(box(20 + n, 14, 1, 12 * n, 0, 20, 20) for n in range(21)),
        *(box(50 + n, 15, 1, 12 * n, 0, 20, 20) for n in range(20)),
        box(80, 15, 2, 0, 0, 50, 50),
    ],
    "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 640, "height": 480}
               for n in (14, 12, 13, 15)],
    "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
}


def test_coco(tmp_path, out, run, fails):
    """A row a picture and category; crowds, long lists and tiny boxes drop the whole row."""
    source = write(tmp_path / "instances_train2017.json", COCO)
    assert "--exclude-images REFER" in fails("coco", source)
    accept = ("--max-malformed", 0.4, "--exclude-images")
    assert run("coco", source, *accept, "none") == {
        "written": 3,
        "dropped: a box of no size, or given twice": 1,
        "dropped: a crowd, not every one of it boxed": 1,
        "dropped: more than 20 boxes": 1,
        "dropped: a box too small for two decimals": 1,
        "malformed: a box is malformed, or of an unknown picture": 2,
        "malformed: a record is not as published (KeyError: 2)": 1}
    first, second, third = rows(out)
    assert first["id"] == "coco/train2017/12/90"
    assert first["image"] == "coco/train2017/000000000012.jpg"
    assert first["boxes"] == [[100, 50, 300, 250], [300.55, 50, 500.55, 250]]  # by x1
    assert asked(first) == ("toothbrush", "[0.16, 0.2, 0.47, 0.52]; [0.47, 0.2, 0.78, 0.52]")
    assert second["boxes"] == [[600, 400, 640, 480]]  # clipped
    assert asked(third)[0] == "person" and len(third["boxes"]) == 20
    run("coco", source, *accept, str(refer(tmp_path / "refer")))
    assert [row["id"] for row in rows(out)] == ["coco/train2017/13/90", "coco/train2017/15/1"]


def test_coco_boxes_that_are_xyxy_stop_the_run(tmp_path, fails):
    """Corners where width and height belong: more than 1 % of the rows."""
    boxes = [box(n, 12, n, 400, 300, 600, 470) for n in (1, 90)]
    source = write(tmp_path / "instances_val2017.json", COCO | {"annotations": boxes})
    assert "2 of 2 are malformed" in fails("coco", source, "--exclude-images", "none")


def test_objects365(tmp_path, out, run):
    """The last two parts of the file's name, the first of alternative category names."""
    data = {"images": [{"id": 3, "file_name": "images/v1/patch8/objects365_v1_00000012.jpg",
                        "width": 480, "height": 640, "license": 1, "url": ""}],
            "annotations": [box(1, 3, 11, -20, 0, 500, 640) | {"isfake": 0, "isreflected": 0}],
            "categories": [{"id": 11, "name": "Cup/Bottle"}], "licenses": []}
    run("objects365", write(tmp_path / "zhiyuan_objv2_train.json", data))
    (row,) = rows(out)
    assert row["id"] == "objects365/train/3/11"
    assert row["image"] == "objects365/train/patch8/objects365_v1_00000012.jpg"
    assert asked(row) == ("cup", "[0.12, 0.0, 0.88, 1.0]")


ENTITIES = """<annotation><filename>900001.jpg</filename>
<size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>101</name><name>105</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax>
<ymax>220</ymax></bndbox></object>
<object><name>101</name><bndbox><xmin>201</xmin><ymin>31</ymin><xmax>260</xmax><ymax>230</ymax>
</bndbox></object>
<object><name>102</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
SENTENCES = """[/EN#101/people Two cooks] stir [/EN#0/notvisual it] in [/EN#102/scene a kitchen] .
[/EN#105/people/clothing The cook 's hat] is white .
[/EN#101/people Two cooks] , [/EN#105/people someone] .
[/EN#101/people someone]
[/EN#105/people A stranger] sails .
"""


def test_flickr30k(tmp_path, out, run):
    """Plural boxes, 1-based pixels, distinct phrases; scenes, ambiguous and unrelated ones go."""
    root = tmp_path / "entities"
    write(root / "Annotations/900001.xml", ENTITIES)
    write(root / "Sentences/900001.txt", SENTENCES)
    write(root / "Annotations/900002.xml", '<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>')
    write(root / "Sentences/900002.txt", SENTENCES)
    write(root / "train.txt", "900001\n900002\n900003\n../../900001\n")
    write(root / "UNRELATED_CAPTIONS", "# format: <imageID> <sentence number>\n900001 5\n")
    assert run("flickr30k", root, "--max-malformed", 0.5) == {
        "written": 2, "dropped: the phrase has no box": 2,
        "dropped: the phrase names different things in one picture": 1,
        "dropped: a sentence about another picture": 1,
        "malformed: the XML defines entities": 1,
        "malformed: the picture's id is no number": 1,
        "malformed: no Sentences or Annotations of a picture": 1}
    first, second = rows(out)
    assert first["image"] == "flickr30k-images/900001.jpg"
    assert first["boxes"] == [[10, 20, 110, 220], [200, 30, 260, 230]]
    assert asked(first) == ("two cooks", "[0.02, 0.16, 0.22, 0.56]; [0.4, 0.18, 0.52, 0.58]")
    assert (second["id"], asked(second)[0]) == ("flickr30k/train/900001/3", "the cook's hat")


def test_grounding_rows():
    """About half of the prompts end in a full stop; swapped corners and empty boxes drop."""
    def ask(key, *boxes):
        row = grounding_row("s", "t", key, "a.jpg", (640, 480), "a mug.", list(boxes))
        return row["conversations"][0]["value"]

    prompts = [ask(key, [0, 0, 64, 64]) for key in range(400)]
    assert 150 < sum(prompt.endswith(" a mug.") for prompt in prompts) < 250
    assert all(prompt.endswith((" a mug", " a mug.")) for prompt in prompts)
    with pytest.raises(Drop, match="swapped"):
        ask(0, [64, 0, 0, 64])
    with pytest.raises(Drop, match="outside"):
        ask(0, [0, 0, 64, 64], [700, 0, 800, 64])


# ---------------------------------------------------------------------------------- for all


@pytest.mark.parametrize("text", ["", '[{"a": 1}, {"a"', "[1, 2", "[1 2]", "[] []", "text",
                                  "[1, \udc80]", "[" * 9000])
def test_json_that_is_none(tmp_path, text):
    """Half a download and other files that are not JSON: one line with the file's name."""
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="not JSON, or not all of it") as raised:
        list(read_list(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_numbers_are_plain(tmp_path):
    """Whole numbers are int, others float: no decimals.Decimal gets into a row."""
    values = [1, -2.5, 1e30, "é😀", None, True, {"k": [1, {"m": "]}"}]}]
    read = list(read_list(write(tmp_path / "l.json", values)))
    assert read == values and [type(v) for v in read] == [type(v) for v in values]


def test_check_images(tmp_path, out):
    """Missing, empty, cut off, outside by a link, of another size than its boxes are for: dropped.

    A GIF under the name of a .jpg is a picture like any other.
    """
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (64, 48)).save(root / "good.jpg")
    Image.new("P", (64, 48)).save(root / "gif.jpg", format="GIF")
    (root / "cut.jpg").write_bytes((root / "good.jpg").read_bytes()[:300])
    (root / "empty.jpg").touch()
    Image.new("RGB", (64, 48)).save(tmp_path / "outside.jpg")
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    turns = talk("<image>\nWhat?", "That.")
    items = [make_row("s", "t", name, f"{name}.jpg", turns)
             for name in ("good", "gif", "cut", "empty", "link", "none")]
    items += [grounding_row("s", "t", f"{w}x{h}", "good.jpg", (w, h), "mug", [[1, 2, 30, 40]])
              for w, h in ((64, 48), (48, 64))]
    counts = convert(items, out, root=root, max_malformed=0.7)
    assert [row["id"] for row in rows(out)] == ["s/t/good", "s/t/gif", "s/t/64x48"]
    assert counts == {
        "written": 3, "malformed: the picture is broken": 2, "malformed: the picture is missing": 1,
        "malformed: the image's path leaves the root of the pictures": 1,
        "malformed: the picture is not of the size that its boxes are for": 1}


def text_rows(count: int) -> list[dict]:
    return [make_row("s", "t", number, None, talk("q", "a")) for number in range(count)]


def test_a_sample_keeps_the_order(out):
    """--max-rows: as many as asked for, spread over the file, in its order."""
    convert(text_rows(1000), out, max_rows=100)
    numbers = [int(row["id"].split("/")[2]) for row in rows(out)]
    assert len(numbers) == 100 and numbers == sorted(numbers)
    assert 30 < sum(number < 500 for number in numbers) < 70


def test_one_percent_may_be_malformed(out):
    """More are an error, and there is no file; rows that training would refuse count, too."""
    bad = [make_row("s", "t", 0, None, talk("q", "\ud800")), text_rows(1)[0] | {"id": 7}]
    with pytest.raises(ValueError, match="2 of 101 are malformed, so nothing is written"):
        convert(text_rows(99) + bad, out)
    assert not list(out.parent.iterdir())
    assert convert(text_rows(99) + bad[:1], out)["written"] == 99
    with pytest.raises(FileExistsError, match="there already"):
        convert(text_rows(1), out)


def test_a_stop_leaves_nothing(out):
    """A reader that fails half way: neither the file nor a part of it stays."""
    def items():
        yield from text_rows(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(items(), out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("name", sorted(command.DATASETS))
def test_a_wrong_input_is_one_line(tmp_path, fails, name):
    """A file or folder that is not the data set's: one line, and nothing is written."""
    options = ["--exclude-images", "none", "--images", str(tmp_path / "root")]
    for source in (tmp_path / "missing", write(tmp_path / "train.json", "[]"),
                   write(tmp_path / "train.jsonl", "{}"), tmp_path):
        assert fails(name, source, *options).startswith("prepare_data: ")


def test_missing_package_is_one_line(tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # as if it were not installed
    assert "pip install -r requirements/demo.txt" in fails("easy-vqa")
    monkeypatch.setitem(sys.modules, "ijson", None)
    assert "pip install -r requirements/data.txt" in fails("allava", write(tmp_path / "a", "[]"))
