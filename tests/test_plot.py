"""training/plot.py: the picture of a made-up log; what it says of a missing or half-written run."""

import json
import math
import sys

import pytest

from training import plot


def write_run(root, stages):
    """A run as train.py leaves it: `stages` maps name -> steps, None for a stage not begun."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"stage": [{"name": name} for name in stages]}))
    for name, steps in stages.items():
        if steps is None:
            continue
        (root / name).mkdir()
        rows = [{"step": i, "loss": 3 * math.exp(-i / 20), "lr": 1e-3, "norm": 1.0, "seconds": 2.0}
                for i in range(steps)]
        rows[-1:] = [row | {"held_out": 1.0} for row in rows[-1:]]
        (root / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def failure(capsys, path):
    """The one line with which plot.py exits."""
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(path)])
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
    return stopped.value.code


def test_draws_a_run(tmp_path, capsys):
    """Stages of one step and of many, one not begun, a loss that is not a number: one picture."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    run = write_run(tmp_path / "run", {"first": 40, "single": 1, "last": 300, "later": None})
    with open(run / "last" / "log.jsonl", "a") as file:
        file.write('{"step": 300, "loss": NaN, "lr": 0.0, "seconds": 2.0}\n')
    plot.main([str(run)])
    assert capsys.readouterr().out.splitlines() == [
        "stage first: 40 steps, 1.3 min", "stage single: 1 steps, 0.0 min",
        "stage last: 301 steps, 10.0 min", str(run / "curves.png")]
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert not list(run.glob(".*"))


def test_a_half_written_line_is_left_out(tmp_path):
    """A line that train.py has not finished is left out; the rest is read."""
    run = write_run(tmp_path / "run", {"first": 5})
    with open(run / "first" / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in plot.read_log(run / "first" / "log.jsonl")] == [0, 1, 2, 3, 4]


def test_missing_runs_are_one_line(tmp_path, capsys):
    """No folder, no config, a config of something else, empty logs."""
    assert "config.json: no such file" in failure(capsys, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("[]")
    assert "a JSON object is expected" in failure(capsys, tmp_path / "empty")
    run = write_run(tmp_path / "run", {"first": 3, "second": None})
    (run / "first" / "log.jsonl").write_text("")
    assert "nothing logged yet in first, second" in failure(capsys, run)


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    """One line that says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in failure(capsys, write_run(tmp_path / "run", {"first": 3}))


def test_smooth_keeps_a_constant_and_skips_what_is_not_finite():
    """A constant stays itself from end to end; NaN and infinity do not spread."""
    values = [2.0, math.nan, 2.0, math.inf, 2.0, 2.0]
    assert plot.smooth(values) == pytest.approx([2.0] * 6)
    assert all(math.isnan(v) for v in plot.smooth([math.nan] * 3))
