"""Questions about pictures: each is asked alone, many in a batch, and the answers go to files.

A benchmark is a module (easy_vqa.py, refcoco.py, mme.py) with two functions:
- `read(data, images)` turns its published files into questions,
- `score(records)` turns the answers into a table.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from clip import open_image
from common.files import write_json, write_text
from sample import Chat, generate

Record = dict  # a line of answers.jsonl: "key", "image", the question's facts, "prompt", "answer"
Table = dict[str, dict[str, float | str]]  # name of a row -> name of a column -> value


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    key: str  # unique in its benchmark
    text: str
    image: Path | None
    max_tokens: int  # of its answer
    workflow: str = "mm"
    facts: dict = field(default_factory=dict)  # what the scorer must know, kept with the answer


def read_lines(path: Path, make: Callable[[dict, int], Iterable]) -> list:
    """All that make(row, line number) finds in a JSONL file. ValueError names file and line."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                found += make(json.loads(line), number)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {told}") from None
    if not found:
        raise ValueError(f"{path}: no rows in it")
    return found


def sample_questions(questions: list[Question], limit: int | None) -> list[Question]:
    """At least `limit` questions of each workflow, all of a picture or none; all without a limit.

    Whole pictures, because a benchmark may score the questions about a picture together. The choice
    is random, but always the same.
    """
    if limit is None:
        return questions
    by_picture: dict[tuple, list[Question]] = {}
    for question in questions:
        by_picture.setdefault((question.workflow, question.image), []).append(question)
    pictures = list(by_picture)
    random.Random(0).shuffle(pictures)
    taken: dict[str, list[Question]] = {}
    for workflow, image in pictures:
        some = taken.setdefault(workflow, [])
        if len(some) < limit:
            some += by_picture[workflow, image]
    return [question for some in taken.values() for question in some]


def answer_batch(
    chat: Chat, asked: list[tuple[str, Image.Image | None]], workflow: str, max_tokens: int
) -> list[str]:
    """Greedy answers to (question, picture or None) pairs, each as if it were asked alone."""
    prompts, pixels = zip(*(replace(chat, chosen=workflow, image=picture).prompt(text)
                            for text, picture in asked), strict=True)
    shown = [picture for picture in pixels if picture is not None]  # (1, 3, S, S) each
    images = torch.cat(shown) if shown else None  # (N, 3, S, S)
    answers = generate(
        chat.model, list(prompts), images, workflow, max_tokens, chat.tokenizer.stop_ids)
    return [chat.tokenizer.decode(ids).strip() for ids in answers]


def ask(
    chat: Chat,
    questions: list[Question],
    batch: int,
    open_picture: Callable[[Path | None], Image.Image | None] = open_image,  # a question's `image`
) -> list[str]:
    """The answer to each question, in their order; stderr shows how many there are so far.

    A batch holds questions of similar length: little of it is padding. Long ones come first: what
    needs too much memory fails at once.
    """
    answers, done, groups = [""] * len(questions), 0, defaultdict(list)
    for number, question in enumerate(questions):
        groups[question.workflow, question.max_tokens].append(number)
    for (workflow, max_tokens), numbers in groups.items():
        numbers.sort(key=lambda n: -len(questions[n].text))
        for first in range(0, len(numbers), batch):
            some = numbers[first : first + batch]
            asked = [(questions[n].text, open_picture(questions[n].image)) for n in some]
            said = answer_batch(chat, asked, workflow, max_tokens)
            for n, answer in zip(some, said, strict=True):
                answers[n] = answer
            done += len(some)
            print(f"\r{done} of {len(questions)} questions answered", end="", file=sys.stderr,
                  flush=True)
    print(file=sys.stderr)
    return answers


def settings_of_task(settings: dict) -> tuple[int, list[str]]:
    """The length of an answer and the stop texts that a task of lm-eval or lmms-eval asks for.

    Raises ValueError where the task wants sampling.
    """
    if settings.get("do_sample") and settings.get("temperature", 1) != 0:
        raise ValueError("a task wants sampling: only greedy answers are supported")
    until = settings.get("until") or []
    length = settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256
    return length, [until] if isinstance(until, str) else until


def cut(answer: str, until: Iterable[str]) -> str:
    """The answer ahead of the first of the stop texts in it."""
    for stop in filter(None, until):
        answer = answer.split(stop)[0]
    return answer


def percent(flags: Iterable[bool]) -> float:
    """The share of true ones, 0 to 100; of one flag at least."""
    flags = list(flags)
    return 100 * sum(flags) / len(flags)


def report(folder: Path, title: str, records: list[Record], table: Table, form: str = ".1f"):
    """Write or replace `answers.jsonl` and `scores.json`, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    write_text(folder / "answers.jsonl", "".join(lines))
    write_json(folder / "scores.json", table)
    print_table(title, table, form)


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
