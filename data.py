"""From JSONL rows and pictures on disk to a `Batch`; boxes as text and back.

- Targets are shifted here and nowhere else: `targets[t]` is the token after `tokens[t]`, or -100
  where it is not scored.
- `render` (tokenization/templates.py) puts P placeholder ids where <image> stands in a question.
  `IAA.place_images` puts image features there.
- Independent questions about one picture share a row and its prefix, and do not see each other.
- The rows of a training step are a function of (seed, step), so the step is the only position in
  the data that a checkpoint must keep.

Letters: B batch, T tokens, N images, S side of an image in pixels, P image tokens.
Sources: LLaVA (arXiv 2304.08485) for rows, the official IAA release for boxes.
"""

import errno
import functools
import hashlib
import json
import os
import re
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from tokenization.templates import IMAGE, TAG, render, without_tags
from tokenization.tokenizer import Tokenizer

UNSCORED = -100  # the index that torch's cross-entropy ignores by default
MAX_SKIPPED = 100  # consecutive unusable rows; more mean a wrong `images` in the configuration
LINE = np.dtype([  # where a row is, in 24 bytes: millions of rows stay on disk
    ("file", np.int32), ("number", np.int32), ("start", np.int64), ("bytes", np.int64)])
BLOCK, BLOCKS = 1 << 16, 256  # bytes of a block, and how many `fingerprint` reads
READ = {"id", "source", "split", "workflow", "conversations", "from", "value"}  # hold no picture
PICTURE = re.compile("image|img|picture|photo|video", re.I)  # in the name of a key that holds one
SUFFIX = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|jp2|mp4)\b", re.I)
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # others: the disk fails
ONE_WORD = "\nAnswer the question using a single word or phrase."
GROUNDING_PROMPT = (  # the official release's, to the letter: the model is trained on this sentence
    "Please provide the bounding box coordinate of the region this sentence describes: {}"
)


class RowError(ValueError):
    """One row cannot be used; the message says why."""


@dataclass
class Example:
    """One row as token ids: (T,) int64 each."""

    tokens: Tensor
    targets: Tensor  # the next token, UNSCORED where it is not scored
    positions: Tensor  # each independent question starts where the prefix ends
    segments: Tensor  # 0: the prefix, visible to all; k: question k, visible to itself only
    pictures: int  # how many of the row's pictures are left after a cut at max_tokens
    cut: bool  # the row was longer than max_tokens


def pictures_of(record: dict) -> list[str]:
    """The pictures of a row or of a published record: the path or paths in its "image".

    RowError where a key of a turn, `images` or, without "image", any other key holds a picture.
    """
    image = record.get("image")
    pairs = [pair for turn in record["conversations"] for pair in turn.items()]
    pairs += [pair for pair in record.items() if image is None or pair[0] == "images"]
    for key, value in pairs:
        if key not in READ and value and (PICTURE.search(key) or SUFFIX.search(str(value))):
            raise RowError(f"a picture under {key!r}: it must be under 'image'")
    if image is None:
        return []
    paths = image if isinstance(image, list) else [image]
    if not (paths and all(isinstance(path, str) and path for path in paths)):
        raise RowError("'image' must be a path, a list of paths, or null")
    return paths


def frame_of(row: dict) -> tuple[int, int] | None:
    """(width, height) of the last picture, which a row's boxes refer to; None without boxes."""
    return (row["width"], row["height"]) if row.get("boxes") is not None else None


def check_row(row) -> dict:
    """`row` itself if it has the form that docs/data.md describes; RowError if not."""
    try:
        pictures, _, turns = len(pictures_of(row)), frame_of(row), row["conversations"]
        speakers, texts = ([turn[key] for turn in turns] for key in ("from", "value"))
    except (AttributeError, LookupError, TypeError) as error:  # a key or a value of another kind
        raise RowError(f"not a row as in docs/data.md: {error!r}") from None
    if row.get("independent") not in (None, True, False):
        raise RowError("'independent' must be true or false")
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        raise RowError("turns must be of human and gpt in turn, human first and gpt last")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError("a turn has no text")
    tags = [text.count(TAG) for text in texts]
    asked, answered = sum(tags[::2]), sum(tags[1::2])
    if asked != pictures or answered:  # else a question about a picture that nobody sees
        raise RowError(f"{pictures} pictures, but '<image>' {asked} times in questions and "
                       f"{answered} in answers: each picture needs one, in a question")
    return row


