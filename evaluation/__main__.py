"""Score a model, and show that its text is as it was.

    python -m evaluation text-retention README.md --model runs/demo   against the LLM alone
    python -m evaluation easy-vqa data/easy-vqa --model runs/demo
    python -m evaluation sheet data/easy-vqa --model runs/demo        its answers as one picture
    python -m evaluation refcoco DATA --images coco/train2014 --model runs/iaa8
    python -m evaluation mme DATA --model runs/iaa8
    python -m evaluation lmms mmbench_en_dev_static mmmu_val --model runs/iaa8
    python -m evaluation lm mmlu c-eval bbh humaneval math --model runs/iaa8
    torchrun --nproc_per_node 8 -m evaluation mme ...                 8 ranks; all but `lm`

Answers and scores go to `eval/WHAT/` in the model's folder. docs/evaluation.md explains the rest.
"""

import argparse
import importlib
import types
from collections.abc import Callable
from pathlib import Path

from common.device import CHOICES, DTYPES, Ranks, choose_device, choose_dtype
from common.files import one_line
from evaluation import easy_vqa, mme, refcoco, sheet, text_retention
from evaluation.answers import (
    Question,
    Record,
    Table,
    ask,
    gather,
    print_table,
    sample_questions,
    save,
)
from iaa import TEXT, Index, load_iaa
from sample import Chat

BENCHMARKS = {"easy-vqa": easy_vqa, "refcoco": refcoco, "mme": mme}
PATIENCE_S = 7200  # rank 0 waits so long for the slowest rank


def load(args: argparse.Namespace, workflows: list[str], ranks: Ranks) -> Chat:
    """The model with these workflows, and its tokenizer; one of several ranks takes its own GPU."""
    device = str(ranks.device) if ranks.world > 1 else args.device
    return Chat.load(args.model, args.dtype, device, args.quantize, workflows)


def answer(
    args: argparse.Namespace, questions: list[Question], max_tokens: dict[str, int], ranks: Ranks
) -> list[Record]:
    """The records of the questions that the model has adaptors for; on rank 0, in their order."""
    there = Index.read(args.model).adaptors
    workflows = [name for name in max_tokens if name in there]
    chat = load(args, workflows or [*max_tokens], ranks)  # raises where there is none of them
    questions = [question for question in questions if question.workflow in workflows]
    mine = questions[ranks.rank :: ranks.world]
    records = gather(ask(chat.model, chat.tokenizer, mine, max_tokens, args.batch), ranks)
    place = {question.key: number for number, question in enumerate(questions)}
    return sorted(records, key=lambda record: place[record["key"]])


def run_benchmark(args: argparse.Namespace) -> None:
    """Ask all questions on all ranks, then score them on rank 0."""
    benchmark = BENCHMARKS[args.what]
    questions = sample_questions(benchmark.read(args.data, args.images), args.limit, args.seed)
    with Ranks(PATIENCE_S, "gloo") as ranks:
        records = answer(args, questions, benchmark.MAX_TOKENS, ranks)
        if ranks.rank == 0:
            table = benchmark.score(records)
            save(args.model / "eval" / args.what, records, table)
            print_table(args.what, table)


def run_sheet(args: argparse.Namespace) -> None:
    """Ask some held-out questions of the demo and draw them with their answers."""
    out = args.out or args.model / "answers.png"
    questions = sheet.choose(easy_vqa.read(args.data), args.seed)
    with Ranks(PATIENCE_S, "gloo") as ranks:
        records = answer(args, questions, easy_vqa.MAX_TOKENS, ranks)
    answered = {record["key"] for record in records}
    sheet.write(out, [question for question in questions if question.key in answered], records)
    print(out)


def run_text_retention(args: argparse.Namespace) -> None:
    """Compare each workflow, without pictures, with the LLM loaded afresh."""
    texts = [path.read_text(encoding="utf-8") for path in args.data]
    device = choose_device(args.device)
    name, _ = choose_dtype(args.dtype, device)
    model, llm = load_iaa(args.model, DTYPES[name], device, args.workflow)
    workflows = args.workflow or [TEXT, *model.adaptors]
    table = text_retention.compare(model, llm, workflows, texts, args.limit)
    print_table(f"text, {name}", table, ".4g")
    if TEXT in table:
        row = table[TEXT]
        print(f"text-only logits identical to the base model: {row['identical']} "
              f"({row['tokens']} tokens)")


