"""Each command of convert_data.py on a small file of the published layout, dirty rows included."""

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from prepare_data import __main__ as convert_data
from prepare_data import source_files as data_files
from prepare_data import rows as data_rows
from prepare_data import writing as data_writing
from data import check_row
from prepare_data.source_files import stream_json
from prepare_data.rows import make_row

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
def run(monkeypatch, capsys, tmp_path_factory):
    """A function that runs convert_data.py with arguments and returns what it prints.

    Rows that it wrote are written once more, elsewhere: any command gives the same bytes twice.
    """

    def call(*args) -> str:
        new = [arg for arg in args if isinstance(arg, Path) and not arg.exists()]
        monkeypatch.setattr(sys, "argv", ["convert_data.py", *map(str, args)])
        convert_data.main()
        printed = capsys.readouterr().out
        for out in new:
            if out.is_file():
                again = tmp_path_factory.mktemp("again") / out.name
                argv = [again if arg == out else arg for arg in args]
                monkeypatch.setattr(sys, "argv", ["convert_data.py", *map(str, argv)])
                convert_data.main()
                assert again.read_bytes() == out.read_bytes()
                capsys.readouterr()
        return printed

    return call


@pytest.fixture
def fails(run):
    """A function that runs convert_data.py, sees it end with one line, and returns that."""

    def call(*args) -> str:
        with pytest.raises(SystemExit) as stopped:
            run(*args)
        assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
        return stopped.value.code

    return call


