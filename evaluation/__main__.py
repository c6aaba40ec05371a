"""Score a model, and show that its text is as it was.

    python -m evaluation text-retention README.md --model runs/demo   against the LLM alone
    python -m evaluation easy-vqa data/easy-vqa --model runs/demo
    python -m evaluation sheet data/easy-vqa --model runs/demo        its answers as one picture
    python -m evaluation refcoco DATA --images coco/train2014 --model runs/iaa8
    python -m evaluation mme DATA --model runs/iaa8
    python -m evaluation lmms mmbench_en_dev_static mmmu_val --model runs/iaa8
    python -m evaluation lm mmlu c-eval bbh humaneval math --model runs/iaa8
    torchrun --nproc_per_node 8 -m evaluation mme ...                 8 ranks

Answers and scores go to `eval/WHAT/` in the model's folder. docs/evaluation.md explains the rest.
"""

import argparse
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from common.device import CHOICES, Ranks
from common.files import one_line
from evaluation import answers, easy_vqa, mme, refcoco, sheet, text_retention
from evaluation.answers import Question, Record, Table
from iaa import TEXT, Index
from sample import Chat

BENCHMARKS = {"easy-vqa": easy_vqa, "refcoco": refcoco, "mme": mme}
PATIENCE_S = 7200  # rank 0 waits so long for the slowest rank


def load(args: argparse.Namespace, workflows: list[str] | None, **settings) -> Chat:
    """The model with these workflows, None: all."""
    return Chat.load(args.model, args.dtype, args.device, args.quantize, workflows, **settings)


def answer(args: argparse.Namespace, questions: list[Question], ranks: Ranks) -> list[Record]:
    """A record for each question that is answered; a rank asks its share.

    Left out are questions that the model has no adaptor for, and those that `ask` skips.
    """
    there = Index.read(args.model).adaptors
    asked = [question for question in questions if question.workflow in there]
    workflows = dict.fromkeys(question.workflow for question in asked or questions)
    chat = load(args, [*workflows])  # raises where there is none of them
    parts = [answers.ask(chat, asked[ranks.rank :: ranks.world], args.batch)]
    if ranks.world > 1:
        parts, own = [None] * ranks.world, parts[0]
        dist.all_gather_object(parts, own)
    said = [None] * len(asked)
    for rank, part in enumerate(parts):
        said[rank :: ranks.world] = part
    records = [
        {"key": q.key, "image": q.image, **q.facts, "prompt": q.text, "answer": text.strip()}
        for q, text in zip(asked, said, strict=True) if text is not None]
    if not records:
        raise ValueError(f"none of {len(asked)} questions could be asked")
    return records


def read_questions(args: argparse.Namespace, benchmark: ModuleType) -> list[Question]:
    """Those of all the files or folders, or some of them by --limit."""
    questions = [q for path in args.data for q in benchmark.read(Path(path), args.images)]
    return answers.sample_questions(questions, args.limit)


def run_benchmark(args: argparse.Namespace, ranks: Ranks) -> None:
    """Ask all questions on all ranks, then score them on rank 0."""
    benchmark = BENCHMARKS[args.what]
    records = answer(args, read_questions(args, benchmark), ranks)
    if ranks.rank == 0:
        table = benchmark.score(records)
        answers.report(args.model / "eval" / args.what, args.what, records, table)


def run_sheet(args: argparse.Namespace, ranks: Ranks) -> None:
    """Ask some held-out questions of the demo and draw them with their answers."""
    path = args.model / "answers.png"
    records = answer(args, sheet.choose(read_questions(args, easy_vqa)), ranks)
    if ranks.rank == 0:
        sheet.draw(records, path)
        print(path)


def run_text_retention(args: argparse.Namespace, ranks: Ranks) -> None:
    """Compare each workflow, without pictures, with the LLM loaded afresh."""
    texts = [answers.read_text(Path(path)) for path in args.data]
    only = [args.workflow] if args.workflow else None
    chat, base = load(args, only), load(args, [TEXT])
    table = text_retention.compare(chat.model, base.model, chat.tokenizer,
                                   only or [TEXT, *chat.model.adaptors], texts, args.limit or 16,
                                   args.batch)
    answers.print_table("text", table, ".4g")
    if TEXT in table:
        row = table[TEXT]
        print(f"text-only logits identical to the base model: {row['identical']} "
              f"({row['tokens']} tokens)")