def run_lm(args: argparse.Namespace) -> None:
    """Score text benchmarks through lm-eval, in one process."""
    harness = import_harness("lm")
    manager = harness.open_tasks(args.tasks, args.include, args.allow_code_execution)
    run_tasks(args, args.workflow, lambda chat, name: harness.evaluate(
        chat.model, chat.tokenizer, args.workflow, name, manager, args.limit,
        args.allow_code_execution))


def run_lmms(args: argparse.Namespace) -> None:
    """Score benchmarks with pictures through lmms-eval."""
    harness = import_harness("lmms")
    run_tasks(args, harness.WORKFLOW, lambda chat, name: harness.evaluate(
        chat.model, chat.tokenizer, name, args.include, args.limit, args.batch))


def import_harness(what: str) -> types.ModuleType:
    """Our model for lm-eval or lmms-eval. ValueError says which requirements are missing."""
    try:
        return importlib.import_module(f"evaluation.{what}_eval_model")
    except ImportError as error:
        raise ValueError(f"{error}: pip install -r requirements/{what}-eval.txt") from None


def run_tasks(
    args: argparse.Namespace, workflow: str,
    evaluate: Callable[[Chat, str], tuple[Table, list[Record]] | None],
) -> None:
    """Evaluate each task on all ranks; its files and its table come as soon as it is done."""
    with Ranks(PATIENCE_S, "gloo") as ranks:
        chat = load(args, [workflow], ranks)
        for name in args.tasks:
            found = evaluate(chat, name)
            if found is not None:  # on rank 0
                table, records = found
                save(args.model / "eval" / args.what / name, records, table)
                print_table(f"{args.what}-eval", table, ".4g")


# ---------------------------------------------------------------------------------- command line


def add_command(parts, name: str, run: Callable, about: str, asks: bool = True) -> Callable:
    """A subcommand with the options that all have, and those of asking; its `add_argument`."""
    sub = parts.add_parser(name, help=about, description=about, allow_abbrev=False)
    sub.set_defaults(run=run)
    add = sub.add_argument
    add("--model", type=Path, default=Path("runs/demo"), help="folder of a run [%(default)s]")
    add("--dtype", default="auto", help=f"{', '.join(CHOICES)} [%(default)s]")
    add("--device", help="cuda, mps, cpu [the first that there is]")
    if asks:
        add("--batch", type=int, default=32, help="questions asked at once [%(default)s]")
        add("--quantize", choices=["int8"], help="weights of LLM and adaptors, as in sample.py")
    return add


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError for a --limit or --batch below 1."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="Score a model.",
                                     allow_abbrev=False)
    parts = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, benchmark in BENCHMARKS.items():
        add = add_command(parts, name, run_benchmark, benchmark.__doc__.splitlines()[0])
        add("data", type=Path, metavar="DATA", help="the published file or folder")
        add("--images", type=Path, help="root of the pictures, where DATA has none")
        add("--limit", type=int, help="questions of each workflow, by whole pictures [all]")
        add("--seed", type=int, default=0, help="of the choice of pictures [%(default)s]")
    add = add_command(parts, "sheet", run_sheet, "Answers of the demo's model as one picture.")
    add("data", type=Path, metavar="DATA", help="as of easy-vqa")
    add("--out", type=Path, help="the picture to write [MODEL/answers.png]")
    add("--seed", type=int, default=0, help="of the choice of pictures [%(default)s]")
    add = add_command(parts, "text-retention", run_text_retention,
                      "Text against the frozen LLM alone: identical?", asks=False)
    add("data", type=Path, nargs="+", metavar="TEXT", help="text files to read")
    add("--workflow", nargs="+", help="text, or adaptors' names [all]")
    add("--limit", type=int, default=16, help="texts to continue, at most [%(default)s]")
    for name, run, about in (("lm", run_lm, "Benchmarks of text through lm-eval."),
                             ("lmms", run_lmms, "Benchmarks with pictures through lmms-eval.")):
        add = add_command(parts, name, run, about)
        add("tasks", nargs="+", metavar="TASK", help="see docs/evaluation.md")
        add("--include", type=Path, metavar="FOLDER", help="task files in place of the harness's")
        add("--limit", type=int, help="questions of each task [all]")
        if name == "lm":
            add("--workflow", default=TEXT, help="text, or an adaptor's name [%(default)s]")
            add("--allow-code-execution", action="store_true",
                help="humaneval runs what the model writes")
    args = parser.parse_args(argv)
    for name in ("limit", "batch"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be 1 or more")
    return args


@one_line("evaluation")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    args.run(args)


if __name__ == "__main__":
    main()