def rows(path: Path) -> list[dict]:
    """The rows of a JSONL file, each as training wants it."""
    return [check_row(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def talk(*texts: str) -> list[dict]:
    """Turns of human and gpt."""
    return [{"from": ("human", "gpt")[place % 2], "value": text}
            for place, text in enumerate(texts)]


def brief(path: Path) -> list[tuple]:
    """(id, image, texts of the turns) of each row."""
    return [(row["id"], row["image"], *(turn["value"] for turn in row["conversations"]))
            for row in rows(path)]


def report(path: Path, source: str) -> dict:
    """The report of one source, as it was written beside the rows."""
    return json.loads(Path(f"{path}.report.json").read_text())["report"][source]


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
    {"id": "t", "conversations": [*talk("a", "b"), *talk("", "c")[1:]]},
    {"id": "u", "image": "../../etc/passwd.jpg", "conversations": talk("<image>\nWhat?", "That.")},
    {"id": 7, "image": 7, "conversations": talk("<image>\nWhat?", "That.")},
    "no object",
]


def test_llava_mix665k(tmp_path, run):
    """Rows with and without a picture, a leading answer, a trailing question; dirt is counted."""
    out = tmp_path / "out.jsonl"
    printed = run("llava-mix665k", write(tmp_path / "llava_v1_5_mix665k.json", MIX), out,
                  "--max-faults", 0.7)
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
    counts = report(out, "llava_v1_5_mix665k")
    assert (counts["read"], counts["written"], counts["dropped"]) == (8, 3, {})
    assert counts["faults"] == {
        "a turn is empty": 1,
        "human and gpt do not take turns": 1,
        "the image's path leaves the root of the pictures": 1,
        "'image' is no path": 1,
        "not a record": 1,
    }
    assert counts["notes"] == {"an answer ahead of the first question left out": 1,
                               "a last question without an answer left out": 1}
    assert "8 read, 3 written" in printed and "665,298 rows were published" in printed


def test_text_rows_can_be_left_out(tmp_path, run):
    """--text-rows drop keeps the rows with a picture."""
    out = tmp_path / "out.jsonl"
    run("llava-mix665k", write(tmp_path / "m.json", MIX[:2]), out, "--text-rows", "drop")
    assert len(rows(out)) == 1 and report(out, "m")["dropped"] == {"text only": 1}


def test_llava_pretrain(tmp_path, run):
    """The placeholder moves to the front, wherever it stands; the caption stays."""
    record = {"id": "001234567", "image": "00123/001234567.jpg",
              "conversations": talk("Give a short caption.\n<image>", "a red kettle on a stove")}
    out = tmp_path / "out.jsonl"
    run("llava-pretrain", write(tmp_path / "b.json", [record]), out)
    assert brief(out) == [
        ("llava_pretrain/train/001234567#0", "llava_pretrain/00123/001234567.jpg",
         "<image>\nGive a short caption.", "a red kettle on a stove")]


def test_allava(tmp_path, run):
    """Files one after another, text-only Evol rows, Chinese with a lost placeholder, a limit."""
    english = [{"id": "allava_laion_inst_77", "image": "allava_laion/images/77.jpeg",
                "conversations": talk("<image>\nWhy is the kettle dented?", "The dent suggests."),
                "original_caption": "kettle sale", "url": "http://example.invalid/77"}]
    evol = [{"idx": 5, "conversations": talk("Explain.", "Well.")}]
    chinese = [{"id": "c1", "image": "allava_vflan/images/images_191task_1k/a.jpg",
                "conversations": talk("描述这张图片。", "一把红色的水壶。")},
               {"id": "c2", "image": "allava_vflan/b.jpg",
                "conversations": talk("<image>\nDescribe.", "A kettle.")},
               {"id": "c3", "image": "allava_vflan/c.jpg",
                "conversations": talk("<image>\n描述", "")}]
    files = [write(tmp_path / "ALLaVA-Instruct-LAION-4V.json", english),
             write(tmp_path / "Evol-Instruct-GPT4-Turbo-143K.json", evol),
             write(tmp_path / "ALLaVA-Caption-VFLAN-4V_Chinese.json", chinese)]
    out = tmp_path / "out.jsonl"
    run("allava", *files, out, "--max-faults", 0.3)
    assert brief(out) == [
        ("allava_instruct_laion_4v/train/allava_laion_inst_77#0", "allava_laion/images/77.jpeg",
         "<image>\nWhy is the kettle dented?", "The dent suggests."),
        ("allava_evol_instruct_gpt4_turbo_143k/train/5#0", None, "Explain.", "Well."),
        ("allava_caption_vflan_4v_chinese/train/c1#0",
         "allava_vflan/images/images_191task_1k/a.jpg", "<image>\n描述这张图片。",
         "一把红色的水壶。"),
    ]
    assert "描述".encode() in out.read_bytes()  # as it is, not as \uXXXX
    counts = report(out, "ALLaVA-Caption-VFLAN-4V_Chinese")
    assert counts["dropped"] == {"not translated": 1} and counts["faults"] == {"a turn is empty": 1}
    run("allava", *files, tmp_path / "two.jsonl", "--limit", 2)
    assert (tmp_path / "two.jsonl").read_text() == "".join(
        line + "\n" for line in out.read_text().splitlines()[:2])


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


def test_docvqa_of_cmarkea(tmp_path, run):
    """English pairs as turns, the picture's bytes written once by content; bad ones are dropped."""
    source, out = docvqa_parquet(tmp_path / "doc-vqa"), tmp_path / "out.jsonl"
    run("docvqa-cmarkea", source, out, "--images", tmp_path / "root", "--max-faults", 0.7)
    assert brief(out) == [
        ("docvqa_cmarkea/train/d1", "docvqa/train/d1.png", "<image>\nWhat is the total?",
         "42 units", "Whose?", "Ours.")]
    assert (tmp_path / "root/docvqa/train/d1.png").read_bytes() == (source / "p.png").read_bytes()
    assert [p.name for p in (tmp_path / "root").rglob("*.*")] == ["d1.png"]
    assert report(out, "doc-vqa")["faults"] == {
        "the picture's bytes are no PNG, JPEG, GIF or WebP": 1, "'id' is no file name": 1}
    run("docvqa-cmarkea", source, tmp_path / "each.jsonl", "--single", "--images",
        tmp_path / "root", "--max-faults", 0.7)
    assert [row[0] for row in brief(tmp_path / "each.jsonl")] == [
        "docvqa_cmarkea/train/d1/0", "docvqa_cmarkea/train/d1/1"]


def test_parquet_that_cannot_be_read(tmp_path, fails, monkeypatch):
    """A file cut short, and pyarrow missing: one line."""
    source = docvqa_parquet(tmp_path / "doc-vqa")
    part = source / "train-00000-of-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    command = ("docvqa-cmarkea", source, tmp_path / "out.jsonl", "--images", tmp_path)
    assert "not a readable parquet file" in fails(*command)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -r requirements-eval.txt" in fails(*command)


def test_docvqa_original(tmp_path, run):
    """The first of the accepted answers, the suffix for short ones; no answer is a fault."""
    data = [{"questionId": 337, "question": "What is the date?", "question_types": ["form"],
             "image": "documents/xx_1.png", "docId": 1, "answers": ["1/8/93", "Jan 8"],
             "data_split": "train"},
            {"questionId": 338, "question": "Who?", "image": "documents/xx_1.png",
             "data_split": "test"}]
    out, head = tmp_path / "out.jsonl", {"dataset_name": "docvqa", "dataset_split": "train"}
    run("docvqa", write(tmp_path / "train_v1.0.json", {**head, "data": data}), out,
        "--max-faults", 0.5)
    assert brief(out) == [("docvqa/train/337", "docvqa/documents/xx_1.png",
                           f"<image>\nWhat is the date?{ONE_WORD}", "1/8/93")]
    assert report(out, "train_v1.0")["faults"] == {"'answers' is missing, or no list": 1}


def test_vsr(tmp_path, run, fails):
    """Yes and No, the picture's folder from its link or from where it is; no test rows unasked."""
    record = {"image": "000000000017.jpg", "label": 1, "relation": "left of", "annotator_id": 3,
              "image_link": "http://example.invalid/train2017/000000000017.jpg",
              "caption": "The lamp is left of the sofa.", "vote_true_validator_id": "[1, 2]"}
    other = record | {"image": "000000000018.jpg", "label": 0,
                      "image_link": "http://example.invalid/val2017/000000000018.jpg"}
    lines = [record, other, record | {"image": "../17.jpg"}, record | {"label": 2}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n"
    source, out = write(tmp_path / "train.jsonl", text), tmp_path / "out.jsonl"
    run("vsr", source, out, "--max-faults", 0.6)
    question = f"<image>\nIs this statement about the picture true? {record['caption']}{ONE_WORD}"
    assert brief(out) == [
        ("vsr/train/000000", "coco/train2017/000000000017.jpg", question, "Yes"),
        ("vsr/train/000001", "coco/val2017/000000000018.jpg", question, "No")]
    assert sum(report(out, "train")["faults"].values()) == 3
    write(tmp_path / "root/vsr/000000000018.jpg", "")
    run("vsr", source, tmp_path / "flat.jsonl", "--max-faults", 0.6, "--images", tmp_path / "root")
    assert [row[1] for row in brief(tmp_path / "flat.jsonl")] == [
        "coco/train2017/000000000017.jpg", "vsr/000000000018.jpg"]
    everything = write(tmp_path / "all_vsr_validated_data.jsonl", text)
    assert "--with-test" in fails("vsr", everything, tmp_path / "all.jsonl")


def test_scienceqa(tmp_path, run):
    """Context, options and letter; text-only problems; test problems are off by default."""
    problem = {"question": "Which is a liquid?", "choices": ["stone", "milk"], "answer": 1,
               "hint": "", "image": None, "split": "train"}
    problems = {"7": problem, "8": problem | {"hint": "Look.", "image": "image.png"},
                "9": problem, "10": problem | {"answer": 2}}
    folder = tmp_path / "scienceqa"
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["7", "10"], "val": ["8"], "test": ["9"],
                                       "minitrain": ["9"]})
    run("scienceqa", folder, tmp_path / "out.jsonl", "--max-faults", 0.25)
    options = f"Which is a liquid?\nA. stone\nB. milk{ONE_LETTER}"
    assert brief(tmp_path / "out.jsonl") == [
        ("scienceqa/train/7", None, options, "B"),
        ("scienceqa/val/8", "scienceqa/images/val/8/image.png",
         f"<image>\nContext: Look.\n{options}", "B")]
    counts = report(tmp_path / "out.jsonl", "scienceqa")
    assert counts["dropped"] == {"of split test": 1}
    assert counts["faults"] == {"'answer' is not one of 'choices'": 1}


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
    lists = {"refcoco/refs(unc).p": [reference(1, "train", 13, "left mug", "mug on left"),
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


def test_refcoco_leaves_out_what_is_evaluated_on(tmp_path, run):
    """A row a sentence, the box as xyxy; pictures of any set's val or test are left out."""
    root, out = refer(tmp_path / "refer"), tmp_path / "out.jsonl"
    run("refcoco", root / "refcoco", out, "--max-faults", 0.5)
    first, second = rows(out)
    assert first["id"] == "refcoco/train/ref1/sent10"
    assert first["image"] == "coco/train2014/COCO_train2014_000000000013.jpg"
    assert (first["workflow"], first["width"], first["height"]) == ("grounding", 640, 480)
    assert first["boxes"] == [[100, 50, 300, 250]]
    assert asked(first) == ("left mug", "[0.16, 0.2, 0.47, 0.52]")
    assert asked(second)[0] == "mug on left"
    counts = report(out, "refcoco")
    assert counts["dropped"] == {"of split testA": 1, "a crowd": 1,
                                 "its picture is on the list of --exclude-images": 1}
    assert counts["faults"] == {"its box is not in instances.json": 1}
    run("refcoco", root / "refcoco", tmp_path / "all.jsonl", "--max-faults", 0.5,
        "--exclude-images", "none")
    assert [asked(row)[0] for row in rows(tmp_path / "all.jsonl")] == ["left mug", "mug on left",
                                                                     "cup"]
    run("refcoco", *(root / name for name in ("refcoco", "refcoco+", "refcocog")),
        tmp_path / "three.jsonl", "--max-faults", 0.5)
    assert [row["id"] for row in rows(tmp_path / "three.jsonl")] == [
        "refcoco/train/ref1/sent10", "refcoco/train/ref1/sent11", "refcoco+/train/ref1/sent10"]
    run("leakage", root, tmp_path / "ids.txt")
    assert (tmp_path / "ids.txt").read_text().splitlines()[1:] == ["12", "14"]


class Hostile:
    """Unpickled without care, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(Path.cwd() / "executed"),)


def test_a_hostile_pickle_does_not_execute(tmp_path, fails, monkeypatch):
    """A pickle that names a function, one cut short, one of Python 2 with Latin-1 in it."""
    monkeypatch.chdir(tmp_path)
    root = refer(tmp_path / "refer")
    path = root / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps([Hostile()]))
    assert "refused" in fails("refcoco", root / "refcoco", tmp_path / "out.jsonl")
    assert not (tmp_path / "executed").exists()
    path.write_bytes(pickle.dumps([1] * 99)[:-5])
    assert "refused" in fails("refcoco", root / "refcoco", tmp_path / "out.jsonl")
    path.write_bytes(b"(lp0\nS'caf\\xe9'\np1\na.")
    assert data_files.read_plain_pickle(path) == ["café"]


def box(number: int, image: int, category: int, *bbox: float, crowd: int = 0) -> dict:
    """An entry of COCO's annotations."""
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox),
            "iscrowd": crowd, "area": 1.0, "segmentation": []}


