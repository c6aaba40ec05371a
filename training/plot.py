"""Draw a run: `python -m training.plot RUN` reads each stage's log and writes RUN/curves.png.

The stages stand side by side along the global step, each in its colour: loss above (thin: each
step, thick: smoothed, dots: held out), learning rate below.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean

from common.files import new_file, one_line, read_json
from training.log import read_log


def smooth(losses: list[float]) -> list[float]:
    """For each step the mean of the losses around it, but for those not finite."""
    half = max(1, len(losses) // 40)
    windows = (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))
    return [fmean(list(filter(math.isfinite, near)) or [math.nan]) for near in windows]


def draw(stages: dict[str, list[dict]], title: str, path: Path) -> None:
    """Write the picture of the stages' rows, whole or not at all."""
    from matplotlib import figure  # optional, hence not at the top

    picture = figure.Figure(figsize=(10, 6), layout="constrained")
    top, bottom = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    start = 0
    for number, (name, rows) in enumerate(stages.items()):
        colour = f"C{number}"
        steps = [start + row["step"] + 1 for row in rows]
        losses = [row["loss"] for row in rows]
        held_out = [row.get("held_out", math.nan) for row in rows]
        top.plot(steps, losses, color=colour, alpha=0.3, linewidth=0.8)
        top.plot(steps, smooth(losses), color=colour, linewidth=1.8, label=name)
        top.plot(steps, held_out, "o", color=colour, markeredgecolor="white", zorder=3)
        bottom.plot(steps, [row["lr"] for row in rows], color=colour)
        start = steps[-1]
    # Short stages have no room for their names above the curves, so the names are in the legend.
    picture.legend(loc="outside upper right", ncols=4, frameon=False)
    picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    top.set(ylabel="loss (log scale)", yscale="log", xlim=(0, start))
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    with new_file(path) as new:
        picture.savefig(new, dpi=130)


@one_line("training.plot")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss and learning rate: RUN/curves.png.")
    parser.add_argument("run", type=Path, help="folder of the run: `out` of its configuration")
    run = parser.parse_args(argv).run
    names = [stage["name"] for stage in read_json(run / "config.json", stage=list)["stage"]]
    stages = {name: rows for name in names if (rows := read_log(run / name / "log.jsonl"))}
    if not stages:
        raise ValueError(f"{run}: nothing logged yet in {', '.join(names)}")
    draw(stages, str(run), run / "curves.png")
    print(run / "curves.png")


if __name__ == "__main__":
    main()
