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
import fcntl
import gc
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import field as attribute
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from box_sources import coco, evaluation_images, flickr30k, objects365, refcoco
from clip import open_image
from data import check_row, scan_lines
from data_sources import (
    NOT_XYWH,
    NOT_XYXY,
    Drop,
    Item,
    Note,
    allava,
    docvqa,
    docvqa_cmarkea,
    llava_mix665k,
    llava_pretrain,
    own,
    scienceqa,
    vsr,
)
from demo_data import easy_vqa
from files import build, one_line, read_json, replace_text, write_json

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
PUBLISHED = {  # rows of the files that the paper's counts come from
    "blip_laion_cc_sbu_558k": 558_128,
    "llava_v1_5_mix665k": 665_298,
    "ALLaVA-Caption-LAION-4V": 468_670,
    "ALLaVA-Instruct-LAION-4V": 468_670,
    "ALLaVA-Caption-VFLAN-4V": 194_977,
    "ALLaVA-Instruct-VFLAN-4V": 194_254,
}
BLOCK = 256  # records handled at a time
READ_IN_FOLDERS = (".json", ".p", ".parquet", ".txt", ".xml")
OURS = (".part.json", ".report.json")  # where OUT lies among its inputs
SAVE_SECONDS = 2.0  # between two notes of the progress
MAX_MISFORMED = 1e-3  # share of the rows; a wrong format makes more
COCO_NAME = re.compile(r"(?:^|[/_])(\d{12})\.jpg$")
ENCODE = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode
Source = tuple[str, Iterable[Item]]


# ---------------------------------------------------------------------------------- one row


def judge(item: Item, excluded: set[int]) -> Item:
    """A row as it is, or the Drop that it deserves: not as rows are, unsafe path, excluded."""
    if not isinstance(item, dict):
        return item
    name = item["image"]
    if name is not None:
        if name[:1] == "/" or "\\" in name or "\0" in name or ".." in name.split("/"):
            return Drop("the image's path leaves the root of the pictures")
        found = COCO_NAME.search(name) if excluded else None
        if found and int(found[1]) in excluded:
            return Drop("its picture is on the list of --exclude-images", fault=False)
    try:
        check_row(item)
    except ValueError as error:
        return Drop(str(error))
    return item


def inspect(root: Path, name: str) -> tuple[int, int] | Drop:
    """(width, height) of a picture below `root`, decoded whole, or why it cannot be used."""
    path = root / name
    try:
        if not path.resolve().is_relative_to(root):
            return Drop("the image's path leaves the root of the pictures")
        return open_image(path).size
    except FileNotFoundError:
        return Drop("the picture is missing")
    except Exception:  # Pillow's decoders raise a dozen kinds
        return Drop("the picture is broken")


def inspect_all(items: list[Item], root: Path, pool: ThreadPoolExecutor) -> list[Item]:
    """The items, a Drop in the place of each row whose picture cannot be used."""
    rows = [item for item in items if isinstance(item, dict) and item["image"] is not None]
    names = list(dict.fromkeys(row["image"] for row in rows))
    found = dict(zip(names, pool.map(lambda name: inspect(root, name), names), strict=True))

    def verdict(item: Item) -> Item:
        result = found.get(item["image"]) if isinstance(item, dict) else None
        if isinstance(result, Drop):
            return result
        if result and "boxes" in item and result != (item["width"], item["height"]):
            return Drop("the picture is not of the size that its boxes are for")
        return item

    return [verdict(item) for item in items]


# ---------------------------------------------------------------------------------- all rows


@dataclass
class Progress:
    """How far a conversion is; kept in a file beside the half-written one."""

    settings: dict  # what the output depends on
    source: int = 0  # number of the source being read
    items: int = 0  # that came from it so far
    bytes: int = 0  # written
    report: dict = attribute(default_factory=dict)  # source -> read, written, ...

    def total(self, what: str) -> int:
        """Rows "read" or "written", of all sources."""
        return sum(counts[what] for counts in self.report.values())


@contextmanager
def half_written(out: Path, settings: dict) -> Iterator[tuple[BinaryIO, Progress]]:
    """`OUT.part`, cut back to where its progress was last noted, and locked; and that progress."""
    if out.exists():
        raise ValueError(f"{out} is there already; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    part, notes = Path(f"{out}.part"), Path(f"{out}.part.json")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {part}") from None
        progress = Progress(settings)
        if notes.exists() and part.stat().st_size:
            progress = build(Progress, read_json(notes), str(notes))
            changed = [name for name in settings if progress.settings.get(name) != settings[name]]
            if changed or part.stat().st_size < progress.bytes:
                raise ValueError(f"{part} was begun with another {', '.join(changed) or 'file'}; "
                                 f"give that again, or remove {part} to begin anew")
        file.truncate(progress.bytes)
        try:
            yield file, progress
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()
                notes.unlink(missing_ok=True)


