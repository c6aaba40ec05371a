"""Published data sets of questions and answers, one function each: from the file to our rows.

A function yields rows and Drops (`rows.py`) in an order that depends on the file alone. It holds
one record at a time in memory, except `scienceqa`, whose file is small.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from common.files import new_file, read_json
from data import ONE_LETTER, ONE_WORD
from prepare_data.rows import Drop, Item, clean, conversation, each, make_row, read_list

SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp"}


# ---------------------------------------------------------------------------------- LLaVA's form


def llava_form(path: Path, source: str, folder: str = "") -> Iterator[Item]:
    """A list of records {"id", "image" (or none), "conversations"}; pictures are in `folder`."""

    def talk(numbered: tuple[int, dict]) -> Iterator[Item]:
        number, record = numbered
        turns, image = record["conversations"], record.get("image")
        if not (image is None or isinstance(image, str) and image):
            raise Drop("'image' is no path")
        if turns[0]["from"] == "gpt":  # left out, as LLaVA does
            yield Drop("an answer ahead of the first question", malformed=False)
            turns = turns[1:]
        if len(turns) % 2:
            yield Drop("a last question without an answer", malformed=False)
            turns = turns[:-1]
        if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
            raise Drop("human and gpt do not take turns")
        texts = [turn["value"] for turn in turns]
        if source.endswith("_chinese") and not re.search("[\u4e00-\u9fff]", texts[1]):
            raise Drop("not translated", malformed=False)
        pairs = zip(texts[::2], texts[1::2], strict=True)
        key = f"{record.get('id', record.get('idx'))}#{number}"  # some ids repeat
        yield make_row(source, "train", key, image and folder + image,
                       conversation(pairs, image is not None))

    return each(enumerate(read_list(path)), talk)


def llava_pretrain(path: Path) -> Iterator[Item]:
    """LLaVA-Pretrain 558K: `blip_laion_cc_sbu_558k.json`, a list of {id, image, conversations}."""
    return llava_form(path, "llava_pretrain", "llava_pretrain/")


def llava_mix665k(path: Path) -> Iterator[Item]:
    """LLaVA-1.5's instructions: `llava_v1_5_mix665k.json`; 40,688 of its rows are text only."""
    return llava_form(path, "llava_mix665k")


def allava(path: Path) -> Iterator[Item]:
    """ALLaVA-4V: `ALLaVA-{Caption,Instruct}-{LAION,VFLAN}-4V{,_Chinese}.json`, `Evol-Instruct-...`.

    The paper trains on its own translation of the first 100K captions and 40K instructions, which
    is unpublished; the published Chinese files stand in. Their rows that are still English drop.
    """
    source = re.sub(r"\W+", "_", path.stem).lower()
    return llava_form(path, source if source.startswith("allava") else f"allava_{source}")


# ---------------------------------------------------------------------------------- questions


def save_picture(root: Path, name: str, content: bytes) -> str:
    """Write a picture below `root`, once. Returns its name with the suffix of its content.

    Drop where the bytes are no picture, or another picture has the name: nothing is replaced.
    """
    suffix = next((kind for head, kind in SUFFIXES.items() if content.startswith(head)), None)
    if suffix is None:
        raise Drop("the picture's bytes are no PNG, JPEG, GIF or WebP")
    path = root / f"{name}.{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as new:
            new.write_bytes(content)
    elif path.read_bytes() != content:
        raise Drop("another picture has this one's name already")
    return f"{name}.{suffix}"


def read_parquet(paths: list[Path], columns: list[str]) -> Iterator[dict]:
    """Rows of parquet files, a few at a time. ValueError names a file that is broken."""
    import pyarrow  # only here: the demo's data set does without it
    from pyarrow.parquet import ParquetFile

    for path in paths:
        try:
            for batch in ParquetFile(path).iter_batches(batch_size=16, columns=columns):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file ({error})") from None


