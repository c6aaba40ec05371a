"""The paper's ablations (Tables 5 to 8) at the demo's size, several seeds each, in one command.

    python ablate.py [--seeds 3] [--only iaa a b] [--set instruct.steps=100 ...]

- Every run has the same budget: the same steps on the same rows; a stage that a run leaves out
  gives its steps to the run's first stage. Runs of one seed see the rows in the same order.
- A run is `train.py` in a folder of its own, `OUT/NAME-SEED`, and `score.json` once it is scored.
  Started again, what is finished is not repeated, and a run that was killed goes on.
- Started twice at a time, the two share the runs out: what one is at, the other passes over.
- A run whose first stage is that of a finished one, seed included, takes a copy of its result.
- The table goes to `OUT/table.md`: mean and spread over the seeds beside the paper's figures.
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

from evaluation.ask import Asker
from evaluation.benchmarks import BENCHMARKS, read_questions
from training.config import Config, read_config
from evaluation.__main__ import chosen
from common.files import (
    InUse,
    check_same,
    lock,
    new_folder,
    one_line,
    read_json,
    replace_text,
    write_json,
)
from lean import set_memory_use
from storage import load_iaa
from tokenization.tokenizer import Tokenizer
from train import train

NOTHING_OWN = ("insertion=0", "own_embedding=false", "own_head=false")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    table: str  # of the paper
    about: str
    settings: tuple[str, ...] = ()  # as of `train.py --set`
    paper: tuple[str, ...] = ("",) * 4  # MME perception, MMBench-EN and -CN test, MMMU val


VARIANTS = {
    "iaa": Variant("5-8", "structure c, 8 layers, own embedding and head, all stages", (),
                   ("1581.8", "72.7", "69.2", "39.8")),
    "a": Variant("5", "structure a", ("structure=a",), ("1425.4", "72.4", "65.0", "38.2")),
    "b": Variant("5", "structure b", ("structure=b",), ("1556.0", "72.7", "68.5", "39.6")),
    "frozen-ends": Variant("5", "frozen embedding and head", NOTHING_OWN[1:],
                           ("1563.4", "72.6", "68.7", "39.6")),
    "without-stage1": Variant("6", "without stage 1", (
        'stages=["pretrain_adaptor", "instruct"]',), ("1512.1", "", "", "39.3")),
    "without-stage2": Variant("6", "without stage 2", (
        'stages=["pretrain_projector", "instruct"]',), ("1565.4", "", "", "39.5")),
    "n0": Variant("7", "nothing inserted, projector only", NOTHING_OWN),
    "n4": Variant("7", "4 insertion layers", ("insertion=4",)),
    "n15": Variant("7", "15 of 30 insertion layers (paper: 14 of 32)", ("insertion=15",),
                   ("1591.5", "74.9", "70.5", "39.9")),
    "llava": Variant("8", "LLaVA: nothing inserted, the LLM trained along (paper: on 1.2M rows)", (
        *NOTHING_OWN, "own_llm=true", 'stages=["pretrain_projector", "instruct"]'),
        ("1506.0", "68.9", "61.6", "36.8")),
}
NOTE = ("The paper's IAA-8 on the 1.2M rows of its LLaVA row: 1560.2, 69.9, 64.2, 39.0 (Table 2). "
        "Spread: standard deviation over the seeds.")
HEAD = ("name", "the paper's table", "variant", "seeds", "right, %", "held-out loss", "trained, M",
        "min", "MME-P", "MMB-EN", "MMB-CN", "MMMU")
OF_THE_ADAPTOR = ("out", "insertion", "structure", "own_embedding", "own_head", "own_llm", "stage",
                  "stages")  # what a bare projector's training does not depend on


def run_config(path: str, settings: list[str], name: str, seed: int) -> Config:
    """The run's configuration: the variant's, in its own folder, with the whole budget of steps."""
    whole = read_config(path, settings)
    config = read_config(path, [*settings, *VARIANTS[name].settings])
    left_out = sum(s.steps for s in whole.stage) - sum(s.steps for s in config.stage)
    first = replace(config.stage[0], steps=config.stage[0].steps + left_out)
    return replace(config, out=str(Path(whole.out, f"{name}-{seed}")), seed=seed,
                   stage=[first, *config.stage[1:]])


def check_settings(config: Config) -> None:
    """Raise ValueError where the run's folder holds a run of other settings."""
    path = Path(config.out, "config.json")
    if path.is_file():
        check_same(config.out, read_json(path), asdict(config),
                   "remove it, or --set out=... for another folder")