def note_progress(file: BinaryIO, out: Path, progress: Progress) -> None:
    """Note the progress, after what it speaks of is on disk."""
    file.flush()
    os.fsync(file.fileno())
    write_json(Path(f"{out}.part.json"), asdict(progress))


def write_block(
    items: list[Item], source: str, progress: Progress, file: BinaryIO | None
) -> None:
    """Count judged items, write those that are rows."""
    counts = progress.report.setdefault(
        source, {"read": 0, "written": 0, "dropped": {}, "faults": {}, "notes": {}})
    progress.items += len(items)
    for item in items:
        if isinstance(item, Note):
            counts["notes"][item] = counts["notes"].get(item, 0) + 1
            continue
        counts["read"] += 1
        if isinstance(item, dict):
            try:
                line = (ENCODE(item) + "\n").encode()
            except UnicodeEncodeError:
                item = Drop("a text with half a character")
        if isinstance(item, Drop):
            reasons = counts["faults" if item.fault else "dropped"]
            reasons[item.reason] = reasons.get(item.reason, 0) + 1
            continue
        counts["written"] += 1
        progress.bytes += len(line)
        if file:
            file.write(line)


def run_sources(
    sources: list[Source],
    progress: Progress,
    file: BinaryIO | None,  # None: only count
    out: Path,
    excluded: set[int],
    limit: int | None,
    root: Path | None,  # None: pictures are not inspected
    workers: int,
) -> None:
    """Write what the sources yield from where `progress` is."""
    noted = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        for number, (name, items) in enumerate(sources):
            if number < progress.source:
                continue
            items = iter(items)
            deque(islice(items, progress.items), maxlen=0)  # done before the stop
            while True:
                size = BLOCK if limit is None else min(BLOCK, limit - progress.total("written"))
                block = [judge(item, excluded) for item in islice(items, size)]
                if not block:
                    break
                if root is not None:
                    block = inspect_all(block, root, pool)
                write_block(block, name, progress, file)
                if file and time.monotonic() - noted >= SAVE_SECONDS:
                    note_progress(file, out, progress)
                    print(f"{name}: {progress.total('read'):,} rows", file=sys.stderr)
                    noted = time.monotonic()
            progress.source, progress.items = number + 1, 0


class Misformed(ValueError):
    """The boxes of a file are of another form: what was made of it is wrong."""


def convert(
    sources: list[Source],
    out: Path,
    settings: dict,
    excluded: set[int] | None = None,
    limit: int | None = None,
    root: Path | None = None,
    workers: int = 1,
    max_faults: float = 0.01,
    dry_run: bool = False,
) -> dict:
    """Write `out` and OUT.report.json from the sources, and return the report.

    ValueError, `OUT.part` kept, where more than `max_faults` of the rows are not as published.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: 1 or more")
    root = root.resolve() if root else None
    rest = (out, excluded or set(), limit, root, workers)
    if dry_run:
        progress = Progress(settings)
        run_sources(sources, progress, None, *rest)
        check_report(progress, limit, max_faults)
        return progress.report
    with half_written(out, settings) as (file, progress):
        run_sources(sources, progress, file, *rest)
        note_progress(file, out, progress)
        try:
            check_report(progress, limit, max_faults)
        except Misformed:
            file.truncate(0)  # of no use to any later run
            raise
        if not progress.total("written"):
            raise ValueError("no row was written: is it the file that this data set has?")
        write_json(Path(f"{out}.report.json"), asdict(progress))
        Path(file.name).rename(out)
        Path(f"{file.name}.json").unlink()
    return progress.report


def check_report(progress: Progress, limit: int | None, max_faults: float) -> None:
    """Print what became of the rows. Raises ValueError where too many were not as published."""
    show_report(progress, limit)
    faults = sum(sum(counts["faults"].values()) for counts in progress.report.values())
    for reason in (NOT_XYXY, NOT_XYWH):
        boxes = sum(counts["faults"].get(reason, 0) for counts in progress.report.values())
        if boxes > MAX_MISFORMED * progress.total("read"):
            raise Misformed(f"{boxes} of {progress.total('read')} rows: {reason}")
    if faults > max_faults * progress.total("read"):
        raise ValueError(f"{faults} of {progress.total('read')} rows are not as published; what "
                         "was written is kept, and a higher --max-faults accepts them")


def show_report(progress: Progress, limit: int | None) -> None:
    """Print rows read, written, dropped by reason, of each source."""
    for source, counts in progress.report.items():
        print(f"{source}: {counts['read']:,} read, {counts['written']:,} written")
        for what in ("dropped", "faults", "notes"):
            for reason, number in sorted(counts[what].items()):
                print(f"    {what.removesuffix('s')}: {number:,}  {reason}")
        usual = PUBLISHED.get(source, counts["read"])
        if limit is None and usual != counts["read"]:
            print(f"    {usual:,} rows were published: this file is another version, or a part")


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
