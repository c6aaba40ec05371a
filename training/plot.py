"""Draw a run: `python -m training.plot RUN` reads each stage's log and writes RUN/curves.png.

The stages stand side by side along the global step, each in its colour: loss above (thin: each
step, thick: smoothed, dots: held out), learning rate below.
"""

import argparse
import json
import math
from pathlib import Path

from common.files import new_file, one_line, read_json

WIDEST = 50  # steps to either side that the smoothed loss may look


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl. A line that a running or killed run has not finished is left out."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def smooth(losses: list[float]) -> list[float]:
    """For each step the geometric mean of the losses around it, but for those not finite."""
    half, smoothed = min(max(1, len(losses) // 40), WIDEST), []
    for i in range(len(losses)):
        near = losses[max(0, i - half) : i + half + 1]
        logs = [math.log(loss) for loss in near if 0 < loss < math.inf]
        smoothed.append(math.exp(sum(logs) / len(logs)) if logs else math.nan)
    return smoothed


def draw(stages: dict[str, list[dict]], title: str, path: Path) -> None:
    """Write the picture of the stages' rows, whole or not at all."""
    import matplotlib  # here, so that a missing run is said without it

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True,
                                            height_ratios=(3, 1), layout="constrained")
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
    figure.legend(loc="outside upper right", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    top.set(ylabel="loss (log scale)", yscale="log", xlim=(0, start))
    top.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter(ticker.NullFormatter())
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    for axis in (top, bottom):
        axis.grid(color="#e8e8e8")
        axis.spines[["top", "right"]].set_visible(False)
    with new_file(path) as new:
        figure.savefig(new, dpi=130)
    pyplot.close(figure)


@one_line("training.plot")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss and learning rate: RUN/curves.png.")
    parser.add_argument("run", type=Path, help="folder of the run: `out` of its configuration")
    run = parser.parse_args(argv).run
    names = [stage["name"] for stage in read_json(run / "config.json", "stage")["stage"]]
    stages = {name: read_log(run / name / "log.jsonl") for name in names}
    stages = {name: rows for name, rows in stages.items() if rows}
    if not stages:
        raise ValueError(f"{run}: nothing logged yet in {', '.join(names)}")
    for name, rows in stages.items():
        minutes = sum(row["seconds"] for row in rows) / 60
        print(f"stage {name}: {len(rows)} steps, {minutes:.1f} min")
    try:
        draw(stages, str(run), run / "curves.png")
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from None
    print(run / "curves.png")


if __name__ == "__main__":
    main()