COCO = {
    "info": {"year": 2017}, "licenses": [{"id": 1}],
    "annotations": [  # ahead of the images: the order of the parts is not fixed
        box(1, 12, 90, 300.5, 50, 200, 200), box(2, 12, 90, 100, 50, 200, 200),
        box(3, 12, 90, 100, 50, 200, 0), box(4, 12, 90, 100, 50, 200, 200),
        box(5, 12, 1, 0, 0, 100, 100, crowd=1), box(6, 12, 1, 0, 0, 50, 50),
        box(7, 13, 1, 0, 0, 10, 100), box(8, 13, 90, 600, 400, 100, 100),
        box(9, 99, 1, 0, 0, 50, 50), box(10, 13, 1, 0, 0, 50),
        *(box(20 + n, 14, 1, 30 * n, 0, 20, 20) for n in range(3)),
    ],
    "images": [{"id": n, "file_name": f"{n:012}.jpg", "width": 640, "height": 480}
               for n in (12, 13, 14, 15)],
    "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
}


def test_coco(tmp_path, run, fails):
    """A row a picture and category; crowds, long lists and tiny boxes drop the whole row."""
    source, out = write(tmp_path / "instances_train2017.json", COCO), tmp_path / "out.jsonl"
    assert "leakage" in fails("coco", source, out)
    run("coco", source, out, "--exclude-images", "none", "--max-boxes", 2, "--max-faults", 0.4)
    first, second = rows(out)
    assert first["id"] == "coco/train2017/12/90"
    assert first["image"] == "coco/train2017/000000000012.jpg"
    assert first["boxes"] == [[100, 50, 300, 250], [300.5, 50, 500.5, 250]]  # by x1
    assert asked(first) == ("toothbrush", "[0.16, 0.2, 0.47, 0.52]; [0.47, 0.2, 0.78, 0.52]")
    assert second["boxes"] == [[600, 400, 640, 480]]  # clipped
    counts = report(out, "instances_train2017")
    assert counts["dropped"] == {"a crowd, not every one of it boxed": 1,
                                 "a box too small for two decimals": 1,
                                 "more boxes than --max-boxes": 1}
    assert counts["faults"] == {"malformed or repeated entry of 'annotations'": 1,
                                "a box of an unknown picture or category": 1}
    assert counts["notes"] == {"a box of no size left out": 1, "a box given twice left out": 1}
    run("coco", source, tmp_path / "file.jsonl", "--exclude-images", "none", "--order", "file",
        "--exclude-images", write(tmp_path / "ids.txt", "# ids\n13\n"), "--max-faults", 0.4)
    assert [row["id"] for row in rows(tmp_path / "file.jsonl")] == ["coco/train2017/12/90",
                                                                  "coco/train2017/14/1"]
    assert rows(tmp_path / "file.jsonl")[0]["boxes"][0] == [300.5, 50, 500.5, 250]


