"""The rows of published data sets written to a file: judged, counted, gone on with after a stop.

The file appears as OUT.part beside a note of how far it is, OUT.part.json, and becomes OUT in the
end, with OUT.report.json: rows read and written, and what became of the others.
"""

import fcntl
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from clip import open_image
from data import check_row
from prepare_data.rows import NOT_XYWH, NOT_XYXY, Drop, Item, Note
from common.files import build, check_same, read_json, write_json

PUBLISHED = {  # rows of the files that the paper's counts come from
    "blip_laion_cc_sbu_558k": 558_128,
    "llava_v1_5_mix665k": 665_298,
    "ALLaVA-Caption-LAION-4V": 468_670,
    "ALLaVA-Instruct-LAION-4V": 468_670,
    "ALLaVA-Caption-VFLAN-4V": 194_977,
    "ALLaVA-Instruct-VFLAN-4V": 194_254,
}
BLOCK = 256  # records handled at a time
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
    report: dict = field(default_factory=dict)  # source -> read, written, ...

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
            remedy = f"give that again, or remove {part} to begin anew"
            check_same(part, progress.settings, settings, remedy)
            if part.stat().st_size < progress.bytes:
                raise ValueError(f"{part} is shorter than {notes} says: remove {part}")
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
