"""Published data sets with boxes, one function each: from the published file to our rows."""

import io
import pickle
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterator, Set
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from data import GROUNDING_PROMPT, boxes_to_text, padded_square
from prepare_data.rows import Counts, Drop, clean, make_row, read_list

MIN_SIDE = 0.02  # of the padded square: two decimals cannot say where a smaller box is
MAX_BOXES = 20  # of a row; a longer list is dropped whole, since a cut one would teach to leave out
REFER_SETS = ("refcoco", "refcoco+", "refcocog")


def corners(x: float, y: float, w: float, h: float, size: tuple[int, int]) -> list[float]:
    """x1, y1, x2, y2, inside the picture, of a box given as x, y, width, height.

    size: (width, height) of the picture. ValueError where the box cannot be what is said.
    """
    if w < 0 or h < 0 or x + w > 1.5 * size[0] or y + h > 1.5 * size[1]:
        raise ValueError("a box is not x, y, width, height: is it x1, y1, x2, y2?")
    return [max(x, 0), max(y, 0), min(round(x + w, 2), size[0]), min(round(y + h, 2), size[1])]


def grounding_row(
    source: str, split: str, key, image: str, size: tuple[int, int], expression: str, boxes: list
) -> dict:
    """A row that asks where `expression` is in a picture of `size` (width, height).

    boxes: pixels, x1, y1, x2, y2, ends exclusive. Half of the prompts, by a hash of their id, end
    in a full stop: the official prompt has none, the paper's figures have one.
    """
    if len(boxes) > MAX_BOXES:
        raise Drop(f"more than {MAX_BOXES} boxes")
    answer = boxes_to_text(boxes, *size)
    if answer.count("[") < len(boxes):
        raise Drop("a box is outside the picture, or empty once rounded")
    stop = "." * (zlib.crc32(f"{source}/{split}/{key}".encode()) & 1)
    question = GROUNDING_PROMPT.format(clean(expression.rstrip(". "))) + stop
    return make_row(source, split, key, [image], [(question, answer)], "grounding", width=size[0],
                    height=size[1], boxes=boxes)


def entries(path: Path, part: str, *fields: str) -> dict[int, list]:
    """id -> these fields of each entry in one list of an annotation file in COCO's form."""
    return {entry["id"]: [entry[name] for name in fields]
            for entry in read_list(path, f"{part}.item")}


class PlainUnpickler(pickle._Unpickler):
    """An unpickler of lists, dicts, texts and numbers: it refuses to look up anything by name.

    It is Python's own class: with that in C, a pickle of 9 bytes can make the memo take 4 GB.
    """

    def find_class(self, module: str, name: str):
        """Called for every class and function that a pickle names: those are how code would run."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def refer_list(folder: Path) -> list[dict]:
    """The references in a folder of REFER's: `refs(unc).p` or, of RefCOCOg, `refs(umd).p`."""
    path = folder / ("refs(umd).p" if folder.name == "refcocog" else "refs(unc).p")
    content = path.read_bytes()
    try:
        try:
            return list(PlainUnpickler(io.BytesIO(content), encoding="utf-8").load())
        except UnicodeDecodeError:  # Python 2 wrote it, with texts as bytes of no said encoding
            return list(PlainUnpickler(io.BytesIO(content), encoding="latin1").load())
    except Exception as error:  # damaged pickles raise a dozen kinds
        raise ValueError(f"{path}: refused, not a pickle of plain values ({error})") from None


def evaluation_images(refer: Path) -> Set[int]:
    """COCO ids of all pictures in val and test of RefCOCO, RefCOCO+ and RefCOCOg, below `refer`."""
    return {int(reference["image_id"]) for name in REFER_SETS
            for reference in refer_list(refer / name) if reference["split"] != "train"}


def refcoco(path: Path, counts: Counts, split: str) -> Iterator[dict]:
    """RefCOCO, RefCOCO+ or RefCOCOg: REFER's folder with `instances.json` and `refs(...).p`.

    A row for each sentence about a box.
    """
    images = entries(path / "instances.json", "images", "file_name", "width", "height")
    boxes = entries(path / "instances.json", "annotations", "bbox", "iscrowd")
    asked = [(reference, sentence) for reference in refer_list(path)
             if reference["split"] == split for sentence in reference["sentences"]]
    for reference, sentence in asked:
        with counts.each():
            bbox, crowd = boxes[reference["ann_id"]]
            if crowd:
                raise Drop("a crowd")
            name, *size = images[reference["image_id"]]  # the reference's own name has a suffix
            key = f"ref{reference['ref_id']}/sent{sentence['sent_id']}"
            yield grounding_row(path.name, split, key, f"coco/train2014/{name}", size,
                                sentence["sent"], [corners(*bbox, size)])


