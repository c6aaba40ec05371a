"""Score a model, and show that its text is as it was.

    python -m evaluation text-retention LICENSE --model runs/demo     against the LLM alone
    python -m evaluation easy-vqa data/easy-vqa --model runs/demo
    python -m evaluation sheet data/easy-vqa --model runs/demo        its answers as one picture
    python -m evaluation refcoco DATA --images coco/train2014 --model runs/iaa8
    python -m evaluation mme DATA --model runs/iaa8
    python -m evaluation lmms mmbench_en_dev_static mmmu_val --model runs/iaa8
    python -m evaluation lm mmlu c-eval bbh math --model runs/iaa8
    torchrun --nproc_per_node 8 -m evaluation mme ...                 8 ranks

Scores go to `eval/WHAT/` in the model's folder. docs/evaluation.md explains the rest.
"""

import argparse
import importlib
import os
from pathlib import Path

from common.device import CHOICES, Ranks, choose_dtype
from common.files import new_file, one_line
from evaluation import easy_vqa, mme, refcoco, text_retention
from evaluation.answers import ask_on_all_ranks, load, report, sample_questions
from iaa import TEXT

BENCHMARKS = {"easy-vqa": easy_vqa, "refcoco": refcoco, "mme": mme}
TABLE_3 = {  # the paper's name -> lm-eval's task and its number of examples
    "mmlu": ("mmlu", 5),
    "c-eval": ("ceval-valid", 5),
    "bbh": ("bbh", None),  # three worked examples are part of the task
    "humaneval": ("humaneval_instruct", 0),
    "math": ("minerva_math", 4),
}
PATIENCE_S = 7200  # rank 0 waits so long for the slowest rank


def run_benchmark(args: argparse.Namespace, ranks: Ranks) -> None:
    """Ask all questions on all ranks, then score the answers on rank 0."""
    benchmark = BENCHMARKS[args.what]
    questions = [q for path in args.data for q in benchmark.read(Path(path), args.images)]
    if args.limit:
        questions = sample_questions(questions, args.limit)
    records = ask_on_all_ranks(args, questions, ranks)
    if ranks.rank == 0:
        report(args.model / "eval" / args.what, args.what, records, benchmark.score(records))


def run_sheet(args: argparse.Namespace, ranks: Ranks) -> None:
    """Ask some held-out questions of the demo and draw them with their answers."""
    questions = easy_vqa.choose([q for path in args.data for q in easy_vqa.read(Path(path))])
    records, path = ask_on_all_ranks(args, questions, ranks), args.model / "answers.png"
    if ranks.rank == 0:
        with new_file(path) as new:
            easy_vqa.draw(records).save(new)
        print(path)


def run_harness(args: argparse.Namespace, ranks: Ranks) -> None:
    """Score tasks through lm-eval or lmms-eval; a task's files and table come when it is done."""
    module = importlib.import_module(f"evaluation.{args.what}_eval_model")
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    elif any(name.startswith("humaneval") for name in args.data):
        raise ValueError("humaneval runs what the model writes: --allow-code-execution permits it")
    manager = module.TaskManager(include_path=args.include, include_defaults=args.include is None)
    known = TABLE_3 if args.what == "lm" and args.include is None else {}
    tasks = {name: known.get(name, (name, None)) for name in args.data}
    for name, (task, _) in tasks.items():
        if task not in manager.all_tasks:
            raise ValueError(f"no task or group {name!r} in {args.include or args.what + '-eval'}")
    workflow = args.workflow or {"lm": TEXT, "lmms": "mm"}[args.what]
    settings = module.settings(load(args, [workflow], workflow), args)
    for name, (task, shots) in tasks.items():
        found = module.simple_evaluate(tasks=[task], num_fewshot=shots, limit=args.limit,
                                       task_manager=manager, bootstrap_iters=0, **settings)
        if ranks.rank == 0:
            table = {task: {key.removesuffix(",none"): float(value) for key, value in row.items()
                            if "," in key and "stderr" not in key  # "metric,filter"
                            and isinstance(value, int | float)}
                     for task, row in found["results"].items()}
            records = [record for some in found["samples"].values() for record in some]
            report(args.model / "eval" / args.what / name, f"{args.what}-eval", records, table,
                   ".4g")


COMMANDS = {  # WHAT -> what runs it, and those of its options that not all take
    "text-retention": (text_retention.run, ("limit", "base", "workflow")),
    "easy-vqa": (run_benchmark, ("limit",)),
    "sheet": (run_sheet, ()),
    "refcoco": (run_benchmark, ("limit", "images")),
    "mme": (run_benchmark, ("limit",)),
    "lm": (run_harness, ("limit", "workflow", "include", "allow_code_execution")),
    "lmms": (run_harness, ("limit", "workflow", "include")),
}


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
    special = [add("--limit", type=int, help="questions of each workflow (by whole pictures) or "
                   "task [all]; windows that text-retention continues [16]"),
               add("--base", type=Path, help="text-retention: a converted Llama [the run's own]"),
               add("--workflow", help="text-retention [all], lm [text], lmms [mm]"),
               add("--images", type=Path, help="refcoco: root of the pictures"),
               add("--include", metavar="FOLDER", help="lm, lmms: the tasks in FOLDER only"),
               add("--allow-code-execution", action="store_true",
                   help="lm humaneval: run what the model writes")]
    args = parser.parse_args(argv)
    if args.batch < 1 or args.limit is not None and args.limit < 1:
        raise ValueError(f"--batch {args.batch}, --limit {args.limit}: must be 1 or more")
    for option in special:
        if getattr(args, option.dest) and option.dest not in COMMANDS[args.what][1]:
            raise ValueError(f"{args.what} takes no {option.option_strings[0]}")
    return args


@one_line("evaluation")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    with Ranks(PATIENCE_S, "gloo") as ranks:
        if ranks.world > 1:
            if args.device or args.what in ("text-retention", "lm"):
                raise ValueError("text-retention, lm and --device are for one process: no torchrun")
            args.device = str(ranks.device)
            args.dtype = ranks.agree_on_dtype(choose_dtype(args.dtype, ranks.device)[0])
        COMMANDS[args.what][0](args, ranks)


if __name__ == "__main__":
    main()