def share_first_stage(config: Config) -> None:
    """Copy the finished first stage of a run beside this one that trained the same projector."""
    first, own = config.stage[0], json.loads(json.dumps(asdict(config)))  # as read back
    target = Path(config.out, first.name)
    if first.trains != "projector" or target.exists():
        return
    for path in sorted(Path(config.out).parent.glob("*/config.json")):
        other = read_json(path)
        same = all(other.get(key) == own[key] for key in own if key not in OF_THE_ADAPTOR)
        source = path.parent / first.name
        if same and other["stage"][0] == own["stage"][0] and (source / "adaptor").is_dir():
            with new_folder(target) as new:
                shutil.copytree(source / "adaptor", new / "adaptor")
                shutil.copy(source / "log.jsonl", new)
            print(f"stage {first.name}: taken from {path.parent}", flush=True)
            return


def score(config: Config, questions: int) -> dict:
    """Ask the trained model `questions` held-out questions; what the table shows of the run."""
    folder, last = Path(config.out), config.stage[-1]
    model, info = load_iaa(folder)
    asked = chosen(read_questions(Path(config.images)), questions, 0)
    asker = Asker(model, Tokenizer.load(info["llm"]), info["prompts"], 2048)
    answers = asker.ask(asked, last.adaptor, BENCHMARKS["easy-vqa"].tokens["mm"])
    right = sum(answer == asked[i].facts["expected"] for i, answer in answers)
    log = [json.loads(line) for stage in config.stage
           for line in (folder / stage.name / "log.jsonl").read_text().splitlines()]
    return {
        "questions": questions,
        "right": 100 * right / len(asked),
        "held_out": log[-1]["held_out"],
        "trained": sum(p.numel() for p in model.adaptors[last.adaptor].parameters()) / 1e6,
        "minutes": sum(line["seconds"] for line in log) / 60,
    }


def table(out: Path, questions: int) -> str:
    """The finished runs in `out` as a Markdown table, a row a variant."""
    def cell(values: list[float], form: str) -> str:
        spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
        return f"{mean(values):{form}}{spread}"

    rows = [HEAD, ("---",) * len(HEAD)]
    for name, variant in VARIANTS.items():
        scores = [read_json(path) for path in sorted(out.glob(f"{name}-*/score.json"))]
        scores = [score for score in scores if score["questions"] == questions]
        if scores:
            columns = {key: [score[key] for score in scores] for key in scores[0]}
            rows.append((name, variant.table, variant.about, str(len(scores)),
                         cell(columns["right"], ".1f"), cell(columns["held_out"], ".3f"),
                         f"{columns['trained'][0]:.1f}", f"{median(columns['minutes']):.1f}",
                         *variant.paper))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + f"\n{NOTE}\n"


def ablate(path: str, settings: list[str], names: list[str], seeds: int, questions: int) -> None:
    """Train and score what is not finished, a seed after the other; the table after each run."""
    out = Path(read_config(path, settings).out)
    runs = [(name, run_config(path, settings, name, seed))
            for seed in range(seeds) for name in names]
    for _, config in runs:
        check_settings(config)
        if not config.stage[-1].held_out:
            raise ValueError(f"stage {config.stage[-1].name}: held_out is missing, for the table")
    if runs:
        read_questions(Path(runs[0][1].images))  # says now what is missing
    for number, (name, config) in enumerate(runs, 1):
        print(f"\nrun {number} of {len(runs)}: {name}, seed {config.seed}: "
              f"{VARIANTS[name].about}", flush=True)
        began = time.perf_counter()
        try:
            with lock(Path(config.out), ".ablate-lock"):  # train.py has one of its own
                done = run_once(config, questions)
        except InUse:
            print("another process is at it")
            continue
        if not done:
            print("finished before")
            continue
        replace_text(out / "table.md", table(out, questions))
        print(f"done in {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    print(f"\n{table(out, questions)}")


def run_once(config: Config, questions: int) -> bool:
    """Train and score a run; False where that was done before."""
    done = Path(config.out, "score.json")
    if done.is_file() and read_json(done, "questions")["questions"] == questions:
        return False
    share_first_stage(config)
    train(config, None)
    write_json(done, score(config, questions))
    return True


@one_line("ablate.py", "the same command goes on")
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="The paper's ablations at the demo's size.", allow_abbrev=False)
    add = parser.add_argument
    add("--config", default="configs/ablate.toml", help="the budget of a run [%(default)s]")
    add("--seeds", type=int, default=3, help="runs of each variant [%(default)s]")
    add("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"of {', '.join(VARIANTS)} [all]")
    add("--questions", type=int, default=300, help="asked of each run [%(default)s]")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py")
    args = parser.parse_args()
    if min(args.seeds, args.questions) < 1:
        raise ValueError("--seeds, --questions: 1 or more")
    ablate(args.config, args.set, args.only, args.seeds, args.questions)


if __name__ == "__main__":
    set_memory_use()
    main()