def list_boxes(found: list[list], size: tuple[int, int]) -> list[tuple]:
    """All boxes of a category in a picture, by x1, from their (crowd, x, y, w, h). Or Drop."""
    if any(crowd for crowd, *_ in found):
        raise Drop("a crowd, not every one of it boxed")
    distinct = sorted({tuple(corners(*box, size)) for _, *box in found})
    smallest = MIN_SIDE * padded_square(*size)[0]
    if any(min(x2 - x1, y2 - y1) < smallest for x1, y1, x2, y2 in distinct):
        raise Drop("a box too small for two decimals")
    return distinct  # the order is ours: the paper does not say its own


def detections(path: Path, counts: Counts, source: str) -> Iterator[dict]:
    """A file in COCO's form, as `instances_train2017.json`: a row for each picture and category.

    The file's boxes are not in the order of its pictures. They are kept as numbers, about 90 bytes
    a box: 3 GB for the 30 million of Objects365.
    """
    names, split = entries(path, "categories", "name"), path.stem.rpartition("_")[2]
    boxes = defaultdict(lambda: array("d"))  # image id -> (category, crowd, x, y, w, h) of each box
    for entry in read_list(path, "annotations.item"):
        with counts.each():
            x, y, w, h = entry["bbox"]
            numbers = entry["category_id"], entry["iscrowd"], x, y, w, h
            boxes[entry["image_id"]] += array("d", numbers)
    for image in read_list(path, "images.item"):
        with counts.each():
            size, categories = (image["width"], image["height"]), defaultdict(list)
            for category, *box in np.reshape(boxes.pop(image["id"], ()), (-1, 6)).tolist():
                categories[int(category)].append(box)
            # Of Objects365: v1/patch8/a.jpg lies in patch8/a.jpg, and categories are as "Cup/Mug".
            file = "/".join(image["file_name"].split("/")[-2:])
            for category, found in sorted(categories.items()):
                with counts.each():
                    label = names[category][0].split("/")[0].lower()
                    yield grounding_row(source, split, f"{image['id']}/{category}",
                                        f"{source}/{split}/{file}", size, label,
                                        list_boxes(found, size))
    if boxes:
        counts["malformed: boxes of an unknown picture"] += len(boxes)


def entity_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list]]:
    """((width, height), boxes of each chain id) of an Annotations/*.xml.

    The published pixels count from 1 and include both ends; ours count from 0, ends exclusive.
    """
    root = ElementTree.parse(path).getroot()
    boxes = defaultdict(list)
    for thing in root.iter("object"):
        found = thing.find("bndbox")
        if found is None:  # a scene, or something that nobody could box
            continue
        x1, y1, x2, y2 = (int(found.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        for name in thing.iter("name"):
            boxes[name.text].append([x1 - 1, y1 - 1, x2, y2])
    return (int(root.findtext("size/width")), int(root.findtext("size/height"))), boxes


def phrase_chains(sentences: list[str]) -> dict[str, set[str]]:
    """Phrase -> the chains that it names: "[/EN#101/people/clothing Two cooks] stir", of 101."""
    chains = defaultdict(set)
    for sentence in sentences:
        for chain, words in re.findall(r"\[/EN#(\d+)(?:/\w+)+ ([^\]]+)\]", sentence):
            words = re.sub(r" ([,.;:!?'])", r"\1", words.strip()).lower()
            chains[words].add(chain)
    return chains


def flickr30k(path: Path, counts: Counts) -> Iterator[dict]:
    """Flickr30k Entities: a folder with Annotations/, Sentences/, train.txt, UNRELATED_CAPTIONS.

    A row for each distinct phrase that names boxes in the sentences about a picture.
    """
    unrelated = set((path / "UNRELATED_CAPTIONS").read_text(encoding="utf-8").splitlines())
    for key in (path / "train.txt").read_text(encoding="utf-8").split():
        with counts.each():
            size, boxes = entity_boxes(path / "Annotations" / f"{key}.xml")
            lines = (path / "Sentences" / f"{key}.txt").read_text(encoding="utf-8").split("\n")
            chains = phrase_chains([line for number, line in enumerate(lines, 1)
                                    if f"{key} {number}" not in unrelated])
            for number, (words, named) in enumerate(chains.items()):
                with counts.each():
                    if len(named) > 1:
                        raise Drop("the phrase names different things in one picture")
                    found = boxes.get(*named)
                    if not found:
                        raise Drop("the phrase has no box")
                    yield grounding_row("flickr30k", "train", f"{key}/{number}",
                                        f"flickr30k-images/{key}.jpg", size, words, sorted(found))
