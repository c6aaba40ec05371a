"""Published data sets of questions and answers, one function each: from the file to our rows.

A function yields, in an order that depends on the file alone: rows, `Drop` for a record that is
left out, `Note` (a text) for what was mended in one. It holds one record at a time.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tokenization.templates import IMAGE
from data import ONE_LETTER, ONE_WORD
from prepare_data.source_files import is_whole, read_parquet, stream_json
from prepare_data.rows import (
    Drop,
    Item,
    Note,
    conversation,
    each,
    field,
    grounding_row,
    make_row,
    text,
)
from common.files import new_file

SPEAKERS = ("human", "gpt")
SNIFFED = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"RIFF": "webp"}


def check_text(image: str | None, text_rows: str) -> None:
    """Drop where a row has no picture and such rows are not to train `mm`, as LLaVA's do."""
    if image is None and text_rows == "drop":
        raise Drop("text only", fault=False)


# ---------------------------------------------------------------------------------- LLaVA's form


def llava_turns(turns: list, image: bool) -> tuple[list[dict], list[Note]]:
    """The turns of a conversation in LLaVA's form as ours, and what was mended in it."""
    kept, notes, speaker, other = [], [], *SPEAKERS
    for turn in turns:
        found, words = (turn.get("from"), turn.get("value")) if type(turn) is dict else ("", "")
        if type(words) is not str or found not in SPEAKERS:
            raise Drop("a turn is not a text from human or gpt")
        if found != speaker:
            if kept:
                raise Drop("human and gpt do not take turns")
            notes.append(Note("an answer ahead of the first question left out"))
            continue
        words = words.replace("<image>", "").strip()
        if not words:
            raise Drop("a turn is empty")
        kept.append({"from": speaker, "value": words if kept or not image else IMAGE + words})
        speaker, other = other, speaker
    if len(kept) % 2:
        notes.append(Note("a last question without an answer left out"))
        kept.pop()
    if not kept:
        raise Drop("no question with an answer")
    return kept, notes


def llava_record(number: int, record, source: str, folder: str, text_rows: str) -> Iterator[Item]:
    """A record {"id", "image" (or none), "conversations"}. Ids repeat: its number goes along."""
    turns = field(record, "conversations", list)
    image = record.get("image")
    if image is not None and not (type(image) is str and image):
        raise Drop("'image' is no path")
    turns, notes = llava_turns(turns, image is not None)
    check_text(image, text_rows)
    if source.endswith("_chinese") and not re.search("[\u4e00-\u9fff]", turns[1]["value"]):
        raise Drop("not translated", fault=False)
    yield from notes
    key = f"{record.get('id', record.get('idx'))}#{number}"
    yield make_row(source, "train", key, image and folder + image, turns)


def llava_pretrain(path: Path, folder: str) -> Iterator[Item]:
    """LLaVA-Pretrain 558K: `blip_laion_cc_sbu_558k.json`, a list of {id, image, conversations}."""
    return each(stream_json(path, "["), llava_record, "llava_pretrain", folder, "drop")


def llava_mix665k(path: Path, folder: str, text_rows: str) -> Iterator[Item]:
    """LLaVA-1.5's instructions: `llava_v1_5_mix665k.json`; 40,688 of its rows are text only."""
    return each(stream_json(path, "["), llava_record, "llava_mix665k", folder, text_rows)


def allava(path: Path, folder: str, text_rows: str) -> Iterator[Item]:
    """ALLaVA-4V: `ALLaVA-{Caption,Instruct}-{LAION,VFLAN}-4V{,_Chinese}.json`, `Evol-Instruct-...`.

    The paper trains on its own translation of the first 100K captions and 40K instructions, which
    is unpublished; the published Chinese files stand in. Their rows that are still English drop.
    """
    source = re.sub(r"\W+", "_", path.stem).lower()
    source = source if source.startswith("allava") else f"allava_{source}"
    return each(stream_json(path, "["), llava_record, source, folder, text_rows)


# ---------------------------------------------------------------------------------- questions


