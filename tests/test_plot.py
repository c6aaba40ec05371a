"""What shows a run: training/plot.py's picture of a made-up log, and TensorBoard's events."""

import json
import math
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import last_line, write_rows

from common.device import Ranks
from common.files import one_line
from training import plot
from training.config import Config, StageConfig
from training.log import Log, read_log


def write_run(root, stages):
    """A run as train.py leaves it: `stages` maps name -> steps, 0 for a stage not begun."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"stage": [{"name": name} for name in stages]}))
    for name, steps in stages.items():
        (root / name).mkdir()
        rows = [{"step": i, "loss": 3 * math.exp(-i / 20), "lr": 1e-3, "flops": 1}
                for i in range(steps)]
        rows[-1:] = [row | {"held_out": 1.0} for row in rows[-1:]]
        write_rows(root / name / "log.jsonl", rows)
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
             (write_run(tmp_path / "other", {"first": 3}), "requirements/ say which packages"))
    for path, message in cases:
        assert message in last_line(plot.main, [str(path)])


@pytest.fixture
def write_log(tmp_path, monkeypatch):
    """A function that writes the log of some steps with `tracker`, as a run from `first` on."""
    monkeypatch.setattr("training.log.step_flops", lambda *_: 1e9)
    stage = StageConfig("one", ["d"], steps=9)
    config = Config(str(tmp_path), "l", "v", "i", [stage], tracker="tensorboard")
    (tmp_path / "one").mkdir()
    batch = Mock(tokens=torch.zeros(1, 4), lengths=torch.tensor([4]), scored=2, cut=0, skipped=[])

    def write(first: int, last: int) -> Path:
        log = Log(None, config, stage, Ranks(60), first, later=0.0)
        for step in range(first, last):
            log.step(step, {"loss": 3 / (step + 1 + first), "lr": 1e-3}, [batch], 0.01)
        return tmp_path / "one"

    return write


def test_tensorboard_has_the_numbers_of_the_log(write_log):
    """Every step once, also after a run that was killed in step 5 and resumed from step 3."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_log(0, 5)
    folder = write_log(3, 7)
    rows, found = read_log(folder / "log.jsonl"), events.EventAccumulator(str(folder)).Reload()
    assert sorted(found.Tags()["scalars"]) == sorted(rows[0].keys() - {"step"})
    for key in found.Tags()["scalars"]:
        assert [event.step for event in found.Scalars(key)] == [*range(7)]
        values = [event.value for event in found.Scalars(key)]
        assert values == pytest.approx([row[key] for row in rows], rel=1e-6)


def test_tensorboard_that_is_not_installed_is_one_line(write_log, monkeypatch):
    """With the package's name, and where it is asked for."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    says = pytest.raises(SystemExit, match="tensorboard.*requirements/ say which packages it needs")
    with says, one_line("train.py"):
        write_log(0, 1)