def test_objects365(tmp_path, run):
    """The last two parts of the file's name, the first of alternative category names."""
    data = {"images": [{"id": 3, "file_name": "images/v1/patch8/objects365_v1_00000012.jpg",
                        "width": 480, "height": 640, "license": 1, "url": ""}],
            "annotations": [box(1, 3, 11, -20, 0, 500, 640) | {"isfake": 0, "isreflected": 0}],
            "categories": [{"id": 11, "name": "Cup/Bottle"}], "licenses": []}
    out = tmp_path / "out.jsonl"
    run("objects365", write(tmp_path / "zhiyuan_objv2_train.json", data), out)
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


def test_flickr30k(tmp_path, run):
    """Plural boxes, 1-based pixels, distinct phrases; scenes, ambiguous and unrelated ones go."""
    root, out = tmp_path / "entities", tmp_path / "out.jsonl"
    write(root / "Annotations/900001.xml", ENTITIES)
    write(root / "Sentences/900001.txt", SENTENCES)
    write(root / "Annotations/900002.xml", '<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>')
    write(root / "Sentences/900002.txt", SENTENCES)
    write(root / "train.txt", "900001\n900002\n900003\n../../900001\n")
    write(root / "UNRELATED_CAPTIONS", "# format: <imageID> <sentence number>\n900001 5\n")
    run("flickr30k", root, out, "--max-faults", 0.5)
    first, second = rows(out)
    assert first["image"] == "flickr30k-images/900001.jpg"
    assert first["boxes"] == [[10, 20, 110, 220], [200, 30, 260, 230]]
    assert asked(first) == ("two cooks", "[0.02, 0.16, 0.22, 0.56]; [0.4, 0.18, 0.52, 0.58]")
    assert (second["id"], asked(second)[0]) == ("flickr30k/train/900001/3", "the cook's hat")
    counts = report(out, "entities")
    assert counts["dropped"] == {"the phrase has no box": 2,
                                 "the phrase names different things in one picture": 1}
    assert counts["faults"] == {"the XML defines entities": 1, "the picture's id is no number": 1,
                                "no Sentences or Annotations of a picture": 1}
    assert counts["notes"] == {"a sentence about another picture left out": 1}


