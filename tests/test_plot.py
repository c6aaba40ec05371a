"""training/plot.py: the picture of a made-up log; what it says of a missing or half-written run."""

import json
import math
import sys

import pytest

from training import plot


def write_run(root, stages):
    """A run as train.py leaves it: `stages` maps name -> steps, 0 for a stage not begun."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"stage": [{"name": name} for name in stages]}))
    for name, steps in stages.items():
        (root / name).mkdir()
        rows = [{"step": i, "loss": 3 * math.exp(-i / 20), "lr": 1e-3, "flops": 1}
                for i in range(steps)]
        rows[-1:] = [row | {"held_out": 1.0} for row in rows[-1:]]
        (root / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_draws_a_run(tmp_path, capsys):
    """Stages of one step and of many, one not begun, a loss that is not a number, half a line."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    run = write_run(tmp_path / "run", {"first": 40, "single": 1, "last": 300, "later": 0})
    with open(run / "last" / "log.jsonl", "a") as file:
        file.write('{"step": 300, "loss": NaN, "lr": 0.0, "flops": 1}\n{"step": 301, "lo')
    plot.main([str(run)])
    assert capsys.readouterr().out == f"{run}/curves.png\n"
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1000 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert not list(run.glob(".*"))


def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch):
    """No folder, nothing logged yet, no matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cases = ((tmp_path / "none", "config.json: no such file"),
             (write_run(tmp_path / "run", {"one": 0, "two": 0}), "nothing logged yet in one, two"),
             (write_run(tmp_path / "other", {"first": 3}), "pip install matplotlib"))
    for path, message in cases:
        with pytest.raises(SystemExit, match=message) as stopped:
            plot.main([str(path)])
        assert "\n" not in stopped.value.code


def test_smooth_keeps_a_constant_and_skips_what_is_not_finite():
    """A constant stays itself from end to end; NaN and infinity do not spread."""
    values = [2.0, math.nan, 2.0, math.inf, 2.0, 2.0]
    assert plot.smooth(values) == pytest.approx([2.0] * 6)
    assert all(math.isnan(v) for v in plot.smooth([math.nan] * 3))
