"""Score a model on a benchmark, beside the paper's figures; show that its text is as it was.

    python eval.py mme DATA --model runs/iaa8            also: mmbench-en, mmbench-cn, mmmu
    python eval.py refcoco DATA --images coco/train2014 --model runs/iaa8
    python eval.py easy-vqa data/easy-vqa --model runs/demo
    python eval.py retention README.md --model runs/demo
    python eval.py lm mmlu c-eval bbh humaneval math --model runs/iaa8
    torchrun --nproc_per_node 8 eval.py mme ...          the same on 8 processes

A benchmark's answers go to `eval/<benchmark>/answers-<rank>.jsonl` in the model's folder as they
come. Started again, it asks what is not answered yet; `--rescore` scores what is there, without
model or data. Those of `lm` go to `eval/lm/<task>/` once a task is finished.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import torch

from evaluation.ask import Asker, Question
from evaluation.benchmarks import BENCHMARKS, Benchmark, read_text
from common.files import check_same, one_line, read_json, replace_text, write_json
from iaa import DTYPES, TEXT
from speed.packing import pack
from training.ranks import Ranks
from evaluation.text_retention import compare
from evaluation.scoring import Record, Table
from storage import load_iaa, read_index
from tokenization.tokenizer import Tokenizer

PROGRESS_SECONDS = 5
PATIENCE_S = 7200  # with the slowest rank: only words to wait are sent, over gloo


# ---------------------------------------------------------------------------------- answers


def read_answers(folder: Path) -> list[Record]:
    """The whole lines of all answers files, each question once. ValueError names a broken line."""
    found = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        *lines, _ = path.read_bytes().split(b"\n")  # behind the last newline: nothing, or half
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: not an answer; remove the line") from None
    return list(found.values())


def drop_half_line(path: Path) -> None:
    """Cut off what a killed run left behind the last newline."""
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def chosen(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """All questions, or `limit` and a few more of each workflow, by whole pictures at random.

    Drawn by picture, because questions about one picture share the work of looking at it, and a
    benchmark may score them together.
    """
    keys = [question.key for question in questions]
    if len(set(keys)) < len(keys):
        raise ValueError(f"question {max(keys, key=keys.count)} comes twice")
    if limit is None:
        return questions
    by_picture: dict[tuple, list[Question]] = {}
    for question in questions:
        by_picture.setdefault((question.workflow, question.image), []).append(question)
    pictures = sorted(by_picture, key=lambda place: by_picture[place][0].key)
    random.Random(seed).shuffle(pictures)
    taken: dict[str, list[Question]] = {}
    for workflow, image in pictures:
        some = taken.setdefault(workflow, [])
        if len(some) < limit:
            some += by_picture[workflow, image]
    return [question for some in taken.values() for question in some]


def share(questions: list[Question], rank: int, world: int) -> list[Question]:
    """A rank's part: every `world`-th picture with all its questions."""
    number = {image: n for n, image in enumerate(dict.fromkeys(q.image for q in questions))}
    return [question for question in questions if number[question.image] % world == rank]


def fingerprint(questions: list[Question], model: Path, workflows: list[str]) -> dict:
    """What answers depend on: the questions, and the SHA-256 of the base and of each adaptor."""
    asked = json.dumps([(q.key, q.workflow, q.text) for q in questions]).encode()
    return {"questions": hashlib.sha256(asked).hexdigest(), "asked": len(questions),
            **{name: adaptor_facts(model, name) for name in workflows}}