def test_the_full_stop_comes_and_goes():
    """About half of the grounding prompts end in one, the same ones each time."""
    made = [data_rows.grounding_row("s", "t", key, "a.jpg", (640, 480), "a mug.",
                                       [[0, 0, 64, 64]]) for key in range(400)]
    stops = [row["conversations"][0]["value"].endswith(" a mug.") for row in made]
    assert 150 < sum(stops) < 250
    assert all(row["conversations"][0]["value"].endswith((" a mug", " a mug.")) for row in made)


# ---------------------------------------------------------------------------------- one's own


def test_own_tables(tmp_path, run, fails):
    """CSV with quotes and a text-only row, JSONL of three kinds; swapped columns are told."""
    table = write(tmp_path / "shop.csv",
                  'image,question,answer\na.jpg,"What, or\nwhere?",Here.\n,Why?,Because.\n'
                  'b.jpg,Who?\n')
    run("own", table, tmp_path / "csv.jsonl", "--max-faults", 0.4, "--folder", "shop")
    assert brief(tmp_path / "csv.jsonl") == [
        ("shop/train/#0", "shop/a.jpg", "<image>\nWhat, or\nwhere?", "Here."),
        ("shop/train/#1", None, "Why?", "Because.")]
    lines = [{"id": "x", "image": "a.jpg", "conversations": talk("What?\n<image>", "A cat.")},
             {"image": "b.png", "width": 640, "height": 480, "expression": "mug",
              "boxes": [[100, 50, 300, 250]]},
             {"image": "What is this?", "question": "a.jpg", "answer": "A cat."}]
    own = write(tmp_path / "own.jsonl", "".join(json.dumps(line) + "\n\n" for line in lines))
    run("own", own, tmp_path / "out.jsonl", "--max-faults", 0.4)
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == ["own/train/x#0", "own/train/#1"]
    assert asked(rows(tmp_path / "out.jsonl")[1]) == ("mug", "[0.16, 0.2, 0.47, 0.52]")
    assert report(tmp_path / "out.jsonl", "own")["faults"] == {
        "'image' is no name of a picture: are columns swapped?": 1}
    assert "no column 'answer'" in fails(
        "own", write(tmp_path / "bad.csv", "image,question,reply\n"), tmp_path / "bad.jsonl")
    assert ".csv, .tsv or .jsonl" in fails("own", write(tmp_path / "a.xls", ""), tmp_path / "b")


