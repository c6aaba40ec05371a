"""From JSONL rows and pictures on disk to a `Batch`; boxes as text and back.

- Targets are shifted here and nowhere else: `targets[t]` is the token after `tokens[t]`, or -100
  where it is not scored.
- A row may hold independent questions about one picture. They share a prefix with the picture and
  do not see each other.
- The rows of a training step are a function of (seed, step), so the step is the only position in
  the data that a checkpoint must keep.

Letters: B batch, T tokens, N images, S side of an image in pixels, P image tokens.
Sources: LLaVA (arXiv 2304.08485) for rows, the official IAA release for boxes.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from tokenization.templates import IMAGE, render, render_independent
from tokenization.tokenizer import Tokenizer

UNSCORED = -100
MAX_SKIPPED = 100  # rows in a row
ONE_WORD = "\nAnswer the question using a single word or phrase."
ONE_LETTER = "\nAnswer with the option's letter from the given choices directly."
GROUNDING_PROMPT = (
    "Please provide the bounding box coordinate of the region this sentence describes: {}"
)


class RowError(ValueError):
    """One row cannot be used; the message says why."""


@dataclass
class Example:
    """One row as token ids: (T,) int64 each. Positions and segments: of independent questions."""

    tokens: Tensor
    targets: Tensor  # the next token, UNSCORED where it is not scored
    positions: Tensor | None = None
    segments: Tensor | None = None  # 0: seen by all, k: by itself
    cut: bool = False  # longer than the rows allowed


def check_row(row) -> dict:
    """`row` itself if it has the form that docs/data.md describes; RowError if not."""
    names = ("id", "workflow")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
        raise RowError("not a JSON object with texts 'id' and 'workflow'")
    if "image" not in row or not isinstance(row["image"], str | None):
        raise RowError("'image' must be a path, or null")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("'conversations' is missing or empty")
    for number, turn in enumerate(turns, 1):
        turn = turn if isinstance(turn, dict) else {}
        speaker, text = turn.get("from"), turn.get("value")
        if speaker != ("gpt", "human")[number % 2]:
            raise RowError(f"turn {number} is from {speaker!r}: human and gpt in turn, human first")
        if not isinstance(text, str) or not text.strip():
            raise RowError(f"turn {number} has no text")
    if len(turns) % 2:
        raise RowError("the last question has no answer")
    if turns[0]["value"].startswith(IMAGE) != (row["image"] is not None):
        raise RowError("the first question must open with '<image>\\n' "
                       "if, and only if, there is an image")
    return row


def shift(ids: list[int], scored: list[bool]) -> tuple[list[int], list[int]]:
    """(tokens, targets): the target of a token is the id after it. The last id is only a target."""
    following = zip(ids[1:], scored[1:], strict=True)
    return ids[:-1], [token if counts else UNSCORED for token, counts in following]


def encode_row(
    row: dict,  # as `check_row` wants it
    tokenizer: Tokenizer,
    image_tokens: int,
    template: str | None = None,
    system: str | None = None,
    max_tokens: int | None = None,
) -> Example:
    """Tokens and targets of a row, cut at `max_tokens`. RowError where nothing scored is left.

    With `"independent": true` each question is a segment after the shared prefix. Its positions
    restart there, so it is trained exactly as if it were asked alone. Where such a row is too long,
    whole questions are left out at its end.
    """
    image_tokens = 0 if row["image"] is None else image_tokens
    texts = [turn["value"] for turn in row["conversations"]]
    longest, positions, segments = max_tokens or 2**62, None, None
    if row.get("independent"):
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        tokens, questions = render_independent(tokenizer, pairs, template, system, image_tokens)
        prefix, targets = len(tokens), [UNSCORED] * len(tokens)
        positions, segments, cut = list(range(prefix)), [0] * prefix, False
        for number, question in enumerate(questions, 1):
            own_tokens, own_targets = shift(*question)
            cut = len(tokens) + len(own_tokens) > longest
            if cut:
                break
            tokens, targets = tokens + own_tokens, targets + own_targets
            positions += range(prefix, prefix + len(own_tokens))
            segments += [number] * len(own_tokens)
    else:
        turns = [(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
        tokens, targets = shift(*render(tokenizer, turns, template, system, image_tokens))
        cut = len(tokens) > longest
        tokens, targets = tokens[:longest], targets[:longest]
    if all(target == UNSCORED for target in targets):
        raise RowError(f"no word of an answer within {max_tokens} tokens")
    columns = (tokens, targets, positions, segments)
    columns = (None if column is None else torch.tensor(column) for column in columns)
    return Example(*columns, cut)


class JsonlDataset(Dataset):
    """Rows of JSONL files, read from disk when asked for; memory holds 20 bytes a row.

    `lengths` (rows,) int64 are bytes a row, a free stand-in for tokens. A file missing or without
    rows is an error at once, a broken row when it is read.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        root: str | Path,  # no picture is read from outside of it
        tokenizer: Tokenizer | None = None,  # from here on: for examples only
        image_tokens: int = 0,
        transform: Callable[[Path], Tensor] | None = None,  # a picture's file to (3, S, S)
        template: str | None = None,
        system: str | None = None,
        max_tokens: int | None = None,
    ):
        self.paths, self.root = [Path(path) for path in paths], Path(root).resolve()
        self.transform = transform
        self.tokenizer, self.image_tokens = tokenizer, image_tokens
        self.template, self.system, self.max_tokens = template, system, max_tokens
        tables = [scan_lines(path) for path in self.paths]
        columns = zip(*tables, strict=True)
        self.starts, self.lengths, self.lines = (np.concatenate(column) for column in columns)
        self.ends = np.cumsum([len(table[0]) for table in tables])  # first row of the next file

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, index: int) -> str:
        """The file and the line of a row."""
        return f"{self.paths[np.searchsorted(self.ends, index, 'right')]}:{self.lines[index]}"

    def row(self, index: int) -> dict:
        """A row, checked. RowError with file and line."""
        with open(self.paths[np.searchsorted(self.ends, index, "right")], "rb") as file:
            file.seek(self.starts[index])
            line = file.read(self.lengths[index])
        try:
            return check_row(json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as error:
            raise RowError(f"{self.where(index)}: {error}") from None

    def pixels(self, name: str) -> Tensor:
        """A picture below the root (3, S, S). RowError where it is elsewhere, missing, broken."""
        try:
            return self.transform(path_below(self.root, name))
        except RowError:
            raise
        except (ValueError, OSError, RuntimeError) as error:  # the last: links in a ring
            raise RowError(f"image {name[:200]!r} is broken: {error}"[:500]) from None

    def example(self, index: int) -> tuple[Example, Tensor | None]:
        """A row as (Example, pixels or None). RowError with file and line."""
        row = self.row(index)
        try:
            example = encode_row(
                row, self.tokenizer, self.image_tokens, self.template, self.system, self.max_tokens)
            return example, None if row["image"] is None else self.pixels(row["image"])
        except RowError as error:
            raise RowError(f"{self.where(index)}: {error}") from None

    def __getitem__(self, index: int) -> tuple[Example, Tensor | None, list[str]]:
        """A row, or the next that can be used; what was skipped, and why.

        Raises ValueError where none of `MAX_SKIPPED` in a row can: more likely a wrong root, or a
        whole folder that is missing, than broken rows.
        """
        skipped = []
        for offset in range(min(MAX_SKIPPED, len(self))):
            try:
                return *self.example((index + offset) % len(self)), skipped
            except RowError as error:
                skipped.append(str(error))
        raise ValueError(f"none of {len(skipped)} rows in a row can be used: {skipped[0]}")


def path_below(root: Path, name: str) -> Path:
    """The picture `name` of a row, below `root`. RowError where it is elsewhere or missing."""
    root, shown = root.resolve(), repr(name[:200])
    path = root / name.replace("\0", "?")
    inside = ".." not in path.parts and path.resolve().is_relative_to(root)
    if not inside or Path(name).is_absolute():
        raise RowError(f"image {shown} is not below {root}")
    if not path.is_file():
        raise RowError(f"image {shown} does not exist below {root}")
    return path


def scan_lines(path: Path, block_bytes: int = 1 << 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first byte, bytes, number) of each line that is not empty. ValueError where all are."""
    ends, size = [], 0
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            ends.append(size + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")))
            size += len(block)
        ends = np.concatenate([*ends, [size]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        lengths, full = ends - starts, ends - starts > 2
        for line in np.flatnonzero(~full):  # "\n" and "\r\n" are empty, "{\n" is a broken row
            file.seek(starts[line])
            full[line] = bool(file.read(lengths[line]).strip())
    if not full.any():
        raise ValueError(f"{path}: no rows in it")
    return starts[full], lengths[full], np.flatnonzero(full).astype(np.int32) + 1


# ---------------------------------------------------------------------------------- batches


class Sampler:
    """The rows of a step's batch: a function of (seed, step) whose permutation is cached.

    Epochs, each a permutation of all rows, stand end to end. Of each `window` batches of that
    stream the rows are sorted by length, cut into batches, and these shuffled: similar lengths
    together, and each row comes once an epoch.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0, window: int = 16):
        if len(lengths) < 1 or batch_size < 1:
            raise ValueError(f"batches of {batch_size} out of {len(lengths)} rows")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.window = max(1, min(window, len(lengths) // batch_size))  # batches, an epoch at most
        self._epoch = self._number = None

    def rows(self, step: int) -> list[int]:
        """Indices of the rows of `step` (from 0), short ones first."""
        number, place = divmod(step, self.window)
        if number != self._number:
            order = np.random.default_rng([self.seed, 1, number]).permutation(self.window)
            batches = self._cut(number * self.window * self.batch_size)
            self._number, self._batches = number, batches[order]
        return self._batches[place].tolist()

    def _cut(self, first: int) -> np.ndarray:
        """(window, batch_size): rows from place `first` of the stream on, sorted by length."""
        parts, last = [], first + self.window * self.batch_size
        while first < last:
            epoch, start = divmod(first, len(self.lengths))
            if epoch != self._epoch:
                generator = np.random.default_rng([self.seed, 0, epoch])
                self._epoch, self._order = epoch, generator.permutation(len(self.lengths))
            parts.append(self._order[start : start + last - first])
            first += len(parts[-1])
        rows = np.concatenate(parts)
        rows = rows[np.argsort(self.lengths[rows], kind="stable")]
        return rows.reshape(self.window, self.batch_size)


@dataclass
class Batch:
    """Rows side by side, padded on the right."""

    tokens: Tensor  # (B, T) int64, P placeholders an image
    targets: Tensor  # (B, T) int64, shifted, UNSCORED where not scored
    images: Tensor | None  # (N, 3, S, S) float
    positions: Tensor | None  # (B, T) int64, None: 0 to T - 1
    segments: Tensor | None  # (B, T) int64, -1 at pads, None: plain causal text
    lengths: Tensor  # (B,) int64, without pads
    skipped: list[str]  # rows that could not be used, and why
    cut: int = 0  # rows of which only the beginning is here

    @property
    def scored(self) -> int:
        """Number of targets that count."""
        return int((self.targets != UNSCORED).sum())

    def to(self, device: str | torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        there = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()
                 if isinstance(value, Tensor)}
        return replace(self, **there)


def collate(items: list, pad_id: int, image_id: int, image_tokens: int) -> Batch:
    """Batch of (Example, pixels or None, skipped). ValueError: placeholders do not match images."""
    examples, pictures, skipped = zip(*items, strict=True)
    for example, pixels in zip(examples, pictures, strict=True):
        found, wanted = int((example.tokens == image_id).sum()), image_tokens * (pixels is not None)
        if found != wanted:
            raise ValueError(f"{found} image placeholders in a row whose image takes {wanted}")

    def pad(columns: list[Tensor], value: int) -> Tensor:
        return pad_sequence(columns, batch_first=True, padding_value=value)  # (B, T)

    positions = segments = None
    if any(e.segments is not None for e in examples):  # rows without: one segment, counted from 0
        plain = [(torch.arange(len(e.tokens)), torch.zeros_like(e.tokens)) for e in examples]
        own = [p if e.segments is None else (e.positions, e.segments)
               for e, p in zip(examples, plain, strict=True)]
        positions, segments = pad([pair[0] for pair in own], 0), pad([pair[1] for pair in own], -1)
    images = [pixels for pixels in pictures if pixels is not None]
    return Batch(
        pad([e.tokens for e in examples], pad_id),
        pad([e.targets for e in examples], UNSCORED),
        torch.stack(images) if images else None,  # (N, 3, S, S)
        positions,
        segments,
        torch.tensor([len(e.tokens) for e in examples]),
        [reason for reasons in skipped for reason in reasons],
        sum(e.cut for e in examples),
    )


def loader(
    dataset: JsonlDataset, batches: Iterable[list[int]], workers: int = 0
) -> Iterator[Batch]:
    """A `Batch` for each list of rows, prepared ahead by `workers` processes (0: on demand, here).

    Workers end with the iterator. One that dies is a RuntimeError "DataLoader worker ...".
    """
    own_random = torch.Generator()  # else torch draws the workers' seed from the global state
    words = dataset.tokenizer
    make_batch = functools.partial(collate, pad_id=words.pad_id, image_id=words.image_id,
                                   image_tokens=dataset.image_tokens)
    try:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                              collate_fn=make_batch, generator=own_random,
                              multiprocessing_context="fork" if workers else None)
    except (EOFError, ValueError, OSError) as error:  # a worker's comes with its traceback, as text
        broken = workers and isinstance(error, (EOFError, ConnectionError))
        if broken and "Caught" not in str(error):  # it died as it handed over a batch
            raise RuntimeError("DataLoader worker exited unexpectedly") from None  # as torch says
        told = str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()
        raise type(error)(told) from None


# ---------------------------------------------------------------------------------- boxes

BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([r"([0-9]{1,4}(?:\.[0-9]{1,8})?)"] * 4) + r"\s*\]")
Box = tuple[float, float, float, float]  # x1, y1, x2, y2