def docvqa_cmarkea(path: Path, images: Path | None) -> Iterator[Item]:
    """cmarkea/doc-vqa: a folder with `train-*.parquet`; a row for each English question.

    The pictures inside the files are written to IMAGES/docvqa/train/.
    """
    parts = sorted(path.rglob("train-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{path}: no train-*.parquet below it")
    if images is None:
        raise ValueError("--images ROOT is missing: the pictures of this data set go there")

    def picture(record: dict) -> Iterator[Item]:
        key, pairs = record["id"], record["qa"]["en"]
        if not re.fullmatch(r"\w[\w.-]{0,199}", key):
            raise Drop("'id' is no file name")
        if not pairs:
            raise Drop("no English question", malformed=False)
        name = save_picture(images, f"docvqa/train/{key}", record["image"]["bytes"])
        for place, pair in enumerate(pairs):
            turns = conversation([(pair["question"], pair["answer"])])
            yield make_row("docvqa_cmarkea", "train", f"{key}/{place}", name, turns)

    return each(read_parquet(parts, ["id", "image", "qa"]), picture)


def vsr(path: Path, images: Path | None, with_test: bool) -> Iterator[Item]:
    """VSR: `train.jsonl` and `dev.jsonl` of `data/splits/random`; pictures of COCO 2017.

    `all_vsr_validated_data.jsonl` holds the test rows, too. Given IMAGES, a picture that is in its
    folder `vsr/` is taken from there, as VSR's authors lay them out.
    """
    split = "all" if path.stem.startswith("all_") else path.stem
    if split not in ("train", "dev") and not with_test:
        raise ValueError(f"{path}: holds VSR's test rows; --with-test trains on them all the same")

    def statement(numbered: tuple[int, bytes]) -> Iterator[Item]:
        number, record = numbered[0], json.loads(numbered[1])
        name, caption, label = record["image"], clean(record["caption"]), record["label"]
        if not re.fullmatch(r"\d{12}\.jpg", name) or label not in (0, 1):
            raise Drop("'image' is no COCO file name, or 'label' not 0 or 1")
        folder = "coco/val2017/" if "/val2017/" in record["image_link"] else "coco/train2017/"
        if images is not None and (images / "vsr" / name).is_file():
            folder = "vsr/"
        question = f"Is this statement about the picture true? {caption}{ONE_WORD}"
        turns = conversation([(question, ("No", "Yes")[label])])
        yield make_row("vsr", split, f"{number:06}", folder + name, turns)

    with open(path, "rb") as lines:
        yield from each(enumerate(filter(bytes.strip, lines)), statement)


def scienceqa(path: Path, with_test: bool) -> Iterator[Item]:
    """ScienceQA: the folder `data/scienceqa` with `problems.json` and `pid_splits.json`."""
    kinds = dict.fromkeys(("train", "val", "test"), list[str])
    lists = read_json(path / "pid_splits.json", **kinds)
    splits = {key: split for split in kinds for key in lists[split]}

    def problem(item: tuple[str, dict]) -> Iterator[Item]:
        (key, record), split = item, splits[item[0]]
        if split == "test" and not with_test:
            raise Drop("of split test", malformed=False)
        choices, answer, hint = record["choices"], record["answer"], record["hint"].strip()
        if not 0 <= answer < len(choices) <= 26:
            raise Drop("'answer' is not one of 'choices'")
        lines = [f"Context: {hint}"] * bool(hint) + [clean(record["question"])]
        lines += [f"{chr(65 + place)}. {choice.strip()}" for place, choice in enumerate(choices)]
        image = f"scienceqa/images/{split}/{key}/{record['image']}" if record["image"] else None
        pair = "\n".join(lines) + ONE_LETTER, chr(65 + answer)
        yield make_row("scienceqa", split, key, image, conversation([pair], image is not None))

    return each(read_json(path / "problems.json").items(), problem)