def encode_row(
    row: dict, tokenizer: Tokenizer, image_tokens: int, template: str | None = None,
    system: str | None = None, max_tokens: int | None = None,
) -> Example:
    """Tokens and targets of a checked row, cut at `max_tokens`. RowError: nothing scored is left.

    A conversation is plain causal text, however many turns it has. With `"independent": true` each
    question is a segment that sees itself and a prefix with all pictures, as if asked alone.
    """
    pictures = IMAGE * len(pictures_of(row))
    turns = [("user" if turn["from"] == "human" else "assistant", turn["value"])
             for turn in row["conversations"]]
    asked = [turns]
    if row.get("independent") and template != "plain":  # "plain" drops questions
        if max_tokens and len(pictures_of(row)) * image_tokens >= max_tokens:  # not even encoded
            raise RowError(f"no word of an answer within {max_tokens} tokens")
        asked = [[("user", pictures + without_tags(text)), answer]
                 for (_, text), answer in zip(turns[::2], turns[1::2], strict=True)]
    # One more, empty question: so the common prefix ends where the questions begin.
    rendered = [render(tokenizer, each, template, system, image_tokens)
                for each in ([("user", pictures)], *asked)]
    prefix = len(os.path.commonprefix([ids for ids, _ in rendered]))
    tokens, targets, positions, segments = [], [], [], []
    for segment, (ids, scored) in enumerate(rendered[1:], 1):
        places = range(prefix if tokens else 0, len(ids) - 1)  # the last id is only a target
        tokens += [ids[t] for t in places]
        targets += [ids[t + 1] if scored[t + 1] else UNSCORED for t in places]
        positions += places  # each question restarts behind the prefix
        segments += [segment if t >= prefix else 0 for t in places]
    shown, part = divmod(tokens[:max_tokens].count(tokenizer.image_id), image_tokens or 1)
    kept = len(tokens[:max_tokens]) - part  # a picture is kept whole or not at all
    columns = [torch.tensor(column[:kept]) for column in (tokens, targets, positions, segments)]
    if (columns[1] == UNSCORED).all():  # such a row would cost time and teach nothing
        raise RowError(f"no word of an answer within {max_tokens} tokens")
    return Example(*columns, shown, cut=kept < len(tokens))


def path_below(root: Path, name: str) -> Path:
    """The picture `name` of a row, below `root`. RowError where it is elsewhere or missing."""
    path, real = root / name, os.path.realpath  # the latter resolves links and ".."
    if not Path(real(path)).is_relative_to(real(root)):
        raise RowError(f"image {name!r} is not below {root}, where its links lead")
    try:
        if stat.S_ISREG(path.stat().st_mode):  # a pipe would block whoever reads it
            return path
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
    raise RowError(f"image {name!r} does not exist below {root}")


def find_rows(paths: Iterable[str | Path]) -> Iterator[tuple[int, int, int, int]]:
    """(file number, line number, start byte, bytes) of each line that is not empty."""
    for file_number, path in enumerate(paths):
        start = 0
        with open(path, "rb") as file:  # bytes, as `seek` needs byte offsets
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield file_number, number, start, len(line)
                start += len(line)


def fingerprint(paths: Iterable[str | Path]) -> dict[str, str]:
    """Path -> size, and SHA-256 of evenly spread blocks: of the whole file up to 16 MiB."""
    found = {}
    for path in paths:
        size, digest = os.path.getsize(path), hashlib.sha256()
        with open(path, "rb") as file:
            for start in np.linspace(0, max(0, size - BLOCK), BLOCKS, dtype=int).tolist():
                file.seek(start)
                digest.update(file.read(BLOCK))
        found[str(path)] = f"{size} bytes, sha256 {digest.hexdigest()}"
    return found


