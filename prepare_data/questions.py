"""Published data sets of questions and answers, one function each: from the file to our rows.

A function holds a few records at a time in memory, except `scienceqa`, whose file is small.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.files import read_json
from data import ONE_WORD, pictures_of
from prepare_data.rows import Counts, clean, make_row, read_list

ONE_LETTER = "\nAnswer with the option's letter from the given choices directly."
SUFFIXES = {b"\x89PN": "png", b"\xff\xd8\xff": "jpg", b"GIF": "gif", b"RIF": "webp"}


def llava(path: Path, counts: Counts, source: str, folder: str = "") -> Iterator[dict]:
    """LLaVA's form: a list of {"id", "image" (or none), "conversations"}; pictures in `folder`."""
    for number, record in enumerate(read_list(path)):
        with counts.each():
            turns, images = record["conversations"], pictures_of(record)
            if turns[0]["from"] == "gpt":  # an answer without a question: left out, as LLaVA does
                turns = turns[1:]
            if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
                raise ValueError("human and gpt do not take turns")
            texts = [turn["value"] for turn in turns]
            key = f"{record.get('id', record.get('idx'))}#{number}"  # some ids repeat
            yield make_row(source, "train", key, [folder + image for image in images],
                           zip(texts[::2], texts[1::2], strict=True))


def docvqa_cmarkea(path: Path, counts: Counts, root: Path) -> Iterator[dict]:
    """cmarkea/doc-vqa: a folder with `train-*.parquet`; a row for each English question.

    The pictures inside the files are written to ROOT/docvqa/train/.
    """
    from pyarrow.parquet import ParquetFile  # only here: the demo's data set does without it

    folder, seen = root / "docvqa/train", set()
    batches = (batch for part in sorted(path.rglob("train-*.parquet"))
               for batch in ParquetFile(part).iter_batches(16, columns=["id", "image", "qa"]))
    for record in (record for batch in batches for record in batch.to_pylist()):
        with counts.each():
            key, content = record["id"], record["image"]["bytes"]
            if not re.fullmatch(r"[\w.-]+", key):
                raise ValueError("'id' is no file name")
            if key in seen:  # its picture would replace the other's
                raise ValueError("'id' is another picture's")
            seen.add(key)
            name = f"{key}.{SUFFIXES[content[:3]]}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            for number, pair in enumerate(record["qa"]["en"]):
                with counts.each():  # one bad question does not take the others along
                    yield make_row("docvqa_cmarkea", "train", f"{key}/{number}",
                                   [f"docvqa/train/{name}"], [(pair["question"], pair["answer"])])


def vsr(path: Path, counts: Counts) -> Iterator[dict]:
    """VSR: `train.jsonl` and `dev.jsonl` of `data/splits/random`; pictures of COCO 2017."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            with counts.each():
                record = json.loads(line)
                folder = "val2017" if "/val2017/" in record["image_link"] else "train2017"
                caption, answer = clean(record["caption"]), {0: "No", 1: "Yes"}[record["label"]]
                question = f"Is this statement about the picture true? {caption}{ONE_WORD}"
                yield make_row("vsr", path.stem, f"{number:06}",
                               [f"coco/{folder}/{record['image']}"], [(question, answer)])


def scienceqa(path: Path, counts: Counts) -> Iterator[dict]:
    """ScienceQA's train and val: folder `data/scienceqa`, `problems.json`, `pid_splits.json`."""
    problems = read_json(path / "problems.json")
    splits = read_json(path / "pid_splits.json", train=list[str], val=list[str])
    asked = [(split, key) for split in ("train", "val") for key in splits[split]]
    for split, key in asked:
        with counts.each():
            record = problems[key]
            image, hint, choices = record["image"], record["hint"].strip(), record["choices"]
            letters = "ABCDEFGHIJ"[: len(choices)]
            lines = [f"Context: {hint}"] if hint else []
            lines.append(clean(record["question"]))
            lines += [f"{letter}. {choice.strip()}"
                      for letter, choice in zip(letters, choices, strict=True)]
            pair = "\n".join(lines) + ONE_LETTER, letters[record["answer"]]
            images = [f"scienceqa/images/{split}/{key}/{image}"] if image else []
            yield make_row("scienceqa", split, key, images, [pair])