def test_boxes_that_are_xywh_stop_the_run(tmp_path, fails):
    """x, y, width, height where x1, y1, x2, y2 belong: said so, and nothing is written."""
    line = {"image": "b.png", "width": 640, "height": 480, "expression": "mug"}
    text = "".join(json.dumps(line | {"boxes": [bbox]}) + "\n"
                   for bbox in ([100, 50, 300, 250], [300, 250, 100, 50]))
    said = fails("own", write(tmp_path / "own.jsonl", text), tmp_path / "out.jsonl",
                 "--max-faults", 1)
    assert "1 of 2 rows" in said and "is it x, y, width, height?" in said
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]  # nothing to resume


def test_one_odd_box_in_a_thousand_is_let_pass():
    """More are a wrong format, whatever --max-faults says; other faults keep what was written."""
    counts = {"read": 2000, "written": 1990, "dropped": {}, "notes": {},
              "faults": {data_rows.NOT_XYXY: 2}}
    progress = data_writing.Progress({}, report={"s": counts})
    data_writing.check_report(progress, None, 0.01)
    counts["faults"]["other"] = 19
    with pytest.raises(ValueError, match="21 of 2000 rows are not as published") as error:
        data_writing.check_report(progress, None, 0.01)
    assert type(error.value) is ValueError
    counts["faults"][data_rows.NOT_XYXY] = 3
    with pytest.raises(data_writing.Misformed, match="3 of 2000 rows: "):
        data_writing.check_report(progress, None, 1)