@dataclass(eq=False)
class JsonlDataset(Dataset):
    """Rows of JSONL files, read from disk when asked for.

    `lengths` (rows,) are the rows' bytes. A missing file, or no row at all, raises at once. `row`
    raises for a broken row, indexing skips it.
    """

    paths: list[str | Path]
    root: str | Path  # all pictures must be below it
    tokenizer: Tokenizer | None = None  # from here on: what `example` needs
    image_tokens: int = 0
    # (file, the (width, height) that its boxes are for, or None) -> pixels (3, S, S)
    transform: Callable[[Path, tuple[int, int] | None], Tensor] | None = None
    template: str | None = None
    system: str | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        self.lines = np.fromiter(find_rows(self.paths), LINE)
        self.lengths = self.lines["bytes"]  # for sorting: a cheap estimate
        if not len(self.lines):
            raise ValueError(f"no rows in {', '.join(map(str, self.paths))}")

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> dict:
        """A row, checked. RowError says what is wrong with it."""
        line = self.lines[index]
        with open(self.paths[line["file"]], "rb") as file:  # no open file is shared with a worker
            file.seek(line["start"])
            text = file.read(line["bytes"])
        try:
            return check_row(json.loads(text.decode("utf-8-sig")))  # some editors write a BOM
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise RowError(str(error)) from None

    def example(self, index: int) -> tuple[Example, Tensor | None]:
        """A row as (Example, (N, 3, S, S) or None). ValueError says why it cannot be used."""
        row = self.row(index)
        example = encode_row(
            row, self.tokenizer, self.image_tokens, self.template, self.system, self.max_tokens)
        names = pictures_of(row)
        sizes = [None] * (len(names) - 1) + [frame_of(row)]  # boxes are for the last picture
        images = [self.transform(path_below(Path(self.root), name), size)
                  for name, size in zip(names[: example.pictures], sizes, strict=False)]
        return example, torch.stack(images) if images else None

    def __getitem__(self, index: int) -> tuple[Example, Tensor | None, list[str]]:
        """A row, or the next that can be used; what was skipped, and why.

        ValueError where none of `MAX_SKIPPED` rows can; OSError where disk or memory fails.
        """
        skipped = []
        for offset in range(min(MAX_SKIPPED, len(self))):
            number = (index + offset) % len(self)  # deterministic: a run can resume
            try:
                return *self.example(number), skipped
            except ValueError as error:
                line = self.lines[number]
                where = f"{self.paths[line['file']]}:{line['number']}"
                skipped.append(f"{where}: {error}"[:500])  # an error may quote all of a long name
        raise ValueError(f"none of {len(skipped)} consecutive rows can be used: {skipped[0]}")


@functools.lru_cache(maxsize=4)  # 2 epochs and a window: shuffling millions of rows takes 50 ms
def permutation(seeds: tuple[int, ...], length: int) -> np.ndarray:
    """0 to length - 1, shuffled by `seeds`."""
    return np.random.default_rng(seeds).permutation(length)


class Sampler:
    """The rows of a step's batch: a function of (seed, step).

    The stream is epoch after epoch, each a permutation of all rows. A window of `window` batches is
    sorted by length and cut into batches, which then need little padding; their order is random. A
    window across two epochs is dealt to the batches by row number: none repeats a row.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0, window: int = 16):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        # At most one epoch (or one batch), so that a row is in a window twice at most.
        self.window = max(1, min(window, len(lengths) // batch_size))

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of `step` (from 0), short ones first."""
        number, place = divmod(step, self.window)
        size, total = self.window * self.batch_size, len(self.lengths)
        first = number * size  # place of the window in the stream
        epochs = range(first // total, (first + size - 1) // total + 1)  # 2 across an end
        stream = np.concatenate([permutation((self.seed, 0, epoch), total) for epoch in epochs])
        rows = stream[first % total :][:size]
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]  # stable: ties keep their order
        batches = rows.reshape(self.window, self.batch_size)
        if len(epochs) > 1:  # a row's two copies are neighbours here: two batches get them
            batches = np.sort(rows).reshape(self.batch_size, self.window).T
        order = permutation((self.seed, 1, number), self.window)  # else long rows come last
        return sorted(batches[order[place]].tolist(), key=lambda row: self.lengths[row])


@dataclass
class Batch:
    """Rows side by side, padded on the right."""

    tokens: Tensor  # (B, T) int64, P placeholders an image
    targets: Tensor  # (B, T) int64, shifted, UNSCORED where not scored
    images: Tensor | None  # (N, 3, S, S) float, in the order of their placeholders
    positions: Tensor | None  # (B, T) int64, None: 0 to T - 1
    segments: Tensor | None  # (B, T) int64, -1 at pads, None: plain causal attention
    lengths: Tensor  # (B,) int64, without pads
    skipped: list[str]  # rows that could not be used, and why
    cut: int = 0  # rows that were longer than max_tokens

    @property
    def scored(self) -> int:
        """Number of targets that count."""
        return int((self.targets != UNSCORED).sum())

    def to(self, device: str | torch.device, copy: bool = False) -> "Batch":
        """The batch with its tensors, or with copies of them, on `device`."""
        there = {name: value.to(device, non_blocking=True, copy=copy)
                 for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **there)