def run_harness(args: argparse.Namespace, ranks: Ranks) -> None:
    """Score tasks through lm-eval or lmms-eval; a task's files and table come when it is done."""
    harness = importlib.import_module(f"evaluation.{args.what}_eval_model")
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    elif any(name.startswith("humaneval") for name in args.data):
        raise ValueError("humaneval runs what the model writes: allow it, --allow-code-execution")
    manager = harness.TaskManager(include_path=args.include and str(args.include),
                                  include_defaults=args.include is None)
    for name in args.data:
        if harness.TASKS.get(name, [name])[0] not in manager.all_tasks:
            raise ValueError(f"no task or group {name!r} in {args.include or args.what + '-eval'}")
    workflow = args.workflow or {"lm": TEXT, "lmms": "mm"}[args.what]
    chat = load(args, [workflow], chosen=workflow)
    for name in args.data:
        found = harness.evaluate(chat, name, manager, args)
        if ranks.rank == 0:
            records = [record for some in found["samples"].values() for record in some]
            answers.report(args.model / "eval" / args.what / name, f"{args.what}-eval", records,
                           figures(found["results"]), ".4g")


def figures(results: dict[str, dict]) -> Table:
    """A harness's figures by "metric,filter", without what else it says. ",none" is cut off."""
    return {task: {name.removesuffix(",none"): float(value) for name, value in row.items()
                   if "," in name and "stderr" not in name and isinstance(value, int | float)}
            for task, row in results.items()}


COMMANDS = {"text-retention": run_text_retention, "sheet": run_sheet, "lm": run_harness,
            "lmms": run_harness, **dict.fromkeys(BENCHMARKS, run_benchmark)}
TAKEN_BY = {"images": ["refcoco"], "workflow": ["text-retention", "lm", "lmms"],
            "include": ["lm", "lmms"], "allow_code_execution": ["lm"]}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. ValueError for a number below 1, or an option that WHAT does not take."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("what", metavar="WHAT", choices=COMMANDS, help=", ".join(COMMANDS))
    add("data", metavar="DATA", nargs="+", help="published files or folders; texts; tasks")
    add("--model", type=Path, default=Path("runs/demo"), help="folder of a run [%(default)s]")
    add("--dtype", default="auto", help=f"{', '.join(CHOICES)} [%(default)s]")
    add("--device", help="cuda, mps, cpu [the first that there is]")
    add("--quantize", choices=["int8"], help="weights of LLM and adaptors, as in sample.py")
    add("--batch", type=int, default=32, help="questions asked at once [%(default)s]")
    add("--limit", type=int, help="questions of each workflow (by whole pictures) or task [all]; "
                                  "texts that text-retention continues [16]")
    add("--images", type=Path, help="root of the pictures, for refcoco")
    add("--workflow", help="for text-retention [all], lm [text], lmms [mm]")
    add("--include", type=Path, metavar="FOLDER",
        help="task files for lm and lmms, in place of the harness's")
    add("--allow-code-execution", action="store_true",
        help="lm humaneval runs what the model writes")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--batch {args.batch}, --limit {args.limit}: must be 1 or more")
    for option, commands in TAKEN_BY.items():
        if getattr(args, option) and args.what not in commands:
            raise ValueError(f"--{option.replace('_', '-')} is for {', '.join(commands)}, "
                             f"not for {args.what}")
    return args


@one_line("evaluation")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    with Ranks(PATIENCE_S, "gloo") as ranks:
        if ranks.world > 1 and (args.device or args.what in ("text-retention", "lm")):
            raise ValueError("text-retention, lm and --device are for one process: no torchrun")
        if ranks.world > 1:
            args.device = str(ranks.device)
        COMMANDS[args.what](args, ranks)


if __name__ == "__main__":
    main()
