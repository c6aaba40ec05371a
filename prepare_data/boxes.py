"""Published data sets with boxes, one function each: from the published file to our rows.

As in data_sources.py: a function yields rows, `Drop` and `Note`, in an order that depends on the
file alone. Boxes of a whole annotation file wait in a database on disk, not in memory.
"""

import re
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from data import padded_square
from prepare_data.source_files import is_whole, load_detections, read_plain_pickle
from prepare_data.rows import NOT_XYWH, Drop, Item, Note, each, field, grounding_row, text

MIN_SIDE = 0.02  # of the padded square: two decimals cannot say where a smaller box is
REFER_SETS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # folder -> partition


def refer_list(folder: Path) -> list:
    """The references in a folder of REFER's: `refs(unc).p` or, of RefCOCOg, `refs(umd).p`."""
    if folder.name not in REFER_SETS:
        raise ValueError(f"{folder}: the folder must be one of {', '.join(REFER_SETS)}")
    path = folder / f"refs({REFER_SETS[folder.name]}).p"
    references = read_plain_pickle(path)
    if not isinstance(references, list):
        raise ValueError(f"{path}: a list of references is expected")
    return references


def evaluation_images(refer: Path) -> set[int]:
    """COCO ids of all pictures in val and test of RefCOCO, RefCOCO+ and RefCOCOg, below `refer`."""
    found = set()
    for name in REFER_SETS:
        for reference in refer_list(refer / name):
            reference = reference if isinstance(reference, dict) else {}
            number, split = reference.get("image_id"), reference.get("split")
            if not is_whole(number) or type(split) is not str:
                raise ValueError(f"{refer / name}: a reference without 'image_id' or 'split'")
            if split != "train":
                found.add(number)
    return found


def corners(x: float, y: float, w: float, h: float, width: int, height: int) -> list[float]:
    """x1, y1, x2, y2 of a box given as x, y, width, height. Drop where it cannot be that."""
    if w < 0 or h < 0 or x + w > 1.5 * width or y + h > 1.5 * height:
        raise Drop(NOT_XYWH)
    return [x, y, x + w, y + h]


def refcoco_reference(
    number: int, record, base: sqlite3.Connection, source: str, split: str, folder: str
) -> Iterator[Item]:
    """A box with one row for each sentence about it."""
    if field(record, "split", str) != split:
        raise Drop(f"of split {field(record, 'split', str)}", fault=False)
    query = ("select images.id, name, width, height, crowd, x, y, w, h from boxes "
             "join images on images.id = image where boxes.id = ?")
    found = base.execute(query, [field(record, "ann_id", int)]).fetchone()
    if found is None or found[0] != field(record, "image_id", int):
        raise Drop("its box is not in instances.json")
    _, name, width, height, crowd, *bbox = found
    if crowd:
        raise Drop("a crowd", fault=False)
    box = corners(*bbox, width, height)
    for sentence in field(record, "sentences", list):
        try:
            key = f"ref{field(record, 'ref_id', int)}/sent{field(sentence, 'sent_id', int)}"
            yield grounding_row(source, split, key, folder + name, (width, height),
                                text(sentence, "sent"), [box])
        except Drop as drop:
            yield drop


def refcoco(path: Path, folder: str, split: str) -> Iterator[Item]:
    """RefCOCO, RefCOCO+ or RefCOCOg: REFER's folder with `instances.json` and `refs(...).p`.

    The pickled references, some 50,000, are the one input that is in memory as a whole.
    """
    references = refer_list(path)
    base = load_detections(path / "instances.json")
    yield from malformed(base)
    yield from each(references, refcoco_reference, base, path.name, split, folder)


def malformed(base: sqlite3.Connection) -> Iterator[Drop]:
    """A Drop for each entry of an annotation file that is not as it should be."""
    for (kind,) in base.execute("select kind from malformed"):
        yield Drop(f"malformed or repeated entry of '{kind}'")
    missing = ("select count(*) from boxes where image not in (select id from images) "
               "or category not in (select id from categories)")
    for _ in range(base.execute(missing).fetchone()[0]):
        yield Drop("a box of an unknown picture or category")


def category_row(
    number: int, group: list[tuple], source: str, split: str, folder: str, order: str, cap: int
) -> Iterator[Item]:
    """All boxes of one category in one picture. They are dropped whole: a cut list misleads."""
    image, name, width, height, category, label = group[0][:6]
    if source == "objects365":  # images/v1/patch8/a.jpg lies in patch8/a.jpg; names as "Cup/Mug"
        name, label = "/".join(name.split("/")[-2:]), label.split("/")[0].lower()
    if any(crowd for *_, crowd, _, _, _, _ in group):
        raise Drop("a crowd, not every one of it boxed", fault=False)
    boxes = []
    for *_, x, y, w, h in group:
        box = corners(x, y, w, h, width, height)
        if w == 0 or h == 0:
            yield Note("a box of no size left out")
        elif box in boxes:
            yield Note("a box given twice left out")
        else:
            boxes.append(box)
    if not boxes:
        raise Drop("no box of any size", fault=False)
    if len(boxes) > cap:
        raise Drop("more boxes than --max-boxes", fault=False)
    smallest = MIN_SIDE * padded_square(width, height)[0]
    if any(min(b[2] - b[0], b[3] - b[1]) < smallest for b in boxes):
        raise Drop("a box too small for two decimals", fault=False)
    if order != "file":
        boxes.sort(key=(lambda b: (b[2] - b[0]) * (b[1] - b[3])) if order == "area" else None)
    yield grounding_row(source, split, f"{image}/{category}", folder + name, (width, height),
                        label, boxes)


