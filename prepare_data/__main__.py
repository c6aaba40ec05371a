"""Published data sets -> our JSONL: one conversation a line, pictures under one root.

    python convert_data.py llava-mix665k llava_v1_5_mix665k.json sft.jsonl
    python convert_data.py mix sft.jsonl=665 docvqa.jsonl=50 instruct.jsonl --rows 715000
    python convert_data.py COMMAND --help

A row: {"id", "image": path under the root or null, "workflow", "source", "split", "conversations":
[{"from": "human" or "gpt", "value"}, ...]}; `<image>` and a newline open the first human value
where there is a picture. "independent": true marks a row whose questions do not build on each
other. Rows with boxes add "width", "height", "boxes" (pixels, xyxy).

Files of any size pass through in constant memory; the same input gives the same bytes. Started
again after a stop, a conversion goes on where it was.
"""

import argparse
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prepare_data.boxes import coco, evaluation_images, flickr30k, objects365, refcoco
from data import check_row, scan_lines
from prepare_data.questions import (
    allava,
    docvqa,
    docvqa_cmarkea,
    llava_mix665k,
    llava_pretrain,
    own,
    scienceqa,
    vsr,
)
from prepare_data.writing import Source, convert
from prepare_data.easy_vqa import easy_vqa
from common.files import one_line, replace_text

DATASETS = {  # command -> its reader, the reader's settings and their defaults
    "llava-pretrain": (llava_pretrain, {"folder": "llava_pretrain/"}),
    "allava": (allava, {"folder": "", "text_rows": "mm"}),
    "llava-mix665k": (llava_mix665k, {"folder": "", "text_rows": "mm"}),
    "docvqa-cmarkea": (docvqa_cmarkea, {"root": None, "single": False}),
    "docvqa": (docvqa, {"folder": "docvqa/"}),
    "vsr": (vsr, {"root": None, "with_test": False}),
    "scienceqa": (scienceqa, {"folder": "scienceqa/images/", "text_rows": "mm",
                              "splits": ["train", "val"]}),
    "refcoco": (refcoco, {"folder": "coco/train2014/", "split": "train"}),
    "coco": (coco, {"folder": None, "order": "x1", "max_boxes": 20}),
    "flickr30k": (flickr30k, {"folder": "flickr30k-images/", "max_boxes": 20}),
    "objects365": (objects365, {"folder": "objects365/train/", "order": "x1", "max_boxes": 20}),
    "own": (own, {"folder": "", "text_rows": "mm", "split": "train"}),
}
SETTINGS = {  # of a reader, as options
    "folder": {"help": "its pictures' folder under the root of all pictures"},
    "text_rows": {"choices": ["mm", "drop"], "help": "what text-only rows train"},
    "single": {"action": "store_true", "help": "a row a question, not a row a picture"},
    "with_test": {"action": "store_true", "help": "accept a file that holds test rows"},
    "splits": {"nargs": "+", "choices": ["train", "val", "test"], "help": "splits to take"},
    "split": {"help": "the split to take, or of own rows, to name"},
    "order": {"choices": ["x1", "area", "file"], "help": "order of a row's boxes"},
    "max_boxes": {"type": int, "help": "rows with more are dropped"},
}
READ_IN_FOLDERS = (".json", ".p", ".parquet", ".txt", ".xml")
OURS = (".part.json", ".report.json")  # where OUT lies among its inputs


# ---------------------------------------------------------------------------------- mixing