def test_the_stamp_of_a_folder(tmp_path):
    """Sizes and times of what is read; not our own files, nor what a killed run left of them."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    first = write(folder / "a.json", [1])
    before = convert_data.stamp(folder)
    for name in ("out.jsonl.part.json", "out.jsonl.report.json", "out.jsonl", "b.jpg",
                 ".out.jsonl.part.0123.tmp.json"):
        write(folder / name, "x")
    assert convert_data.stamp(folder) == before
    os.utime(first, ns=(0, 0))
    touched = convert_data.stamp(folder)
    write(folder / "sub" / "c.xml", "x")
    assert len({before[1], touched[1], convert_data.stamp(folder)[1]}) == 3
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        convert_data.stamp(tmp_path / "none")


def test_a_changed_input_is_not_resumed(tmp_path, fails):
    source, out = write(tmp_path / "m.json", MIX), tmp_path / "out.jsonl"
    assert "what was written is kept" in fails("llava-mix665k", source, out)
    write(source, MIX + MIX[:1])
    assert "made with another inputs" in fails("llava-mix665k", source, out)


def test_coco_boxes_that_are_xyxy_stop_the_run(tmp_path, fails):
    """The other way round: corners where width and height belong."""
    boxes = [box(n, 12, n, 400, 300, 600, 470) for n in (1, 90)]
    source = write(tmp_path / "instances_val2017.json", COCO | {"annotations": boxes})
    said = fails("coco", source, tmp_path / "out.jsonl", "--exclude-images", "none",
                 "--max-faults", 1)
    assert "2 of 2 rows: a box is not x, y, width, height" in said
    assert [path.name for path in tmp_path.iterdir()] == [source.name]  # nothing to resume


# ---------------------------------------------------------------------------------- for all


@pytest.mark.parametrize("text, said", [
    ("", "the file ends there"), ('[{"a": 1}, {"a"', "the file ends there"),
    ("[1, 2", "the file ends there"), ("[1 2]", "character 3"), ("[] []", "character 3"),
    ('{"a": 1}', "a JSON list is expected"), ("text", "character 0"), ("[" * 9000, "not JSON"),
    ("[1, \udc80]", "not UTF-8"),
])
def test_json_that_is_none(tmp_path, text, said):
    """Half a download and other files that are not a JSON list: one line with the file's name."""
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=said) as raised:
        list(stream_json(path, "["))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_json_across_chunks(tmp_path, monkeypatch, chunk):
    """Elements and members are the same wherever the chunks end."""
    monkeypatch.setattr(data_files, "CHUNK", chunk)
    values = [1, -2.5, 1e30, "a\"b\\u00e9\n", None, True, [], {}, {"k": [1, {"m": "]}"}]},
              12345, "é😀"]
    texts = (json.dumps(values), json.dumps(values, ensure_ascii=False),
             f"\ufeff {json.dumps(values, indent=1)}\n")
    for text in texts:
        assert list(stream_json(write(tmp_path / "l.json", text), "[")) == values
    members = {"images": [1, 2], "none": [], "info": {"a": [3]}, "n": 7}
    assert list(stream_json(write(tmp_path / "o.json", members), "{")) == [
        ("images", 1), ("images", 2), ("info", {"a": [3]}), ("n", 7)]


