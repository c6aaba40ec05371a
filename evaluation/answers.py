"""Questions about pictures: each is asked alone, many in a batch, and the answers go to files.

A benchmark is a module (easy_vqa.py, refcoco.py, mme.py) with two functions and a constant:
- `read(data, images)` turns its published files into questions,
- `score(records)` turns the answers into a table,
- `MAX_TOKENS` is the length of an answer for each workflow that the benchmark asks.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image

from clip import open_image, preprocess
from common.device import Ranks
from common.files import write_json, write_text
from iaa import IAA, TEXT
from sample import generate
from tokenization.templates import render
from tokenization.tokenizer import Tokenizer

PROGRESS_SECONDS = 10
Record = dict  # a line of answers.jsonl: "key", "prompt", "answer" and the question's facts
Table = dict[str, dict[str, float | str]]  # name of a row -> name of a column -> value


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    key: str  # unique in its benchmark
    text: str
    image: Path
    workflow: str = "mm"
    facts: dict = field(default_factory=dict)  # what the scorer must know, kept with the answer


def read_questions(
    path: Path, make: Callable[[dict, int], Iterable[Question]]
) -> list[Question]:
    """The questions that make(row, line number) finds in each row of a JSONL file.

    Raises FileNotFoundError, or ValueError that names file and line.
    """
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                questions += make(json.loads(line), number)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {told}") from None
    return questions


def sample_questions(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """At least `limit` questions of each workflow, all of a picture or none; all without a limit.

    Whole pictures, because a benchmark may score the questions about a picture together.
    """
    if limit is None:
        return questions
    by_picture: dict[tuple, list[Question]] = {}
    for question in questions:
        by_picture.setdefault((question.workflow, question.image), []).append(question)
    pictures = list(by_picture)
    random.Random(seed).shuffle(pictures)
    taken: dict[str, list[Question]] = {}
    for workflow, image in pictures:
        some = taken.setdefault(workflow, [])
        if len(some) < limit:
            some += by_picture[workflow, image]
    return [question for some in taken.values() for question in some]


def answer_batch(
    model: IAA,
    tokenizer: Tokenizer,
    asked: list[tuple[str, Image.Image | None]],
    workflow: str,
    max_tokens: int,
) -> list[str]:
    """Greedy answers to (question, picture or None) pairs, each as if it were asked alone."""
    adaptor, clip = model.adaptor(workflow), model.clip.config
    form = {"template": None, "system": None} if adaptor is None else adaptor.prompt
    prompts = [render(tokenizer, [("user", text)], form["template"], form["system"],
                      0 if picture is None else clip.patches)[0] for text, picture in asked]
    pictures = [preprocess(picture, clip) for _, picture in asked if picture is not None]
    images = torch.stack(pictures).to(model.llama.device) if pictures else None  # (N, 3, S, S)
    answers = generate(model, prompts, images, workflow, max_tokens, tokenizer.stop_ids)
    return [tokenizer.decode(ids).strip() for ids in answers]


def ask(
    model: IAA,
    tokenizer: Tokenizer,
    questions: list[Question],
    max_tokens: dict[str, int],  # of an answer, by workflow
    batch: int,
) -> list[Record]:
    """A record for each question, in any order; a line on stderr says now and then how far it is.

    A batch holds questions of similar length: little of it is padding. Long ones come first, so
    that the time left is not guessed too low.
    """
    records, began = [], time.perf_counter()
    said = began
    for workflow in sorted({question.workflow for question in questions} - {TEXT}):
        part = [question for question in questions if question.workflow == workflow]
        part.sort(key=lambda question: (-len(question.text), question.key))
        for first in range(0, len(part), batch):
            some = part[first : first + batch]
            answers = answer_batch(model, tokenizer, [(q.text, open_image(q.image)) for q in some],
                                   workflow, max_tokens[workflow])
            records += [{"key": q.key, **q.facts, "prompt": q.text, "answer": answer}
                        for q, answer in zip(some, answers, strict=True)]
            now = time.perf_counter()
            if now - said > PROGRESS_SECONDS or len(records) == len(questions):
                left = (now - began) / len(records) * (len(questions) - len(records))
                print(f"{len(records)} of {len(questions)} questions answered, {left:.0f} s left",
                      file=sys.stderr, flush=True)
                said = now
    return records


def gather(records: list[Record], ranks: Ranks) -> list[Record]:
    """The records of all ranks on rank 0, nothing on the others."""
    if ranks.world == 1:
        return records
    parts = [None] * ranks.world if ranks.rank == 0 else None
    dist.gather_object(records, parts)
    return [record for part in parts or () for record in part]


def save(folder: Path, records: list[Record], table: Table) -> None:
    """Write or replace `answers.jsonl` and `scores.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    write_text(folder / "answers.jsonl", "".join(lines))
    write_json(folder / "scores.json", table)


def percent(flags: Iterable[bool]) -> float:
    """The share of true ones, 0 to 100; of one flag at least."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags)


def print_table(title: str, table: Table, form: str = ".1f") -> None:
    """Print rows by name; columns in the order in which they first come; floats in `form`."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    first = max(len(name) for name in (title, *table))
    print(f"\n{title:<{first}}" + "".join(f"  {column:>8}" for column in columns))
    for name, row in table.items():
        cells = [f"{value:{form}}" if isinstance(value, float) else str(value)
                 for value in (row.get(column, "") for column in columns)]
        print(f"{name:<{first}}" + "".join(f"  {cell:>{max(8, len(column))}}"
                                           for cell, column in zip(cells, columns, strict=True)))
