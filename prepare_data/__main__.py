"""Published data sets -> our JSONL: one conversation a line, pictures under one root.

    python -m prepare_data llava-mix665k llava_v1_5_mix665k.json data/llava-mix665k.jsonl

docs/data.md describes the rows and the data sets. The same input gives the same bytes. OUT appears
when all is done, or not at all.
"""

import argparse
import signal
from collections.abc import Set
from functools import partial
from itertools import chain
from pathlib import Path

from common.files import one_line
from prepare_data import boxes, questions
from prepare_data.easy_vqa import easy_vqa
from prepare_data.rows import Counts, convert

READERS = {  # command -> what yields the rows of one input
    "llava-pretrain": partial(questions.llava, source="llava_pretrain", folder="llava_pretrain/"),
    "allava": partial(questions.llava, source="allava"),
    "llava-mix665k": partial(questions.llava, source="llava_mix665k"),
    "docvqa-cmarkea": questions.docvqa_cmarkea,
    "vsr": questions.vsr,
    "scienceqa": questions.scienceqa,
    "refcoco": boxes.refcoco,
    "coco": partial(boxes.detections, source="coco"),
    "flickr30k": boxes.flickr30k,
    "objects365": partial(boxes.detections, source="objects365"),
}


def excluded_images(args: argparse.Namespace) -> Set[int]:
    """COCO numbers of the pictures to leave out; for RefCOCO's own train rows it is the default."""
    folder = args.exclude_images
    if folder is None and args.command == "refcoco" and args.split == "train":
        folder = args.inputs[0].parent  # REFER, which holds all three sets
    if folder is None and args.command == "coco":
        raise ValueError("COCO holds the pictures that RefCOCO is evaluated on: give "
                         "--exclude-images REFER, or --exclude-images none")
    if folder in (None, "none"):
        return set()
    try:
        return boxes.evaluation_images(Path(folder))
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: it names pictures that grounding is "
                         "evaluated on; --exclude-images none keeps them in training") from None


@one_line("prepare_data")
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m prepare_data", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=[*READERS, "easy-vqa"])
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="published files or folders")
    add("out", type=Path, metavar="OUT", help="JSONL file to write (easy-vqa: a folder)")
    add("--images", type=Path, metavar="ROOT", help="root of all pictures: DocVQA's go there")
    add("--exclude-images", metavar="REFER", help="folder with refcoco/, refcoco+/, refcocog/: "
        "leave out each picture that they are evaluated on; or none")
    add("--split", help="of RefCOCO [train]")
    add("--max-malformed", type=float, default=0.01, metavar="SHARE",
        help="of rows not as published: more is an error [0.01]")
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: OUT is cleaned up
    if (args.command == "easy-vqa") == bool(args.inputs):
        parser.error("easy-vqa takes OUT alone, every other command INPUT... OUT")
    if args.command == "easy-vqa":
        for what, count in easy_vqa(args.out).items():
            print(f"{what}: {count}")
        return
    if args.split and args.command != "refcoco":
        parser.error("--split is for refcoco")
    args.split = args.split or "train"
    if args.images is None and args.command == "docvqa-cmarkea":
        raise ValueError("--images ROOT is missing: the folder that all pictures are below")
    own = {"docvqa-cmarkea": {"root": args.images}, "refcoco": {"split": args.split}}
    read, counts = partial(READERS[args.command], **own.get(args.command, {})), Counts()
    rows = chain.from_iterable(read(path, counts) for path in args.inputs)
    try:
        convert(rows, counts, args.out, excluded_images(args), args.max_malformed)
    except (AttributeError, LookupError, TypeError) as error:  # rows' own faults are counted
        raise ValueError(f"an annotation file is not as published: {error!r}") from None


if __name__ == "__main__":
    main()
