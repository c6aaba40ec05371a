"""Published data files read a piece at a time: JSON of any size, boxes, plain pickles, parquet.

Nothing here runs what a file says: pickles may hold plain values only. Whatever is wrong with a
file is one ValueError that names it.
"""

import json
import pickle
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20  # characters read at a time
LONGEST = 1 << 26  # characters of one value: a file whose value does not end by then is broken
SPACE = re.compile(r"[ \t\r\n]*")
DECODE = json.JSONDecoder().raw_decode


class JsonText:
    """A cursor over the text of a JSON file, which holds one value and one chunk at a time."""

    def __init__(self, path: Path, file):
        self.path, self.file = path, file
        self.text, self.at, self.before, self.ended = "", 0, 0, False

    def error(self) -> ValueError:
        """What to raise where the text is not JSON, or stops."""
        why = "the file ends there: is it complete?" if self.ended else "is it damaged?"
        return ValueError(f"{self.path}: not JSON from character {self.before + self.at} on; {why}")

    def read_on(self) -> None:
        """Forget what is behind the cursor; at least as much again as is ahead of it is read."""
        block = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.before += self.at
        self.text, self.at, self.ended = self.text[self.at:] + block, 0, not block

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def take(self, accepted: str) -> str:
        """Step over one of the `accepted` characters."""
        found = self.peek()
        if not found or found not in accepted:
            raise self.error()
        self.at += 1
        return found

    def value(self):
        """Step over a value. It may be cut off at the end of what is read so far: then read on."""
        self.peek()
        while True:
            try:
                value, end = DECODE(self.text, self.at)
                if end + 2 < len(self.text) or self.ended:  # "1" may yet become "1e+9"
                    self.at = end
                    return value
            except (ValueError, RecursionError):
                if self.ended or len(self.text) - self.at > LONGEST:
                    raise self.error() from None
            self.read_on()

    def elements(self) -> Iterator:
        """Step over a list, element by element."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[tuple[str, object]]:
        """Step over an object: (key, value), or (key, element) of each value that is a list."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.error()
            key = self.value()
            self.take(":")
            for value in self.elements() if self.peek() == "[" else [self.value()]:
                yield key, value
            if self.take(",}") == "}":
                return


def stream_json(path: Path, kind: str) -> Iterator:
    """The elements of the list (`kind` "[") that a file holds, or the members of its object ("{").

    Members come as (key, value), a value that is a list as (key, element) for each element.
    Raises ValueError where the file is something else, or stops half way.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = JsonText(path, file)
        try:
            if text.peek() not in ("[", "{"):
                raise text.error()
            if text.peek() != kind:
                raise ValueError(f"{path}: a JSON {'list' if kind == '[' else 'object'} is "
                                 f"expected, this is the other kind: another data set's file?")
            yield from text.elements() if kind == "[" else text.members()
            if text.peek():
                raise text.error()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text") from None


def is_whole(value) -> bool:
    """Whether `value` is an integer that a database column takes."""
    return type(value) is int and abs(value) < 1 << 53


def is_text(value) -> bool:
    """Whether `value` is a text, without halves of characters."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_box(value) -> bool:
    """Whether `value` is a list of four numbers of a picture's order."""
    return (isinstance(value, list) and len(value) == 4
            and all(type(v) in (int, float) and abs(v) < 1e9 for v in value))


def load_detections(path: Path) -> sqlite3.Connection:
    """COCO-style annotations as tables `images`, `categories`, `boxes`, `malformed`.

    The database is a temporary file of SQLite's own, gone when it is closed: memory stays small
    however many boxes there are. Boxes stay x, y, width, height.
    """
    base = sqlite3.connect("")  # on disk, where SQLITE_TMPDIR or TMPDIR says
    base.executescript("""
        create table images (id integer primary key, name text, width integer, height integer);
        create table categories (id integer primary key, name text);
        create table boxes (id integer primary key, image integer, category integer,
                            crowd integer, x real, y real, w real, h real);
        create table malformed (kind text);
    """)
    try:
        fill_detections(base, path)
    except sqlite3.Error as error:
        raise OSError(f"{path}: its temporary database: {error}; TMPDIR says where that is "
                      "written") from None
    for table in ("images", "boxes", "categories"):
        if not base.execute(f"select 1 from {table} limit 1").fetchone():
            raise ValueError(f"{path}: no {table} in it: not an annotation file in COCO's form")
    return base


def fill_detections(base: sqlite3.Connection, path: Path) -> None:
    """Put what an annotation file holds into the tables of `load_detections`."""
    for kind, item in stream_json(path, "{"):
        if kind not in ("images", "annotations", "categories"):
            continue
        entry = item if isinstance(item, dict) else {}
        number, name = entry.get("id"), entry.get("file_name" if kind == "images" else "name")
        if kind == "annotations":
            owners, bbox = [entry.get("image_id"), entry.get("category_id")], entry.get("bbox")
            good = all(map(is_whole, owners)) and is_box(bbox)
            values = (*owners, bool(entry.get("iscrowd")), *bbox) if good else ()
            query = "insert or ignore into boxes values (?, ?, ?, ?, ?, ?, ?, ?)"
        elif kind == "images":
            values = name, entry.get("width"), entry.get("height")
            good = is_text(name) and all(is_whole(side) and side > 0 for side in values[1:])
            query = "insert or ignore into images values (?, ?, ?, ?)"
        else:
            good, values = is_text(name), (name,)
            query = "insert or ignore into categories values (?, ?)"
        good = good and is_whole(number)
        if not good or not base.execute(query, (number, *values)).rowcount:
            base.execute("insert into malformed values (?)", [kind])


class PlainUnpickler(pickle.Unpickler):
    """An unpickler of lists, dicts, texts and numbers: it refuses to look up anything by name."""

    def find_class(self, module: str, name: str):
        """Called for every class and function that a pickle names: those are how code would run."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: Path):
    """The plain value in a pickle of Python 2 or 3. ValueError where it holds anything else."""
    for encoding in ("ASCII", "latin1"):  # of Python 2's byte strings
        try:
            with open(path, "rb") as file:
                return PlainUnpickler(file, encoding=encoding).load()
        except UnicodeDecodeError as error:
            reason = error
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged pickles raise a dozen kinds
            reason = error
            break
    raise ValueError(f"{path}: refused, not a pickle of plain values ({reason})")


def read_parquet(path: Path, columns: list[str]) -> Iterator[dict]:
    """Rows of a parquet file, a few at a time. ValueError: no pyarrow, a broken file, a column."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError("parquet files need pyarrow: "
                         "pip install -r requirements-eval.txt") from None
    try:
        with ParquetFile(path, buffer_size=CHUNK) as file:
            missing = sorted(set(columns) - set(file.schema_arrow.names))
            if missing:
                raise ValueError(f"{path}: no column {missing[0]!r}; "
                                 f"there are {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error)[:200]})") from None