def save_picture(root: Path, name: str, content) -> str:
    """Write a picture's bytes below `root`, once; returns its name, with a suffix by its content.

    Drop where the bytes are no picture, or another one has the name: nothing is replaced.
    """
    content = content if isinstance(content, bytes) else b""
    suffix = next((kind for head, kind in SNIFFED.items() if content.startswith(head)), None)
    if suffix is None:
        raise Drop("the picture's bytes are no PNG, JPEG, GIF or WebP")
    path = root / f"{name}.{suffix}"
    if path.is_symlink() or (path.exists() and path.read_bytes() != content):
        raise Drop("another picture has this one's name already")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as new:
            new.write_bytes(content)
    return f"{name}.{suffix}"


def docvqa_picture(
    number: int, record: dict, split: str, root: Path | None, single: bool
) -> Iterator[Item]:
    """A picture of cmarkea/doc-vqa with all its English questions, or (`single`) a row for each."""
    key = text(record, "id")
    if not re.fullmatch(r"\w[\w.-]{0,199}", key):
        raise Drop("'id' is no file name")
    asked = field(field(record, "qa", dict), "en", list)
    pairs = [(text(pair, "question"), text(pair, "answer")) for pair in asked]
    if not pairs:
        raise Drop("no English question", fault=False)
    name = f"docvqa/{split}/{key}"
    if root is not None:
        name = save_picture(root, name, field(record, "image", dict).get("bytes"))
    if single:
        for place, pair in enumerate(pairs):
            yield make_row("docvqa_cmarkea", split, f"{key}/{place}", name, conversation([pair]))
    else:
        yield make_row("docvqa_cmarkea", split, key, name, conversation(pairs))


