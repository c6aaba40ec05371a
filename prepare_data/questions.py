"""Published data sets of questions and answers, one function each: from the file to our rows.

A function yields items (`rows.py`) in an order that depends on the file alone. It holds one record
at a time in memory, except `scienceqa`, whose file is small.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.files import read_json
from data import ONE_LETTER, ONE_WORD
from prepare_data.rows import Item, clean, conversation, each, make_row, read_list

SUFFIXES = {b"\x89PN": "png", b"\xff\xd8\xff": "jpg", b"GIF": "gif", b"RIF": "webp"}


def llava(path: Path, source: str, folder: str = "") -> Iterator[Item]:
    """LLaVA's form: a list of {"id", "image" (or none), "conversations"}; pictures in `folder`."""

    def talk(numbered: tuple[int, dict]) -> Iterator[Item]:
        number, record = numbered
        turns, image = record["conversations"], record.get("image")
        if turns[0]["from"] == "gpt":  # an answer without a question: left out, as LLaVA does
            turns = turns[1:]
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError("human and gpt do not take turns")
        texts = [turn["value"] for turn in turns]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        key = f"{record.get('id', record.get('idx'))}#{number}"  # some ids repeat
        yield make_row(source, "train", key, image and folder + image,
                       conversation(pairs, image is not None))

    return each(enumerate(read_list(path)), talk)


def docvqa_cmarkea(path: Path, root: Path | None) -> Iterator[Item]:
    """cmarkea/doc-vqa: a folder with `train-*.parquet`; a row for each English question.

    The pictures inside the files are written to ROOT/docvqa/train/.
    """
    from pyarrow.dataset import dataset  # only here: the demo's data set does without it

    parts = sorted(map(str, path.rglob("train-*.parquet")))
    if not parts:
        raise FileNotFoundError(f"{path}: no train-*.parquet below it")
    if root is None:
        raise ValueError("--images ROOT is missing: the pictures of this data set go there")
    folder = root / "docvqa/train"

    def picture(record: dict) -> Iterator[Item]:
        key, content, pairs = record["id"], record["image"]["bytes"], record["qa"]["en"]
        if not re.fullmatch(r"[\w.-]+", key):
            raise ValueError("'id' is no file name")
        name = f"{key}.{SUFFIXES[content[:3]]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        for number, pair in enumerate(pairs):
            turns = conversation([(pair["question"], pair["answer"])])
            yield make_row("docvqa_cmarkea", "train", f"{key}/{number}", f"docvqa/train/{name}",
                           turns)

    batches = dataset(parts, format="parquet").to_batches(
        columns=["id", "image", "qa"], batch_size=16, batch_readahead=1, fragment_readahead=1)
    return each((record for batch in batches for record in batch.to_pylist()), picture)


def vsr(path: Path) -> Iterator[Item]:
    """VSR: `train.jsonl` and `dev.jsonl` of `data/splits/random`; pictures of COCO 2017."""

    def statement(numbered: tuple[int, bytes]) -> Iterator[Item]:
        number, record = numbered[0], json.loads(numbered[1])
        folder = "val2017" if "/val2017/" in record["image_link"] else "train2017"
        question = f"Is this statement about the picture true? {clean(record['caption'])}{ONE_WORD}"
        turns = conversation([(question, {0: "No", 1: "Yes"}[record["label"]])])
        yield make_row("vsr", path.stem, f"{number:06}", f"coco/{folder}/{record['image']}", turns)

    with open(path, "rb") as lines:
        yield from each(enumerate(lines), statement)


def scienceqa(path: Path) -> Iterator[Item]:
    """ScienceQA's train and val: folder `data/scienceqa`, `problems.json`, `pid_splits.json`."""
    problems = read_json(path / "problems.json")
    splits = read_json(path / "pid_splits.json", "train", "val")

    def problem(item: tuple[str, str]) -> Iterator[Item]:
        split, key = item
        record = problems[key]
        choices, hint = record["choices"], record["hint"].strip()
        letters = "ABCDEFGHIJ"[: len(choices)]
        lines = [f"Context: {hint}"] if hint else []
        lines.append(clean(record["question"]))
        lines += [f"{letter}. {choice.strip()}"
                  for letter, choice in zip(letters, choices, strict=True)]
        image = f"scienceqa/images/{split}/{key}/{record['image']}" if record["image"] else None
        pair = "\n".join(lines) + ONE_LETTER, letters[record["answer"]]
        yield make_row("scienceqa", split, key, image, conversation([pair], image is not None))

    return each(((split, key) for split in ("train", "val") for key in splits[split]), problem)
