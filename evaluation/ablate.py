"""The paper's ablations (Tables 5 to 8) at the demo's size, several seeds each, in one command.

    python -m evaluation.ablate [--seeds 3] [--only iaa structure_a ...] [--set instruct.steps=100]

- `configs/ablate.toml` is the budget of a run. A variant is a file of `configs/ablations/`: what it
  says of the method (structure, insertion, stages, ...) goes over the budget. Its first line is its
  name in the table. `iaa` is the budget as it is.
- All runs have the same number of steps on the same rows. A stage that a variant leaves out gives
  its steps to the first one that is left. Runs of one seed see the rows in the same order.
- A run is `train.py`, then `evaluation easy-vqa`, in the folder OUT/NAME-SEED. Started again, a
  finished run is not repeated, and a killed one goes on.
- The table goes to OUT/table.md: means and standard deviations over the seeds.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import mean, stdev

from common.files import one_line, read_json, write_text
from training.config import Config, read_config
from training.log import read_log

CONFIGS = Path(__file__).parent.parent / "configs"
BUDGET = str(CONFIGS / "ablate.toml")
QUESTIONS = "300"  # asked of each run
HEAD = ("name", "variant", "seeds", "right, %", "held-out loss", "min")


def read_variants() -> dict[str, tuple[str, list[str]]]:
    """Name -> (what it is, its settings as of `train.py --set`).

    A file with stages of its own changes the data of the paper's size: nothing to try here.
    """
    found = {"iaa": ("structure c, own embedding and head, all stages", [])}
    for path in sorted((CONFIGS / "ablations").glob("*.toml")):
        values = tomllib.loads(path.read_text())
        if "stage" not in values:
            about = path.read_text().splitlines()[0].lstrip("# ")
            found[path.stem] = about, [f"{key}={json.dumps(value)}" for key, value in values.items()
                                       if key not in ("base", "out")]
    return found


def settings_of_run(given: list[str], variant: list[str], out: Path, seed: int) -> list[str]:
    """The settings of one run: the caller's, the variant's, its folder, and the whole budget."""
    settings = [*given, *variant, f"out={out}", f"seed={seed}"]
    whole, kept = (sum(stage.steps for stage in read_config(BUDGET, some).stage)
                   for some in (given, settings))
    first = read_config(BUDGET, settings).stage[0]
    return [*settings, f"{first.name}.steps={first.steps + whole - kept}"]


def run(*command: str) -> None:
    """Run a command of this repository. ValueError where it fails; it has said why."""
    if subprocess.run([sys.executable, *command]).returncode:
        raise ValueError(f"failed: python {' '.join(command)}")


def result(config: Config) -> tuple[float, float, float]:
    """Of a finished run: right answers in percent, the held-out loss, minutes of training."""
    folder = Path(config.out)
    log = [row for stage in config.stage for row in read_log(folder / stage.name / "log.jsonl")]
    right = read_json(folder / "eval/easy-vqa/scores.json")["right, %"]["all"]
    return right, log[-1]["held_out"], sum(row["seconds"] for row in log) / 60


def table(variants: dict[str, tuple[str, list[str]]], results: dict[str, list[tuple]]) -> str:
    """The finished runs as a Markdown table, a row a variant: means, and deviations over seeds."""
    rows = [HEAD, ("---",) * len(HEAD)]
    for name, runs in results.items():
        cells = [f"{mean(column):.3g}" + (f" ± {stdev(column):.2g}" if len(column) > 1 else "")
                 for column in zip(*runs, strict=True)]
        rows.append((name, variants[name][0], str(len(runs)), *cells))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


@one_line("evaluation.ablate", "the same command goes on")
def main(argv: list[str] | None = None) -> None:
    """Train and score what is not finished, one seed of all variants first; print the table."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.ablate", allow_abbrev=False,
                                     description="The paper's ablations at the demo's size.")
    variants, results = read_variants(), {}
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="runs of each variant [%(default)s]")
    add("--only", nargs="+", default=list(variants), choices=variants, metavar="NAME",
        help=f"of {', '.join(variants)} [all]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py")
    args = parser.parse_args(argv)
    whole = read_config(BUDGET, args.set)
    for seed in range(args.seeds):
        for name in args.only:
            folder = Path(whole.out, f"{name}-{seed}")
            settings = settings_of_run(args.set, variants[name][1], folder, seed)
            if not (folder / "eval/easy-vqa/scores.json").is_file():
                print(f"\n{name}, seed {seed}: {variants[name][0]}", flush=True)
                flags = [word for setting in settings for word in ("--set", setting)]
                run("train.py", "--config", BUDGET, *flags)
                run("-m", "evaluation", "easy-vqa", whole.images, "--model", str(folder),
                    "--limit", QUESTIONS)
            results.setdefault(name, []).append(result(read_config(BUDGET, settings)))
            write_text(Path(whole.out, "table.md"), table(variants, results))
    print(f"\n{table(variants, results)}")


if __name__ == "__main__":
    main()