def docvqa_cmarkea(path: Path, root: Path | None, single: bool) -> Iterator[Item]:
    """cmarkea/doc-vqa: a folder with `train-*.parquet`, columns id, image {bytes}, qa {en, fr}.

    Pictures are written to `root/docvqa/train/`; without a root (a dry run) none are.
    """
    parts = sorted(path.rglob("train-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"{path}: no train-*.parquet below it")
    records = (record for part in parts for record in read_parquet(part, ["id", "image", "qa"]))
    return each(records, docvqa_picture, "train", root, single)


def docvqa_question(number: int, member: tuple, folder: str) -> Iterator[Item]:
    """A question of the original DocVQA; the first of its accepted answers is the answer."""
    _, record = member
    answers = field(record, "answers", list)
    if not answers or type(answers[0]) is not str or not answers[0].strip():
        raise Drop("no answer")
    pair = text(record, "question") + ONE_WORD, answers[0].strip()
    split, key = text(record, "data_split"), field(record, "questionId", int)
    yield make_row("docvqa", split, key, folder + text(record, "image"), conversation([pair]))


def docvqa(path: Path, folder: str) -> Iterator[Item]:
    """DocVQA task 1: `train_v1.0.json` or `train_v1.0_withQT.json`, {"data": [question, ...]}."""
    records = (member for member in stream_json(path, "{") if member[0] == "data")
    return each(records, docvqa_question, folder)


def vsr_statement(number: int, record, split: str, root: Path | None) -> Iterator[Item]:
    """A statement about a COCO picture, true or false."""
    name, label = text(record, "image"), field(record, "label", int)
    caption, link = text(record, "caption"), field(record, "image_link", str)
    if not re.fullmatch(r"\d{12}\.jpg", name) or label not in (0, 1):
        raise Drop("'image' is no COCO file name, or 'label' not 0 or 1")
    folders = ["vsr/", "coco/train2017/", "coco/val2017/"]
    usual = "coco/val2017/" if "/val2017/" in link else "coco/train2017/"
    found = (f for f in folders if root is not None and (root / f / name).is_file())
    question = f"Is this statement about the picture true? {caption}{ONE_WORD}"
    pair = question, ("No", "Yes")[label]
    name = next(found, usual) + name
    yield make_row("vsr", split, f"{number:06}", name, conversation([pair]))


def vsr(path: Path, root: Path | None, with_test: bool) -> Iterator[Item]:
    """VSR: `train.jsonl` and `dev.jsonl` of `data/splits/random`.

    `all_vsr_validated_data.jsonl` holds the test rows, too.
    Where a root is given, pictures are looked for in its vsr/, coco/train2017/, coco/val2017/.
    """
    split = "all" if path.stem.startswith("all_") else path.stem
    if split not in ("train", "dev") and not with_test:
        raise ValueError(f"{path}: holds VSR's test rows; --with-test trains on them all the same")
    return each(table_records(path), vsr_statement, split, root)


def scienceqa_problem(
    number: int, member: tuple, splits: dict[str, str], wanted: list, folder: str, text_rows: str
) -> Iterator[Item]:
    """A multiple-choice problem, with or without a picture."""
    key, record = member
    split = splits.get(key)
    if split not in wanted:
        raise Drop(f"of split {split}", fault=False)
    choices, answer = field(record, "choices", list), field(record, "answer", int)
    if not all(type(choice) is str for choice in choices) or not 0 <= answer < len(choices) <= 26:
        raise Drop("'answer' is not one of 'choices'")
    image, hint = field(record, "image", str, type(None)), field(record, "hint", str).strip()
    lines = [f"Context: {hint}"] * bool(hint) + [text(record, "question")]
    lines += [f"{chr(65 + place)}. {choice.strip()}" for place, choice in enumerate(choices)]
    pair = "\n".join(lines) + ONE_LETTER, chr(65 + answer)
    name = f"{folder}{split}/{key}/{image}" if image else None
    check_text(name, text_rows)
    turns = conversation([pair], name is not None)
    yield make_row("scienceqa", split, key, name, turns)


def scienceqa(path: Path, folder: str, text_rows: str, splits: list[str]) -> Iterator[Item]:
    """ScienceQA: the folder `data/scienceqa` with `problems.json` and `pid_splits.json`."""
    of = {key: name for name, key in stream_json(path / "pid_splits.json", "{")
          if name in ("train", "val", "test") and type(key) is str}
    members = stream_json(path / "problems.json", "{")
    return each(members, scienceqa_problem, of, splits, folder, text_rows)


# ---------------------------------------------------------------------------------- one's own


def table_records(path: Path) -> Iterator[dict | None]:
    """Records of a .csv, .tsv or .jsonl file; None for a line that is none."""
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path}: .csv, .tsv or .jsonl is expected")
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            if path.suffix == ".jsonl":
                for line in filter(str.strip, file):
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError):
                        yield None
                return
            delimiter = "\t" if path.suffix == ".tsv" else ","
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = rows.fieldnames or []
            needed = {"image", "answer"} if "question" in names else {"image", "question"}
            missing = sorted((needed if "expression" not in names else {"image"}) - set(names))
            if missing:
                raise ValueError(f"{path}: no column {missing[0]!r}; there are {', '.join(names)}")
            for row in rows:
                whole = None not in row and None not in row.values()
                yield {name: value for name, value in row.items() if value} if whole else None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not UTF-8 text") from None
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def own_record(
    number: int, record, source: str, split: str, folder: str, text_rows: str
) -> Iterator[Item]:
    """A record with a question and an answer, a conversation, or an expression and its boxes."""
    if not isinstance(record, dict):
        raise Drop("not a record with all its fields")
    image, key = record.get("image"), f"{record.get('id', '')}#{number}"
    if image is not None and not re.search(r"\.\w{3,4}$", image if type(image) is str else ""):
        raise Drop("'image' is no name of a picture: are columns swapped?")
    image = image and folder + image
    if "boxes" in record:
        try:
            boxes, *size = (json.loads(v) if type(v) is str else v
                            for v in (record.get(n) for n in ("boxes", "width", "height")))
        except (ValueError, RecursionError):
            raise Drop("'boxes', 'width' or 'height' is no JSON") from None
        if image is None or type(boxes) is not list or not all(is_whole(v) and v > 0 for v in size):
            raise Drop("boxes need 'image', 'width' and 'height' in pixels")
        yield grounding_row(source, split, key, image, size, text(record, "expression"), boxes)
        return
    check_text(image, text_rows)
    if "conversations" in record:
        turns, notes = llava_turns(field(record, "conversations", list), image is not None)
        yield from notes
    else:
        pair = text(record, "question"), text(record, "answer")
        turns = conversation([pair], image is not None)
    yield make_row(source, split, key, image, turns)


def own(path: Path, folder: str, text_rows: str, split: str) -> Iterator[Item]:
    """One's own table: .csv or .tsv with a header, or .jsonl; any of these sets of fields a row.

    image, question, answer; image, conversations (LLaVA's form, .jsonl only); image, width, height,
    expression, boxes ([[x1, y1, x2, y2], ...], pixels). Without an image: text only.
    """
    source = re.sub(r"\W+", "_", path.stem)
    return each(table_records(path), own_record, source, split, folder, text_rows)
