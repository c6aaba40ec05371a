"""Published data sets with boxes, one function each: from the published file to our rows.

As in `questions.py`, a function yields rows and Drops in an order that depends on the file alone.
"""

import pickle
import re
from collections.abc import Iterator, Set
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from data import padded_square
from prepare_data.rows import Drop, Item, each, grounding_row, read_list

MIN_SIDE = 0.02  # of the padded square: two decimals cannot say where a smaller box is
MAX_BOXES = 20  # of a row; a longer list is dropped whole, since a cut one would teach to leave out
BOX = [("image", "i8"), ("category", "i8"), ("crowd", "?"),
       ("x", "f4"), ("y", "f4"), ("w", "f4"), ("h", "f4")]
REFER_SETS = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}  # folder -> partition


def corners(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2 of a box given as x, y, width, height. Drop where it cannot be that."""
    if w < 0 or h < 0 or x + w > 1.5 * size[0] or y + h > 1.5 * size[1]:
        raise Drop("a box is not x, y, width, height: is it x1, y1, x2, y2?")
    return [x, y, x + w, y + h]


def entries(path: Path, part: str, *fields: str) -> dict[int, list]:
    """id -> these fields of each entry in one list of an annotation file in COCO's form."""
    try:
        return {entry["id"]: [entry[name] for name in fields]
                for entry in read_list(path, f"{part}.item")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: an entry of {part!r} is malformed ({error})") from None


# ---------------------------------------------------------------------------------- RefCOCO


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of lists, dicts, texts and numbers: it refuses to look up anything by name."""

    def find_class(self, module: str, name: str):
        """Called for every class and function that a pickle names: those are how code would run."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def refer_list(folder: Path) -> list[dict]:
    """The references in a folder of REFER's: `refs(unc).p` or, of RefCOCOg, `refs(umd).p`."""
    if folder.name not in REFER_SETS:
        raise ValueError(f"{folder}: the folder must be one of {', '.join(REFER_SETS)}")
    path = folder / f"refs({REFER_SETS[folder.name]}).p"
    with open(path, "rb") as file:
        try:
            return list(PlainUnpickler(file, encoding="latin1").load())  # Python 2 wrote it
        except Exception as error:  # damaged pickles raise a dozen kinds
            raise ValueError(f"{path}: refused, not a pickle of plain values ({error})") from None


def evaluation_images(refer: Path) -> Set[int]:
    """COCO ids of all pictures in val and test of RefCOCO, RefCOCO+ and RefCOCOg, below `refer`."""
    try:
        return {int(reference["image_id"]) for name in REFER_SETS
                for reference in refer_list(refer / name) if reference["split"] != "train"}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{refer}: a reference is malformed ({error})") from None


def refcoco(path: Path, split: str) -> Iterator[Item]:
    """RefCOCO, RefCOCO+ or RefCOCOg: REFER's folder with `instances.json` and `refs(...).p`.

    A row for each sentence about a box.
    """
    references = refer_list(path)
    images = entries(path / "instances.json", "images", "file_name", "width", "height")
    boxes = entries(path / "instances.json", "annotations", "image_id", "bbox", "iscrowd")

    def sentences(reference: dict) -> Iterator[Item]:
        if reference["split"] != split:
            raise Drop(f"of split {reference['split']}", malformed=False)
        image, bbox, crowd = boxes.get(reference["ann_id"], (None, None, None))
        if image != reference["image_id"]:
            raise Drop("its box is not in instances.json")
        if crowd:
            raise Drop("a crowd", malformed=False)
        name, *size = images[image]  # the reference's own "file_name" has a suffix
        box = corners(*bbox, size)

        def row(sentence: dict) -> Iterator[Item]:
            key = f"ref{reference['ref_id']}/sent{sentence['sent_id']}"
            yield grounding_row(path.name, split, key, f"coco/train2014/{name}", size,
                                sentence["sent"], [box])

        return each(reference["sentences"], row)

    return each(references, sentences)


# ---------------------------------------------------------------------------------- detection


def read_boxes(path: Path) -> Iterator[tuple]:
    """A BOX for each annotation; its image is -1 where it is malformed."""
    for entry in read_list(path, "annotations.item"):
        try:
            x, y, w, h = map(float, entry["bbox"])
            image, category = int(entry["image_id"]), int(entry["category_id"])
            yield image, category, bool(entry["iscrowd"]), x, y, w, h
        except (KeyError, TypeError, ValueError):
            yield -1, 0, False, 0, 0, 0, 0


def detections(path: Path, source: str, split: str) -> Iterator[Item]:
    """Rows of an annotation file in COCO's form: one for each picture and category in it.

    The file's boxes are not in the order of its pictures. They are kept as one table of numbers,
    about 50 bytes a box: 1.8 GB for the 30 million of Objects365.
    """
    names = entries(path, "categories", "name")
    boxes = np.fromiter(read_boxes(path), BOX)
    # By image, then category. The sort is stable: equals stay in the order of the file.
    order = np.lexsort((boxes["category"], boxes["image"]))
    owners, taken = boxes["image"][order], 0

    def picture(image: dict) -> Iterator[Item]:
        nonlocal taken
        start, stop = np.searchsorted(owners, [image["id"], image["id"] + 1])
        taken += int(stop - start)
        groups = groupby(boxes[order[start:stop]].tolist(), key=lambda box: box[1])
        return each(groups, lambda group: category(image, group[0], list(group[1])))

    def category(image: dict, number: int, found: list[tuple]) -> Iterator[Item]:
        (label,), file, size = names[number], image["file_name"], (image["width"], image["height"])
        if source == "objects365":  # v1/patch8/a.jpg lies in patch8/a.jpg; names are as "Cup/Mug"
            file, label = "/".join(file.split("/")[-2:]), label.split("/")[0].lower()
        if any(crowd for _, _, crowd, *_ in found):
            raise Drop("a crowd, not every one of it boxed", malformed=False)
        distinct = {tuple(corners(*box[3:], size)): None for box in found if box[5] and box[6]}
        if len(distinct) < len(found):
            yield Drop("a box of no size, or given twice", malformed=False)
        if not distinct:
            raise Drop("no box of any size", malformed=False)
        if len(distinct) > MAX_BOXES:
            raise Drop(f"more than {MAX_BOXES} boxes", malformed=False)
        smallest = MIN_SIDE * padded_square(*size)[0]
        if any(min(x2 - x1, y2 - y1) < smallest for x1, y1, x2, y2 in distinct):
            raise Drop("a box too small for two decimals", malformed=False)
        yield grounding_row(source, split, f"{image['id']}/{number}", f"{source}/{split}/{file}",
                            size, label, sorted(distinct))  # by x1: the paper does not say how

    yield from each(read_list(path, "images.item"), picture)
    for _ in range(len(boxes) - taken):
        yield Drop("a box is malformed, or of an unknown picture")


def coco(path: Path) -> Iterator[Item]:
    """COCO detection: `instances_train2017.json` with images, annotations, categories."""
    return detections(path, "coco", path.stem.removeprefix("instances_"))


def objects365(path: Path) -> Iterator[Item]:
    """Objects365 v2: `zhiyuan_objv2_train.json`, in COCO's form."""
    return detections(path, "objects365", path.stem.rpartition("_")[2])


# ---------------------------------------------------------------------------------- Flickr30k


def entity_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list]]:
    """((width, height), boxes of each chain id) of an Annotations/*.xml.

    The published pixels count from 1 and include both ends; ours count from 0, ends exclusive.
    """
    content = path.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:  # 0: UTF-16
        raise Drop("the XML defines entities")  # which can grow without bounds
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        raise Drop("the XML is broken") from None
    boxes = {}
    for thing in root.iter("object"):
        found = thing.find("bndbox")
        if found is None:  # a scene, or something that nobody could box
            continue
        x1, y1, x2, y2 = (int(found.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        for name in thing.iter("name"):
            boxes.setdefault(name.text, []).append([x1 - 1, y1 - 1, x2, y2])
    return (int(root.findtext("size/width")), int(root.findtext("size/height"))), boxes


def flickr30k(path: Path) -> Iterator[Item]:
    """Flickr30k Entities: a folder with Annotations/, Sentences/, train.txt, UNRELATED_CAPTIONS.

    A row for each distinct phrase that names boxes in the sentences about a picture.
    """
    lines = (path / "UNRELATED_CAPTIONS").read_text(encoding="utf-8").splitlines()
    unrelated = {tuple(line.split()) for line in lines}
    keys = (path / "train.txt").read_text(encoding="utf-8").split()

    def picture(key: str) -> Iterator[Item]:
        if not re.fullmatch(r"\d{1,20}", key):
            raise Drop("the picture's id is no number")
        try:
            sentences = (path / "Sentences" / f"{key}.txt").read_text(encoding="utf-8").splitlines()
            size, boxes = entity_boxes(path / "Annotations" / f"{key}.xml")
        except FileNotFoundError:
            raise Drop("no Sentences or Annotations of a picture") from None
        phrases = {}  # words -> chains that they name
        for number, sentence in enumerate(sentences, 1):
            if (key, str(number)) in unrelated:
                yield Drop("a sentence about another picture", malformed=False)
                continue
            # [/EN#101/people/clothing Two cooks] stir ...
            for chain, words in re.findall(r"\[/EN#(\d+)(?:/\w+)+ ([^\]]+)\]", sentence):
                words = re.sub(r" ([,.;:!?'])", r"\1", words.strip()).lower()
                phrases.setdefault(words, set()).add(chain)

        def phrase(numbered: tuple) -> Iterator[Item]:
            number, (words, chains) = numbered
            if len(chains) > 1:
                raise Drop("the phrase names different things in one picture", malformed=False)
            found = boxes.get(*chains)
            if found is None:
                raise Drop("the phrase has no box", malformed=False)
            if len(found) > MAX_BOXES:
                raise Drop(f"more than {MAX_BOXES} boxes", malformed=False)
            yield grounding_row("flickr30k", "train", f"{key}/{number}",
                                f"flickr30k-images/{key}.jpg", size, words, sorted(found))

        yield from each(enumerate(phrases.items()), phrase)

    return each(keys, picture)