def detections(
    path: Path, source: str, split: str, folder: str, order: str, max_boxes: int
) -> Iterator[Item]:
    """Rows of a COCO-style annotation file, one a picture and category, in order of their ids."""
    base = load_detections(path)
    yield from malformed(base)
    rows = base.execute(
        "select images.id, images.name, width, height, category, categories.name, crowd, x, y, w, h"
        " from boxes join images on images.id = image join categories on categories.id = category"
        " order by image, category, boxes.id")
    groups = (list(group) for _, group in groupby(rows, key=lambda row: (row[0], row[4])))
    yield from each(groups, category_row, source, split, folder, order, max_boxes)


def coco(path: Path, folder: str | None, order: str, max_boxes: int) -> Iterator[Item]:
    """COCO detection: `instances_train2017.json` with images, annotations, categories."""
    split = path.stem.removeprefix("instances_")
    folder = f"coco/{split}/" if folder is None else folder
    return detections(path, "coco", split, folder, order, max_boxes)


def objects365(path: Path, folder: str, order: str, max_boxes: int) -> Iterator[Item]:
    """Objects365 v2: `zhiyuan_objv2_train.json`, COCO's form; pictures in `FOLDER/patchN/`."""
    split = path.stem.rpartition("_")[2]
    return detections(path, "objects365", split, folder, order, max_boxes)


def entity_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list]]:
    """((width, height), boxes of each chain id) of an Annotations/*.xml: pixels counted from 1."""
    content = path.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:  # 0: UTF-16
        raise Drop("the XML defines entities")
    try:
        root = ElementTree.fromstring(content)
        size = tuple(int(root.findtext(f"size/{name}")) for name in ("width", "height"))
        if min(size) < 1:
            raise ValueError(f"a picture of {size} pixels")
        boxes = {}
        for thing in root.iter("object"):
            found = thing.find("bndbox")
            if found is None:
                continue
            x1, y1, x2, y2 = (int(found.findtext(n)) for n in ("xmin", "ymin", "xmax", "ymax"))
            for name in thing.iter("name"):
                boxes.setdefault(name.text, []).append([x1 - 1, y1 - 1, x2, y2])
    except (ElementTree.ParseError, LookupError, TypeError, ValueError):
        raise Drop("the XML is broken") from None
    return size, boxes


def flickr_picture(
    number: int, key: str, root: Path, unrelated: set, folder: str, max_boxes: int
) -> Iterator[Item]:
    """A row for each distinct phrase in the sentences about a picture that names boxes."""
    if not re.fullmatch(r"\d{1,20}", key):
        raise Drop("the picture's id is no number")
    try:
        sentences = (root / "Sentences" / f"{key}.txt").read_text(encoding="utf-8").splitlines()
        size, boxes = entity_boxes(root / "Annotations" / f"{key}.xml")
    except FileNotFoundError:
        raise Drop("no Sentences or Annotations of a picture") from None
    except UnicodeDecodeError:
        raise Drop("the sentences are not UTF-8") from None
    phrases = {}  # words -> chains that they name
    for place, sentence in enumerate(sentences, 1):
        if (key, str(place)) in unrelated:
            yield Note("a sentence about another picture left out")
            continue
        for chain, words in re.findall(r"\[/EN#(\d+)(?:/\w+)+ ([^\]]+)\]", sentence):
            words = re.sub(r" ([,.;:!?'])", r"\1", words.strip()).lower()
            phrases.setdefault(words, {})[chain] = None
    for place, (words, chains) in enumerate(phrases.items()):
        try:
            if len(chains) > 1:
                raise Drop("the phrase names different things in one picture", fault=False)
            found = boxes.get(*chains)
            if found is None:
                raise Drop("the phrase has no box", fault=False)
            if len(found) > max_boxes:
                raise Drop("more boxes than --max-boxes", fault=False)
            yield grounding_row("flickr30k", "train", f"{key}/{place}", f"{folder}{key}.jpg", size,
                                words, sorted(found))
        except Drop as drop:
            yield drop


def flickr30k(path: Path, folder: str, max_boxes: int) -> Iterator[Item]:
    """Flickr30k Entities: a folder with Annotations/, Sentences/, train.txt, UNRELATED_CAPTIONS."""
    lines = (path / "UNRELATED_CAPTIONS").read_text(encoding="utf-8").splitlines()
    unrelated = {tuple(line.split()) for line in lines}
    keys = (path / "train.txt").read_text(encoding="utf-8").split()
    return each(keys, flickr_picture, path, unrelated, folder, max_boxes)
