"""The paper's ablations (Tables 5 to 8) at the demo's size, several seeds each, in one command.

    python -m evaluation.ablate [--seeds 3] [--only iaa structure_a ...] [--set instruct.steps=100]

A run is `train.py`, then `evaluation easy-vqa`, in the folder OUT/NAME-SEED. A finished run is not
repeated, and a killed one goes on. docs/ablations.md says how the variants are made alike.
"""

import argparse
import json
import math
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from common.files import one_line, read_json
from evaluation.answers import print_table
from training.config import read_config
from training.log import read_log

CONFIGS = Path(__file__).parent.parent / "configs"
BUDGET = str(CONFIGS / "ablate.toml")  # of each run; also the variant "iaa", as it is
QUESTIONS = "300"  # asked of each run


def read_variants() -> dict[str, list[str]]:
    """Name -> what its file says of the method (structure, stages, ...), as `train.py --set`."""
    variants = {"iaa": []}
    for path in sorted((CONFIGS / "ablations").glob("*.toml")):
        values = tomllib.loads(path.read_text())
        if "stage" not in values:  # else it changes the data of the paper's size
            variants[path.stem] = [f"{key}={json.dumps(value)}" for key, value in values.items()
                                   if key not in ("base", "out")]
    return variants


def settings_of_run(given: list[str], variant: list[str], out: Path, seed: int) -> list[str]:
    """The settings of one run: the caller's, the variant's, its folder, and all of the budget.

    The first stage gets the steps of those that the variant leaves out.
    """
    settings = [*given, *variant, f"out={out}", f"seed={seed}"]
    whole, kept = (read_config(BUDGET, some).stage for some in (given, settings))
    more = sum(stage.steps for stage in whole) - sum(stage.steps for stage in kept)
    return [*settings, f"{kept[0].name}.steps={kept[0].steps + more}"]


def run(*command: str) -> None:
    """Run a command of this repository. ValueError where it fails; it has said why."""
    if subprocess.run([sys.executable, *command]).returncode:
        raise ValueError(f"failed: python {' '.join(command)}")


def spread(values: list[float]) -> str:
    """The mean of some runs, and the standard deviation where there are several."""
    several = len(values) > 1 and math.isfinite(sum(values))  # NaN: no held-out data
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if several else "")


@one_line("evaluation.ablate", "the same command goes on")
def main(argv: list[str] | None = None) -> None:
    """Train and score what is not finished, one seed of all variants first; print the table."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.ablate", allow_abbrev=False,
                                     description="The paper's ablations at the demo's size.")
    variants, table, add = read_variants(), {}, parser.add_argument
    add("--seeds", type=int, default=3, help="runs of each variant [%(default)s]")
    add("--only", nargs="+", default=list(variants), choices=variants, metavar="NAME",
        help=f"of {', '.join(variants)} [all]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py")
    args = parser.parse_args(argv)
    whole = read_config(BUDGET, args.set)
    right, loss = defaultdict(list), defaultdict(list)
    for seed in range(args.seeds):
        for name in args.only:
            folder = Path(whole.out, f"{name}-{seed}")
            scores = folder / "eval/easy-vqa/scores.json"
            settings = settings_of_run(args.set, variants[name], folder, seed)
            flags = [word for setting in settings for word in ("--set", setting)]
            run("train.py", "--config", BUDGET, *flags)  # refuses a folder of other settings
            adaptor = folder / whole.stage[-1].name / "adaptor"
            if not scores.is_file() or scores.stat().st_mtime < adaptor.stat().st_mtime:
                run("-m", "evaluation", "easy-vqa", whole.images, "--model", str(folder),
                    "--limit", QUESTIONS)
            log = read_log(folder / whole.stage[-1].name / "log.jsonl")
            right[name].append(read_json(scores)["right, %"]["all"])
            loss[name].append(log[-1].get("held_out", math.nan))
            table[name] = {"seeds": seed + 1, "right, %": spread(right[name]),
                           "held-out loss": spread(loss[name])}
            print_table("variant", table)


if __name__ == "__main__":
    main()