def adaptor_facts(model: Path, name: str) -> dict:
    """An adaptor's SHA-256, that of its base, and its prompt."""
    folder = model / read_index(model).adaptors[name]
    meta = read_json(folder / "config.json", "base", "prompt")
    with open(folder / "adaptor.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"adaptor": digest, "base": meta["base"], "prompt": meta["prompt"]}


def check_settings(folder: Path, settings: dict) -> None:
    """Write what the answers in `folder` depend on, or compare. ValueError where they differ."""
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    check_same(folder, read_json(path), settings,
               "name another folder with --out, or remove this one")


class Progress:
    """Lines such as `mme: 320 of 1187 on rank 0 of 2, 4.1 a second, 3.5 min left`."""

    def __init__(self, name: str, total: int, ranks: Ranks):
        self.head, self.total, self.shown = name, total, ranks.rank == 0
        self.where = f" on rank 0 of {ranks.world}" if ranks.world > 1 else ""
        self.began = self.last = time.perf_counter()

    def say(self, done: int) -> None:
        """Print, unless something was printed a moment ago."""
        now = time.perf_counter()
        if self.shown and (now - self.last > PROGRESS_SECONDS or done == self.total):
            rate = done / (now - self.began)
            left = (self.total - done) / rate / 60
            print(f"{self.head}: {done} of {self.total}{self.where}, {rate:.1f} a second, "
                  f"{left:.1f} min left", file=sys.stderr, flush=True)
            self.last = now


def answer_all(name: str, args: argparse.Namespace, ranks: Ranks) -> None:
    """Ask this rank's part of what is not answered yet; each batch of answers is saved at once."""
    benchmark, folder = BENCHMARKS[name], args.out
    questions = chosen(benchmark.read(args.data, args.images), args.limit, args.seed)
    dtype = DTYPES["bf16"] if args.quantize else None  # as sample.py
    there = read_index(args.model).adaptors
    workflows = [workflow for workflow in benchmark.tokens if workflow in there]
    wanted = workflows or [*benchmark.tokens]  # of which there is none: `load_iaa` says so
    model, info = load_iaa(args.model, dtype, str(ranks.device), wanted)
    pack(model, args.quantize == "int8")
    questions = [question for question in questions if question.workflow in workflows]
    if ranks.rank == 0:
        settings = {"benchmark": name, "quantize": args.quantize}
        check_settings(folder, settings | fingerprint(questions, args.model, workflows))
    ranks.barrier()
    done = {record["key"] for record in read_answers(folder)}
    ranks.barrier()  # nobody writes before all have read
    mine = share([q for q in questions if q.key not in done], ranks.rank, ranks.world)
    batch_tokens = args.batch_tokens or (32768 if ranks.device.type != "cpu" else 2048)
    asker = Asker(model, Tokenizer.load(info["llm"]), info["prompts"], batch_tokens)
    path, count = folder / f"answers-{ranks.rank}.jsonl", 0
    drop_half_line(path)
    progress = Progress(name, len(mine), ranks)
    with open(path, "a", encoding="utf-8", buffering=1) as out:
        for workflow in workflows:
            part = [question for question in mine if question.workflow == workflow]
            for i, answer in asker.ask(part, workflow, benchmark.tokens[workflow]):
                record = {"key": part[i].key, **part[i].facts, "prompt": part[i].text,
                          "answer": answer}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
                progress.say(count)
    ranks.barrier()


# ---------------------------------------------------------------------------------- tables


def print_table(title: str, table: Table, form: str = ".1f") -> None:
    """Rows by name, columns as they first come; counts as they are, other numbers in `form`."""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    wide = max(len(name) for name in (title, *table))
    print(f"\n{title:<{wide}}" + "".join(f"  {column:>8}" for column in columns))
    for name, row in table.items():
        values = (row.get(column, "") for column in columns)
        cells = (f"{value:{form}}" if isinstance(value, float) else str(value) for value in values)
        print(f"{name:<{wide}}" + "".join(f"  {cell:>{max(8, len(column))}}"
                                          for cell, column in zip(cells, columns, strict=True)))


def score(name: str, folder: Path) -> None:
    """The benchmark's table from the answers in `folder`, beside the paper's row."""
    benchmark: Benchmark = BENCHMARKS[name]
    settings = read_json(folder / "settings.json", "benchmark", "asked")
    records = sorted(read_answers(folder), key=lambda record: record["key"])
    if settings["benchmark"] != name:
        raise ValueError(f"{folder} holds answers to {settings['benchmark']}, not to {name}")
    if not records:
        raise ValueError(f"{folder}: no answers yet")
    try:
        table = benchmark.score(records)
        said = [benchmark.export(records, folder)] if benchmark.export else []
    except KeyError as error:
        raise ValueError(f"{folder}: {error} is missing in an answer of {name}") from None
    write_json(folder / "scores.json", table)
    print_table(name, {row: cells | benchmark.paper.get(row, {}) for row, cells in table.items()})
    if len(records) < settings["asked"]:
        said.append(f"only {len(records)} of {settings['asked']} questions are answered")
    said += [f"{row}: the whole published set has {whole}, not {table[row]['asked']}"
             for row, whole in benchmark.published.items()
             if row in table and table[row]["asked"] != whole]
    for line in said:
        print(line)


def run_benchmark(name: str, args: argparse.Namespace) -> None:
    """Ask and score, or only score."""
    args.out = args.out or args.model / "eval" / name
    if args.rescore:
        score(name, args.out)
        return
    if args.data is None:
        raise ValueError(f"{name}: DATA is needed, the published files; or --rescore")
    if not args.data.exists():
        raise FileNotFoundError(f"{args.data}: no such file or folder")
    with (one_line("eval.py", "the same command goes on"), Ranks(PATIENCE_S, "gloo") as ranks,
          ranks.alone(args.out)):
        answer_all(name, args, ranks)
        if ranks.rank == 0:
            score(name, args.out)


# ---------------------------------------------------------------------------------- text


def run_retention(args: argparse.Namespace) -> None:
    """The text workflow, and each adaptor's without a picture, against the LLM loaded afresh."""
    texts = [read_text(path) for path in args.data]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, info = load_iaa(args.model, None, device, args.workflow)
    workflows = args.workflow or [TEXT, *model.adaptors]
    table = compare(model, info["llm"], workflows, texts, args.limit)
    print_table("text", table, ".4g")
    if TEXT in table:
        same = table[TEXT]["logit difference"] == 0
        print("text-only logits identical to the base model: "
              f"{'yes' if same else 'NO'} ({table[TEXT]['tokens']} tokens)")


def run_lm(args: argparse.Namespace) -> None:
    """Text benchmarks through lm-eval; one that is finished is not asked again."""
    out, table = args.out or args.model / "eval" / "lm", {}
    with (one_line("eval.py", "the same command goes on"), Ranks(PATIENCE_S, "gloo") as ranks,
          ranks.alone(out)):
        model, info = load_iaa(args.model, None, str(ranks.device), [args.workflow])
        own = args.workflow != TEXT
        facts = adaptor_facts(args.model, args.workflow) if own else None
        files = sorted(p for p in args.include.rglob("*") if p.is_file()) if args.include else ()
        include = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        settings = {"workflow": args.workflow, "base": info["base"], "adaptor": facts,
                    "limit": args.limit, "include": include}
        try:
            from evaluation.lm_eval_model import evaluate, open_tasks

            manager = open_tasks(args.tasks, args.include, args.allow_code_execution)
        except (ImportError, AssertionError) as error:  # how lm-eval's tasks miss a package
            raise ValueError(f"{error}: pip install -r requirements-eval.txt") from None
        if ranks.rank == 0:
            for name in args.tasks:
                (out / name).mkdir(exist_ok=True)
                check_settings(out / name, settings)
        finished = [name for name in args.tasks if (out / name / "scores.json").is_file()]
        ranks.barrier()  # all have looked
        tokenizer = Tokenizer.load(info["llm"])
        for name in args.tasks:
            folder = out / name
            found = None if name in finished else evaluate(
                model, tokenizer, args.workflow, name, manager, args.limit,
                args.allow_code_execution)
            if found is not None:
                lines = (json.dumps(sample, default=str) for sample in found[1])
                replace_text(folder / "answers.jsonl", "".join(line + "\n" for line in lines))
                write_json(folder / "scores.json", found[0])
            if ranks.rank == 0:
                table[name] = read_json(folder / "scores.json")
                print_table("lm-eval", table)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score a model.", allow_abbrev=False)
    parts = parser.add_subparsers(dest="what", required=True, metavar="WHAT",
                                  help=", ".join((*BENCHMARKS, "retention", "lm")))
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--model", type=Path, default=Path("runs/demo"),
                        help="folder with iaa.json [%(default)s]")
    for name in BENCHMARKS:
        add = parts.add_parser(name, parents=[shared], allow_abbrev=False).add_argument
        add("data", type=Path, nargs="?", metavar="DATA", help="the published file or folder")
        add("--images", type=Path, help="root of the pictures, where DATA has none")
        add("--out", type=Path, help="folder of the answers [MODEL/eval/NAME]")
        add("--limit", type=int, help="ask about this many, by whole pictures [all]")
        add("--seed", type=int, default=0, help="choice of the pictures [%(default)s]")
        add("--batch-tokens", type=int, help="tokens at once, about [2048; 32768 on a GPU]")
        add("--quantize", choices=["int8"], help="as sample.py's")
        add("--rescore", action="store_true", help="score the answers that are there")
    add = parts.add_parser("retention", parents=[shared], allow_abbrev=False).add_argument
    add("data", type=Path, nargs="+", metavar="FILE", help="text files")
    add("--workflow", nargs="+", help="of these [text and every adaptor]")
    add("--limit", type=int, default=64, help="greedy answers compared [%(default)s]")
    add = parts.add_parser("lm", parents=[shared], allow_abbrev=False).add_argument
    add("tasks", nargs="+", metavar="TASK", help="mmlu c-eval bbh humaneval math, or lm-eval's")
    add("--workflow", default=TEXT, help="[%(default)s]")
    add("--include", type=Path, help="folder of further task files (YAML)")
    add("--out", type=Path, help="folder of the answers [MODEL/eval/lm]")
    add("--limit", type=int, help="questions a task [all]")
    add("--allow-code-execution", action="store_true", help="run what the model writes (humaneval)")
    args = parser.parse_args()
    for key in ("limit", "batch_tokens"):
        value = getattr(args, key, None)
        if value is not None and value < 1:
            raise ValueError(f"--{key.replace('_', '-')} {value}: must be 1 or more")
    return args


@one_line("eval.py")
def main() -> None:
    """Command line; what a user can cause ends in one line."""
    args = arguments()
    run = {"retention": run_retention, "lm": run_lm}
    if args.what in run:
        run[args.what](args)
    else:
        run_benchmark(args.what, args)


if __name__ == "__main__":
    main()
