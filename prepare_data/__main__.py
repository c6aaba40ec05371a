"""Published data sets -> our JSONL: one conversation a line, pictures under one root.

    python -m prepare_data llava-mix665k llava_v1_5_mix665k.json data/llava-mix665k.jsonl
    python -m prepare_data COMMAND --help

docs/data.md describes the rows and the data sets. The same input gives the same bytes. OUT appears
when all is done, or not at all.
"""

import argparse
from collections.abc import Set
from itertools import chain
from pathlib import Path

from common.files import one_line
from prepare_data import boxes, questions
from prepare_data.easy_vqa import easy_vqa
from prepare_data.rows import convert

DATASETS = {  # command -> its reader, and the arguments that the reader takes
    "llava-pretrain": (questions.llava_pretrain, []),
    "allava": (questions.allava, []),
    "llava-mix665k": (questions.llava_mix665k, []),
    "docvqa-cmarkea": (questions.docvqa_cmarkea, ["images"]),
    "vsr": (questions.vsr, ["images", "with_test"]),
    "scienceqa": (questions.scienceqa, ["with_test"]),
    "refcoco": (boxes.refcoco, ["split"]),
    "coco": (boxes.coco, []),
    "flickr30k": (boxes.flickr30k, []),
    "objects365": (boxes.objects365, []),
}


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "python -m prepare_data", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "the demo's data, out of the package easy-vqa"
    command = commands.add_parser("easy-vqa", help=about, description=about)
    command.add_argument("out", type=Path, help="folder to write; the root of its pictures")
    for name, (read, names) in DATASETS.items():
        about = read.__doc__
        command = commands.add_parser(name, help=about.split("\n")[0], description=about,
                                      allow_abbrev=False)
        add = command.add_argument
        add("inputs", nargs="+", type=Path, metavar="input",
            help="the published file or folder; several are read in turn")
        add("out", type=Path, help="JSONL file to write")
        add("--images", type=Path, metavar="ROOT", help="root of all pictures")
        add("--check-images", action="store_true", help="decode every picture below --images")
        add("--exclude-images", metavar="REFER",
            help="folder with refcoco/, refcoco+/, refcocog/: leave out each picture that they are "
            "evaluated on; or none")
        add("--no-text-rows", action="store_true", help="drop the rows without a picture")
        add("--limit", type=int, metavar="N", help="stop after N rows")
        add("--max-rows", type=int, metavar="N", help="keep N rows, drawn with a fixed seed")
        add("--max-malformed", type=float, default=0.01, metavar="SHARE",
            help="of rows not as published: more is an error [0.01]")
        if "with_test" in names:
            add("--with-test", action="store_true", help="take the test rows, too")
        if "split" in names:
            add("--split", default="train", help="the split to take [train]")
    return parser


def excluded_images(args: argparse.Namespace) -> Set[int]:
    """COCO numbers of the pictures to leave out; for RefCOCO's own train rows it is the default."""
    folder = args.exclude_images
    if folder is None and args.command == "refcoco" and args.split == "train":
        folder = args.inputs[0].parent
    if folder is None and args.command == "coco":
        raise ValueError("COCO holds the pictures that RefCOCO is evaluated on: give "
                         "--exclude-images REFER, or --exclude-images none")
    return boxes.evaluation_images(Path(folder)) if folder not in (None, "none") else set()


def convert_dataset(args: argparse.Namespace) -> None:
    """Run a command of DATASETS."""
    if args.check_images and args.images is None:
        raise ValueError("--images ROOT is missing: the folder that all pictures are below")
    if any(number is not None and number < 1 for number in (args.limit, args.max_rows)):
        raise ValueError("--limit and --max-rows: 1 or more")
    if len({path.stem for path in args.inputs}) < len(args.inputs):
        raise ValueError("two inputs have the same name, so the ids of their rows would repeat: "
                         "convert them one at a time")
    read, names = DATASETS[args.command]
    settings = {name: getattr(args, name) for name in names}
    items = chain.from_iterable(read(path, **settings) for path in args.inputs)
    convert(items, args.out, excluded_images(args), args.images if args.check_images else None,
            not args.no_text_rows, args.limit, args.max_rows, args.max_malformed)


@one_line("prepare_data")
def main() -> None:
    """Command line."""
    args = command_line().parse_args()
    try:
        if args.command == "easy-vqa":
            for what, count in easy_vqa(args.out).items():
                print(f"{what}: {count}")
        else:
            convert_dataset(args)
    except ModuleNotFoundError as error:
        file = "demo" if args.command == "easy-vqa" else "data"
        raise ValueError(f"the package {error.name} is missing: "
                         f"pip install -r requirements/{file}.txt") from None


if __name__ == "__main__":
    main()