def shares(weights: list[float], rows: int) -> list[int]:
    """`rows` shared out by weight: whole numbers, each within one of its part, that add up.

    >>> shares([665, 50], 100)
    [93, 7]
    """
    if rows < 1 or not all(0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ValueError(f"cannot share out {rows} rows by the weights {weights}")
    parts = [rows * weight / sum(weights) for weight in weights]
    whole = [int(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda place: whole[place] - parts[place])
    for place in order[: rows - sum(whole)]:
        whole[place] += 1
    return whole


def chosen_rows(path: Path, rows: int, wanted: int, seed: list[int]) -> Iterator[dict]:
    """`wanted` rows of a file of `rows`, in its order: each equally often, the rest by chance.

    A row's second copy has "~2" behind its id, and so on.
    """
    times, rest = divmod(wanted, rows)
    counts = np.full(rows, times, np.int32)
    counts[np.random.default_rng(seed).permutation(rows)[:rest]] += 1
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1)
                 if len(line) > 2 or line.strip())  # those that scan_lines counts
        for (number, line), count in zip(lines, counts, strict=True):
            for copy in range(1, count + 1):
                try:
                    row = check_row(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
                yield row | {"id": f"{row['id']}~{copy}"} if copy > 1 else row


def mixed(parts: list[str], rows: int | None, seed: int) -> list[Source]:
    """The sources of a mix. A part is FILE=WEIGHT, or FILE, which weighs what it has in rows."""
    paths, weights = [], []
    for part in parts:
        path, sign, weight = part.rpartition("=")
        weighted = sign and re.fullmatch(r"\d+(\.\d+)?", weight)
        paths.append(Path(path if weighted else part))
        weights.append(float(weight) if weighted else None)
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a file is named twice: give it one weight")
    sizes = [len(scan_lines(path)[0]) for path in paths]
    weights = [size if weight is None else weight
               for weight, size in zip(weights, sizes, strict=True)]
    wanted = shares(weights, sum(sizes) if rows is None else rows)
    return [(str(path), chosen_rows(path, size, number, [seed, place]))
            for place, (path, size, number) in enumerate(zip(paths, sizes, wanted, strict=True))]


# ---------------------------------------------------------------------------------- command line


def read_ids(path: Path) -> set[int]:
    """Numbers of pictures, one a line; ValueError where a line is none."""
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        return {int(line) for line in lines if line.strip() and not line.startswith("#")}
    except ValueError as error:
        raise ValueError(f"{path}: numbers of COCO pictures, one a line, are expected "
                         f"({error})") from None


def excluded_images(args: argparse.Namespace) -> set[int]:
    """The pictures to leave out: for grounding on COCO's, by default all that are evaluated on."""
    if args.exclude_images == "none":
        return set()
    if args.exclude_images:
        return read_ids(Path(args.exclude_images))
    if args.command == "refcoco" and args.split == "train":
        return set().union(*map(evaluation_images, {folder.parent for folder in args.inputs}))
    if args.command == "coco":
        raise ValueError("COCO holds the pictures that RefCOCO is evaluated on: give "
                         "--exclude-images FILE (python convert_data.py leakage REFER FILE), "
                         "or --exclude-images none")
    return set()


def stamp(path: Path) -> list:
    """What tells whether an input is still the same. FileNotFoundError where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob("*")
        if file.suffix in READ_IN_FOLDERS and file.is_file()
        and not file.name.startswith(".") and not file.name.endswith(OURS))
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [str(path), hashlib.sha256(repr(facts).encode()).hexdigest()[:16]]


def convert_mix(args: argparse.Namespace) -> None:
    """Run the command mix."""
    sources = mixed(args.parts, args.rows, args.seed)
    identity = {"parts": args.parts, "rows": args.rows, "seed": args.seed,
                "inputs": [stamp(Path(name)) for name, _ in sources]}
    convert(sources, args.out, identity, dry_run=args.dry_run)


def convert_dataset(args: argparse.Namespace) -> None:
    """Run a command of DATASETS."""
    read, defaults = DATASETS[args.command]
    settings = {name: getattr(args, name) for name in defaults if name != "root"}
    if settings.get("folder"):
        settings["folder"] = settings["folder"].rstrip("/") + "/"
    if args.check_images and not args.images or args.command == "docvqa-cmarkea" and not (
            args.images or args.dry_run):
        raise ValueError("--images ROOT is missing: the folder that all pictures are below")
    inputs = [stamp(path) for path in args.inputs]
    if len({path.stem for path in args.inputs}) < len(inputs):
        raise ValueError("two inputs have the same name, so their rows would have: convert them "
                         "one at a time")
    excluded = excluded_images(args)
    digest = hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()[:16]
    identity = settings | {
        "command": args.command, "limit": args.limit, "check_images": args.check_images > 0,
        "inputs": inputs,
        "images": args.images and str(args.images), "excluded": [len(excluded), digest]}
    root = {"root": None if args.dry_run else args.images} if "root" in defaults else {}
    sources = [(path.stem, read(path, **settings, **root)) for path in args.inputs]
    convert(sources, args.out, identity, excluded, args.limit,
            args.images if args.check_images else None, max(args.check_images, 1),
            args.max_faults, args.dry_run)


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about.split("\n")[0], description=about,
                                   allow_abbrev=False)

    command = add("easy-vqa", "the demo's data, out of the package easy-vqa")
    command.add_argument("out", type=Path, help="folder to write; the root of its pictures")
    command = add("leakage", "write the list of COCO pictures that RefCOCO/+/g are evaluated on")
    command.add_argument("refer", type=Path, help="folder with refcoco/, refcoco+/, refcocog/")
    command.add_argument("out", type=Path, help="list to write, for --exclude-images")
    command = add("mix", "join JSONL files, each by its weight, to a number of rows")
    command.add_argument("parts", nargs="+", metavar="FILE=WEIGHT",
                         help="a file of rows; without a weight it weighs what it has in rows")
    command.add_argument("out", type=Path, help="JSONL file to write")
    command.add_argument("--rows", type=int, help="exact number of rows [all]")
    command.add_argument("--seed", type=int, default=0, help="of the rows chosen by chance [0]")
    command.add_argument("--dry-run", action="store_true", help="count, write nothing")
    for name, (read, defaults) in DATASETS.items():
        command = add(name, read.__doc__)
        command.add_argument("inputs", nargs="+", type=Path, metavar="input",
                             help="the published file or folder; several are read in turn")
        command.add_argument("out", type=Path, help="JSONL file to write")
        command.add_argument("--images", type=Path, metavar="ROOT", help="root of all pictures")
        command.add_argument("--check-images", type=int, nargs="?", const=os.cpu_count(), default=0,
                             metavar="N", help="decode every picture, N at a time [all cores]")
        command.add_argument("--exclude-images", metavar="FILE",
                             help="COCO numbers of pictures to leave out, or none")
        command.add_argument("--limit", type=int, metavar="N", help="stop after N rows written")
        command.add_argument("--max-faults", type=float, default=0.01, metavar="SHARE",
                             help="of rows not as published: more is an error [0.01]")
        command.add_argument("--dry-run", action="store_true", help="count, write nothing")
        for setting, default in defaults.items():
            if setting != "root":
                about = dict(SETTINGS[setting], default=default)
                about["help"] += "" if default in (None, False) else f" [{default}]"
                command.add_argument("--" + setting.replace("_", "-"), **about)
    return parser


@one_line("convert_data.py")
def main() -> None:
    """Command line."""
    args = command_line().parse_args()
    gc.set_threshold(100_000)  # rows hold no cycles: the search for them took a tenth of the time
    if args.command == "easy-vqa":
        for what, count in easy_vqa(args.out).items():
            print(f"{what}: {count}")
    elif args.command == "leakage":
        found = sorted(evaluation_images(args.refer))
        head = "# COCO pictures in val and test of RefCOCO, RefCOCO+ (unc) and RefCOCOg (umd)\n"
        replace_text(args.out, head + "".join(f"{number}\n" for number in found))
        print(f"{len(found)} pictures")
    else:
        with one_line("convert_data.py", "the same command goes on from what is written"):
            (convert_mix if args.command == "mix" else convert_dataset)(args)


if __name__ == "__main__":
    main()
