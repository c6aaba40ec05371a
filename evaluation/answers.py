"""Questions about pictures: each is asked alone, many in a batch, and the answers go to files.

A benchmark is a module (easy_vqa.py, refcoco.py, mme.py) with two functions:
- `read(data, images)` turns its published files into questions,
- `score(records)` turns the answers into a table.
"""

import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from clip import open_image
from common.files import write_json, write_text
from sample import Chat, generate

Record = dict  # a line of answers.jsonl: "key", "image", the question's facts, "prompt", "answer"
Table = dict[str, dict[str, float | str]]  # name of a row -> name of a column -> value
Prompt = tuple[list[int], torch.Tensor | None]  # token ids; pixels of N pictures, (N, 3, S, S)


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    key: str  # unique in its benchmark
    text: str
    image: Path | None
    max_tokens: int  # of its answer
    workflow: str = "mm"
    facts: dict = field(default_factory=dict)  # what the scorer must know, kept with the answer
    until: Sequence[str] = ()  # texts that end the answer


def read_text(path: Path) -> str:
    """A text file in UTF-8. ValueError names one that is not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error})") from None


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
    by_picture, taken = defaultdict(list), defaultdict(list)
    for question in questions:
        by_picture[question.workflow, question.image].append(question)
    pictures = list(by_picture)
    random.Random(0).shuffle(pictures)
    for workflow, image in pictures:
        if len(taken[workflow]) < limit:
            taken[workflow] += by_picture[workflow, image]
    return [question for some in taken.values() for question in some]


def picture_prompt(chat: Chat, question: Question) -> Prompt:
    """The question alone, with its picture. ValueError where that cannot be used."""
    facts = question.facts
    size = (facts["width"], facts["height"]) if "box" in facts else None  # that the box is for
    picture = open_image(question.image, size)
    return replace(chat, chosen=question.workflow, images=[picture]).prompt(question.text)


def answer_batch(chat: Chat, prompts: list[Prompt], workflow: str, max_tokens: int) -> list[str]:
    """A greedy answer to each prompt, as if it were the only one."""
    shown = [pixels for _, pixels in prompts if pixels is not None]
    answers = generate(
        chat.model, [ids for ids, _ in prompts], torch.cat(shown) if shown else None, workflow,
        max_tokens, chat.tokenizer.stop_ids)
    return [chat.tokenizer.decode(ids) for ids in answers]


def ask(
    chat: Chat, questions: list[Question], batch: int,
    make_prompt: Callable[[Chat, Question], Prompt] = picture_prompt,
) -> list[str | None]:
    """The answer to each question, in their order; stderr shows how many there are so far.

    Where `make_prompt` raises ValueError the answer is None, and stderr says why. A batch holds
    questions of similar length: little of it is padding. Long ones come first: what needs too much
    memory fails at once.
    """
    answers, done, groups = [None] * len(questions), 0, defaultdict(list)
    for number, question in enumerate(questions):
        groups[question.workflow, question.max_tokens].append(number)
    for (workflow, max_tokens), numbers in groups.items():
        numbers.sort(key=lambda n: -len(questions[n].text))
        for first in range(0, len(numbers), batch):
            prompts = {}
            for n in numbers[first : first + batch]:
                try:
                    prompts[n] = make_prompt(chat, questions[n])
                except ValueError as error:
                    print(f"\rskipped {questions[n].key}: {error}", file=sys.stderr)
            if not prompts:
                continue
            said = answer_batch(chat, list(prompts.values()), workflow, max_tokens)
            for n, answer in zip(prompts, said, strict=True):
                for stop in filter(None, questions[n].until):
                    answer = answer.split(stop)[0]
                answers[n] = answer
            done += len(prompts)
            print(f"\r{done} of {len(questions)} questions answered", end="", file=sys.stderr,
                  flush=True)
    print(file=sys.stderr)
    return answers


def task_question(text: str, settings: dict, workflow: str, image=None) -> Question:
    """The question of a request of lm-eval or lmms-eval. ValueError where it wants sampling.

    image: what the `make_prompt` of `ask` opens.
    """
    if settings.get("do_sample") and settings.get("temperature", 1) != 0:
        raise ValueError("a task wants sampling: only greedy answers are supported")
    until = settings.get("until") or []
    length = settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256
    return Question("", text, image, length, workflow,
                    until=[until] if isinstance(until, str) else until)


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
