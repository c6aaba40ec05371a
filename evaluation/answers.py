"""Questions about pictures: each is asked alone, many in a batch, and the answers go to files.

A benchmark is a module (easy_vqa.py, refcoco.py, mme.py) with two functions:
- `read(data, images)` turns its published files into questions,
- `score(records)` turns the answers into a table.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import torch
import torch.distributed as dist

from clip import open_image
from common.device import Ranks
from common.files import write_json, write_text
from iaa import Index
from sample import Chat, generate

# A question: "key" (unique in its benchmark), "workflow", "max_tokens" (of its answer), "image" (a
# path), "prompt", and what its scorer must know. As a line of answers.jsonl it has an "answer" too.
Record = dict
Table = dict[str, dict[str, float | str]]  # name of a row -> name of a column -> value
Prompt = tuple[list[int], torch.Tensor | None]  # token ids; N pictures of S x S pixels


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
            found += make(json.loads(line), number) if line.strip() else ()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}:{number}: {told}") from None
    if not found:
        raise ValueError(f"{path}: no rows in it")
    return found


def sample_questions(questions: list[Record], limit: int) -> list[Record]:
    """At least `limit` questions of each workflow, all of a picture or none.

    Whole pictures, because a benchmark may score the questions about a picture together. The choice
    is random, but always the same.
    """
    pictures, taken = defaultdict(list), defaultdict(list)
    for question in questions:
        pictures[question["workflow"], question["image"]].append(question)
    shuffled = list(pictures.items())
    random.Random(0).shuffle(shuffled)
    for (workflow, _), about in shuffled:
        if len(taken[workflow]) < limit:
            taken[workflow] += about
    return [question for some in taken.values() for question in some]


def load(args: argparse.Namespace, workflows: list[str] | None, chosen: str | None = None) -> Chat:
    """The command line's model with these workflows, None: all."""
    if args.model.is_dir() and args.what not in ("text-retention", "sheet"):
        (args.model / "eval").mkdir(exist_ok=True)  # fails now, not after all questions
    return Chat.load(args.model, args.dtype, args.device, args.quantize, workflows, chosen=chosen)


def picture_prompt(chat: Chat, question: Record) -> Prompt:
    """The question alone, with its picture. ValueError where that cannot be used."""
    size = (question["width"], question["height"]) if "box" in question else None
    picture = open_image(question["image"], size)  # size: that the box is for
    chat = replace(chat, chosen=question["workflow"], images=[picture])
    return chat.prompt(question["prompt"])


def ask(
    chat: Chat, questions: list[Record], batch: int,
    make_prompt: Callable[[Chat, Record], Prompt] = picture_prompt,
) -> dict[int, str]:
    """The greedy answer to each question, by its place, as if it were the only one.

    Where `make_prompt` raises ValueError, or the context is too short, there is none, and stderr
    says why. A batch has questions of similar length: little of it is padding. Long ones come
    first: what needs too much memory fails at once.
    """
    answers = {}

    def kind(n: int) -> tuple[str, int]:  # what the questions of a batch have in common
        return questions[n]["workflow"], questions[n]["max_tokens"]

    order = sorted(range(len(questions)), key=lambda n: (kind(n), -len(questions[n]["prompt"])))
    for (workflow, max_tokens), numbers in groupby(order, kind):
        while some := list(islice(numbers, batch)):
            prompts = {}
            for n in some:
                try:
                    prompt = make_prompt(chat, questions[n])
                    if len(prompt[0]) + max_tokens > chat.model.llama.config.context:
                        raise ValueError(f"{len(prompt[0])} tokens and {max_tokens} new ones "
                                         "exceed the context")
                    prompts[n] = prompt
                except ValueError as error:
                    print(f"\rskipped {questions[n]['key']}: {error}", file=sys.stderr)
            if not prompts:
                continue
            rows, pixels = zip(*prompts.values(), strict=True)
            pixels = [each for each in pixels if each is not None]
            said = generate(chat.model, list(rows), torch.cat(pixels) if pixels else None, workflow,
                            max_tokens, chat.tokenizer.stop_ids)
            answers |= zip(prompts, map(chat.tokenizer.decode, said), strict=True)
            print(f"\r{len(answers)} of {len(questions)} questions answered", end="",
                  file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return answers


class GreedyModel:
    """What the model classes for lm-eval and lmms-eval share. They add `prompt`, for `ask`."""

    def __init__(self, chat: Chat, batch: int):
        super().__init__()
        self.chat, self.batch = chat, batch

    def workflow_of(self, request) -> str:
        """The workflow that answers a request."""
        return self.chat.workflow

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut ahead of the first of their stop texts. ValueError for sampling."""
        questions = []
        for request in requests:
            text, settings = request.args[:2]
            if settings.get("do_sample") and settings.get("temperature", 1) != 0:
                raise ValueError("a task wants sampling: only greedy answers are supported")
            length = settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256
            length = min(length, self.chat.model.llama.config.context // 2)  # room for the question
            questions.append({"workflow": self.workflow_of(request), "max_tokens": length,
                              "prompt": text, "request": request, "key": len(questions)})
        answers = ask(self.chat, questions, self.batch, self.prompt)
        for n, request in enumerate(requests):
            until = request.args[1].get("until") or []
            for stop in filter(None, [until] if isinstance(until, str) else until):
                answers[n] = answers.get(n, "").split(stop)[0]
        return [answers.get(n, "") for n in range(len(requests))]  # "": could not be asked


def ask_on_all_ranks(
    args: argparse.Namespace, questions: list[Record], ranks: Ranks
) -> list[Record]:
    """The questions with their answers; a rank asks its share, every rank gets all.

    Left out are questions that the model has no adaptor for, and those that `ask` skips.
    """
    there = Index.read(args.model).adaptors
    asked = [question for question in questions if question["workflow"] in there]
    chat = load(args, list({question["workflow"] for question in asked}))
    mine = range(ranks.rank, len(asked), ranks.world)  # spreads long answers over the ranks
    said = ask(chat, [asked[n] for n in mine], args.batch)
    parts = [{mine[n]: text.strip() for n, text in said.items()}] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(parts, parts[0])
    answers = {n: text for part in parts for n, text in part.items()}
    records = [asked[n] | {"answer": answers[n]} for n in sorted(answers)]
    if not records:
        raise ValueError(f"none of {len(questions)} questions could be asked: no picture can be "
                         f"read, or none of the model's adaptors {[*there]} is for them")
    return records


def report(folder: Path, title: str, records: list[Record], table: Table, form: str = ".1f"):
    """Write or replace `answers.jsonl` and `scores.json`, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, default=str) + "\n" for record in records]
    write_text(folder / "answers.jsonl", "".join(lines))
    write_json(folder / "scores.json", table)
    print_table(title, table, form)


def print_table(title: str, table: Table, form: str = ".1f") -> None:
    """Print rows by name; columns in the order in which they first come; floats in `form`."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    first = max(map(len, (title, *table)))
    print(f"\n{title:<{first}}" + "".join(f"  {column:>8}" for column in columns))
    for name, row in table.items():
        cells = {c: f"{row[c]:{form}}" if isinstance(row.get(c), float) else str(row.get(c, ""))
                 for c in columns}
        print(f"{name:<{first}}" + "".join(f"  {cells[c]:>{max(8, len(c))}}" for c in columns))