def test_check_images(tmp_path, run, fails):
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
    names = ["good.jpg", "gif.jpg", "cut.jpg", "empty.jpg", "link.jpg", "none.jpg"]
    lines = [{"image": name, "question": "What?", "answer": "That."} for name in names]
    lines += [{"image": "good.jpg", "width": w, "height": h, "expression": "mug",
               "boxes": [[1, 2, 30, 40]]} for w, h in ((64, 48), (48, 64))]
    source = write(tmp_path / "own.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    command = ("own", source, out, "--images", root, "--check-images", 2)
    assert "5 of 8 rows are not as published" in fails(*command)
    run(*command, "--max-faults", 0.7)  # accepted: goes on from the end
    assert [row["id"] for row in rows(out)] == [f"own/train/#{n}" for n in (0, 1, 6)]
    assert report(out, "own")["faults"] == {
        "the picture is broken": 2, "the picture is missing": 1,
        "the image's path leaves the root of the pictures": 1,
        "the picture is not of the size that its boxes are for": 1}


def mix_file(path: Path, count: int) -> Path:
    """A mix665k of `count` rows."""
    return write(path, [MIX[n % 3] for n in range(count)])


def test_a_dry_run_writes_nothing(tmp_path, run):
    """It counts, and leaves the folder as it was."""
    source = mix_file(tmp_path / "m.json", 5)
    assert "5 read, 5 written" in run("llava-mix665k", source, tmp_path / "out.jsonl", "--dry-run")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_killed_and_resumed_gives_the_same_bytes(tmp_path, run, fails, monkeypatch):
    """Killed between two rows, twice; the last bytes and the report are those of one run."""
    source, out = mix_file(tmp_path / "m.json", 50), tmp_path / "out.jsonl"
    run("llava-mix665k", source, tmp_path / "whole.jsonl")
    monkeypatch.setattr(data_writing, "BLOCK", 4)
    monkeypatch.setattr(data_writing, "SAVE_SECONDS", 0)
    judge = data_writing.judge
    for last in (23, 41):

        def judge_until(item, excluded, last=last):
            if isinstance(item, dict) and item["id"].endswith(f"#{last}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return judge(item, excluded)

        child = os.fork()
        if not child:
            try:
                monkeypatch.setattr(data_writing, "judge", judge_until)
                run("llava-mix665k", source, out)
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        noted = json.loads(Path(f"{out}.part.json").read_text())
        assert 0 < noted["bytes"] <= Path(f"{out}.part").stat().st_size and not out.exists()
        with open(f"{out}.part", "ab") as part:
            part.write(b'{"id": "half a ro')  # as a kill within a write leaves it
    assert "made with another limit" in fails("llava-mix665k", source, out, "--limit", 3)
    run("llava-mix665k", source, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert report(out, "m") == report(tmp_path / "whole.jsonl", "m")
    assert not list(tmp_path.glob("*.part*"))
    assert "already" in fails("llava-mix665k", source, out)


def test_one_process_a_file(tmp_path, fails):
    """A second process that would write the same file is told so."""
    source, out = mix_file(tmp_path / "m.json", 3), tmp_path / "out.jsonl"
    with data_writing.half_written(out, {}):
        assert "another process" in fails("llava-mix665k", source, out)


def test_mix(tmp_path, run, fails):
    """An exact number of rows by weight; repeats get ids of their own; the same bytes twice."""
    sizes = {"a": 10, "b": 3}
    for name, size in sizes.items():
        made = [make_row(name, "train", n, None, talk("q", "a")) for n in range(size)]
        write(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in made))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for out in ("one", "two"):
        run("mix", f"{a}=1", f"{b}=2", tmp_path / out, "--rows", 13)
    ids = [row["id"] for row in rows(tmp_path / "one")]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(ids) == len(set(ids)) == 13 and sum(i.startswith("a/") for i in ids) == 4
    copies = [sum(i.split("~")[0] == f"b/train/{n}" for i in ids) for n in range(3)]
    assert sum(copies) == 9 and copies == [3, 3, 3] and "b/train/0~3" in ids
    run("mix", a, b, tmp_path / "all")
    assert (tmp_path / "all").read_bytes() == a.read_bytes() + b.read_bytes()
    run("mix", f"{a}=1", f"{b}=2", tmp_path / "seed", "--rows", 13, "--seed", 1)
    assert (tmp_path / "seed").read_bytes() != (tmp_path / "one").read_bytes()
    assert convert_data.shares([665.3, 50, 10, 21, 40], 786_300) == [665_300, 50_000, 10_000,
                                                                   21_000, 40_000]
    assert "twice" in fails("mix", f"{a}=1", a, tmp_path / "out")
    assert "share out" in fails("mix", f"{a}=0", tmp_path / "out")
    write(b, '{"id": 1}\n')
    assert "b.jsonl:1: " in fails("mix", b, tmp_path / "out")


@pytest.mark.parametrize("command", sorted(convert_data.DATASETS))
def test_a_wrong_input_is_one_line(tmp_path, fails, command):
    """A file or folder that is not the data set's: one line, and nothing is written."""
    options = ["--exclude-images", "none", "--images", tmp_path / "root"]
    for source in (tmp_path / "missing", write(tmp_path / "train.json", "[]"), tmp_path):
        assert fails(command, source, tmp_path / "out.jsonl", *options).startswith("convert_data")
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_easy_vqa_errors_are_one_line(tmp_path, fails, monkeypatch):
    """A missing package: one line, exit code 1."""
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # as if it were not installed
    assert "easy-vqa is missing" in fails("easy-vqa", tmp_path / "new")
    assert not (tmp_path / "new").exists()
