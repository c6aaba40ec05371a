"""Draw a run's curves: `python plot.py RUN` reads each `log.jsonl`, writes `RUN/curves.png`, and
prints how long each stage took.

- Loss (each step thin, smoothed thick, held-out as dots) over the learning rate; stages stand side
  by side along the global step, in the order of `config.json`.
- A line of the log that is not whole, such as the last one of a run that is writing it now, is left
  out and named.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from common.files import new_file, one_line

COLOURS = ("#4477aa", "#228833", "#aa3377", "#cc6622")  # a stage each, then again from the first
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
         "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e8e8e8", "font.size": 10}
SMOOTHING = 1 / 40  # of a stage's steps: how far the thick line looks to either side (at least 3)
NAME_CHARS = 110  # of stage names that fit across the picture


def read_log(path: Path) -> list[dict]:
    """The log's rows as {step, loss, lr, held_out or NaN, seconds}; others are named on stderr."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            row = {"held_out": math.nan} | json.loads(line)
            keys = ("step", "loss", "lr", "held_out", "seconds")
            rows.append({key: float(row[key]) for key in keys})
        except (ValueError, KeyError, TypeError):
            print(f"plot.py: {path} line {number} is not whole: left out", file=sys.stderr)
    return rows


def read_run(run: Path) -> list[tuple[str, list[dict]]]:
    """(name, rows) of each stage that has begun, in order. OSError or ValueError if none has."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run")
    config = run / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such file: "
                                f"is {run} the `out` of a config that train.py ran?")
    try:
        names = [stage["name"] for stage in json.loads(config.read_text())["stage"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config}: not as train.py writes it ({error!r})") from None
    logs = [(name, run / name / "log.jsonl") for name in names]
    stages = [(name, read_log(path)) for name, path in logs if path.is_file()]
    stages = [(name, rows) for name, rows in stages if rows]
    if not stages:
        raise ValueError(f"{run}: nothing logged yet in {', '.join(names)}")
    return stages


def smooth(values: list[float]) -> list[float]:
    """Mean, exponentially weighted to both sides, of the logarithms: so is the picture's scale."""
    keep = 1 - 1 / max(3, SMOOTHING * len(values))
    sums = [(0.0, 0.0)] * len(values)
    for order in (range(len(values)), reversed(range(len(values)))):
        total = weight = 0.0
        for i in order:
            if 0 < values[i] < math.inf:
                total, weight = keep * total + math.log(values[i]), keep * weight + 1
            sums[i] = (sums[i][0] + total, sums[i][1] + weight)
    return [math.exp(total / weight) if weight else math.nan for total, weight in sums]


def draw_stage(
    top, bottom, name: str, rows: list[dict], start: int, colour: str, rotation: int
) -> None:
    """A stage from global step `start` on: loss and name on axis `top`, the rate on `bottom`."""
    steps, loss = [start + row["step"] + 1 for row in rows], [row["loss"] for row in rows]
    top.plot(steps, loss, color=colour, alpha=0.3, linewidth=0.8)
    top.plot(steps, smooth(loss), color=colour, linewidth=1.8)
    top.plot(steps, [row["held_out"] for row in rows], "o", color=colour, markeredgecolor="white",
             zorder=3, clip_on=False)
    top.annotate(name, (start, 1), (2, 4), xycoords=top.get_xaxis_transform(),
                 textcoords="offset points", color=colour, weight="bold", rotation=rotation,
                 rotation_mode="anchor")
    bottom.plot(steps, [row["lr"] for row in rows], color=colour, linewidth=1.5)
    for axis in (top, bottom):
        axis.axvline(start, color="#888888", linewidth=0.8)


def draw(stages: list[tuple[str, list[dict]]], title: str, path: Path) -> None:
    """Write the picture, whole or not at all."""
    import matplotlib  # here, so that what is missing in a run is said without it

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    lengths = [int(rows[-1]["step"]) + 1 for _, rows in stages]
    total = sum(lengths)
    crowded = any(len(name) * total > NAME_CHARS * length
                  for (name, _), length in zip(stages, lengths, strict=True))
    with pyplot.rc_context(STYLE):
        figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 6), sharex=True,
                                                height_ratios=(3, 1), layout="constrained")
        top.set(ylabel="loss (log scale)", yscale="log", xlim=(0, total))
        for n, (name, rows) in enumerate(stages):
            colour = COLOURS[n % len(COLOURS)]
            draw_stage(top, bottom, name, rows, sum(lengths[:n]), colour, 28 if crowded else 0)
        top.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_formatter(ticker.NullFormatter())
        bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
        bottom.yaxis.set_major_formatter("{x:g}")
        handles = [pyplot.Line2D([], [], color="#666666", **kind) for kind in (
            {"linewidth": 0.8, "alpha": 0.5}, {"linewidth": 1.8}, {"marker": "o", "linestyle": ""})]
        names = ["each step", "smoothed", "held out"]
        figure.legend(handles, names, loc="upper right", ncols=3, frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        with new_file(path) as new:
            figure.savefig(new, dpi=130)
        pyplot.close(figure)


@one_line("plot.py")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw loss and learning rate: RUN/curves.png.")
    parser.add_argument("run", type=Path, help="folder of the run: `out` of its config")
    run = parser.parse_args(argv).run
    stages = read_run(run)
    for name, rows in stages:
        minutes = sum(row["seconds"] for row in rows) / 60
        print(f"stage {name}: {len(rows)} steps, {minutes:.1f} min")
    try:
        draw(stages, str(run), run / "curves.png")
    except ImportError:
        raise ValueError("needs matplotlib, which is not installed: pip install matplotlib"
                         ) from None
    print(run / "curves.png")


if __name__ == "__main__":
    main()