def collate(items: list, pad_id: int) -> Batch:
    """The batch of some items of a `JsonlDataset`."""
    examples, images, skipped = zip(*items, strict=True)
    images = [pixels for pixels in images if pixels is not None]  # (N, 3, S, S) of a row

    def pad(name: str, value: int) -> Tensor:  # (B, T)
        columns = [getattr(example, name) for example in examples]
        return pad_sequence(columns, batch_first=True, padding_value=value)

    segments = pad("segments", -1)  # no real token sees a pad
    has_segments = bool((segments > 1).any())  # else no mask is needed, which is faster
    return Batch(
        pad("tokens", pad_id),
        pad("targets", UNSCORED),
        torch.cat(images) if images else None,
        pad("positions", 0) if has_segments else None,
        segments if has_segments else None,
        torch.tensor([len(example.tokens) for example in examples]),
        [reason for reasons in skipped for reason in reasons],
        sum(example.cut for example in examples),
    )


def loader(
    dataset: JsonlDataset, batches: Iterable[list[int]], workers: int = 0
) -> Iterator[Batch]:
    """A `Batch` for each list of rows, prepared ahead by `workers` processes (0: on demand, here).

    Workers end with the iterator, and ignore SIGTERM. RuntimeError if one dies.
    """
    try:
        yield from DataLoader(
            dataset, batch_sampler=batches, num_workers=workers,
            collate_fn=lambda items: collate(items, dataset.tokenizer.pad_id),
            worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN),
            generator=torch.Generator(),  # else torch seeds workers from the global random state
            multiprocessing_context="fork" if workers else None)  # the lambda cannot be pickled
    except (EOFError, ConnectionError):  # a worker died as it handed over a batch
        raise RuntimeError("DataLoader worker exited unexpectedly") from None
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        error.__traceback__ = None  # it keeps torch's iterator alive, and so the workers
        kind = type(error)  # a worker's text is a whole traceback: keep its last line
        text = str(error).rpartition(f"{kind.__name__}: ")[2].strip()
        raise kind(text.rpartition("\n")[2]) from None


# Four plain decimals, without sign or exponent.
BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"([0-9]{1,4}(?:\.[0-9]{1,8})?)"] * 4) + r"\s*\]")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2


def padded_square(width: int, height: int) -> tuple[int, int, int]:
    """(side, left border, top border), in pixels, of the square that a picture is padded to."""
    side = max(width, height)  # the model sees the padded square, so boxes are fractions of it
    return side, (side - width) // 2, (side - height) // 2


def boxes_to_text(boxes_px: Iterable[Box], width: int, height: int) -> str:
    """Boxes in pixels as the model writes them: fractions of the padded square, empty ones dropped.

    >>> boxes_to_text([(100, 50, 300, 250)], 640, 480)
    '[0.16, 0.2, 0.47, 0.52]'
    """
    side, left, top = padded_square(width, height)
    texts = []
    for x1, y1, x2, y2 in boxes_px:  # two decimals, as the paper's figures: 1 % of the side
        x1, x2 = (round((min(max(x, 0), width) + left) / side, 2) for x in (x1, x2))
        y1, y2 = (round((min(max(y, 0), height) + top) / side, 2) for y in (y1, y2))
        if x1 < x2 and y1 < y2:  # after rounding, which may have emptied it
            texts.append(f"[{x1}, {y1}, {x2}, {y2}]")
    return "; ".join(texts)


def text_to_boxes(text: str, width: int, height: int) -> list[Box]:
    """The boxes of an answer, in pixels: those with x1 < x2 <= 1 and y1 < y2 <= 1 as fractions."""
    side, left, top = padded_square(width, height)
    found = (tuple(map(float, match.groups())) for match in BOX.finditer(text))
    return [(x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top)
            for x1, y1, x2, y2 in found
            if x1 < x2 <= 1 and y1 < y2 <= 1]  # drops swapped corners, and boxes in pixels


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)  # negative where they do not overlap
    return both / (sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - both)