def padded_square(width: int, height: int) -> tuple[int, int, int]:
    """(side, left border, top border), in pixels, of the square that a picture is padded to."""
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2


def boxes_to_text(boxes_px: Iterable[Box], width: int, height: int) -> str:
    """Boxes in pixels as the model writes them: fractions of the padded square, empty ones dropped.

    >>> boxes_to_text([(100, 50, 300, 250)], 640, 480)
    '[0.16, 0.2, 0.47, 0.52]'
    """
    side, left, top = padded_square(width, height)
    texts = []
    for x1, y1, x2, y2 in boxes_px:
        x1, x2 = (round((min(max(x, 0), width) + left) / side, 2) for x in (x1, x2))
        y1, y2 = (round((min(max(y, 0), height) + top) / side, 2) for y in (y1, y2))
        if x1 < x2 and y1 < y2:
            texts.append(f"[{x1}, {y1}, {x2}, {y2}]")
    return "; ".join(texts)


def text_to_boxes(text: str, width: int, height: int) -> list[Box]:
    """Boxes that an answer names, in pixels: numbers in 0..1, x1 < x2, y1 < y2; others dropped."""
    side, left, top = padded_square(width, height)
    found = (tuple(map(float, match.groups())) for match in BOX.finditer(text))
    return [
        (x1 * side - left, y1 * side - top, x2 * side - left, y2 * side - top)
        for x1, y1, x2, y2 in found
        if x1 < x2 <= 1 and y1 < y2 <= 1
    ]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)) - both)
