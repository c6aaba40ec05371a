"""Ablations: variants of the TOML files with the same budget; finished runs are not repeated."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation import ablate
from training.config import read_config

VARIANTS = ablate.read_variants()


def small(name: str, *given: str):
    """A variant at the demo's size."""
    settings = ablate.settings_of_run(list(given), VARIANTS[name], Path("x"), 2)
    return read_config(ablate.BUDGET, settings)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_file_with_the_budget(name):
    """The parts and stages that its file says; the same steps in all, of the same batches."""
    config = small(name)
    assert sum(s.steps for s in config.stage) == 40 + 60 + 50
    assert config.stage[-1].steps == 50 and config.stage[-1].held_out
    assert {s.batch for s in config.stage} == {4}
    assert (config.out, config.seed) == ("x", 2)
    if name != "iaa":
        large = read_config(str(ablate.CONFIGS / "ablations" / f"{name}.toml"), [])
        for key in ("structure", "own_embedding", "own_head", "own_llm", "insertion"):
            assert getattr(config, key) == getattr(large, key)
        assert [s.name for s in config.stage] == [s.name for s in large.stage]


def test_settings_of_the_caller_count_for_every_variant():
    """A dropped stage's steps, the caller's own, go to the first one left. Every file is there."""
    files = {path.stem for path in (ablate.CONFIGS / "ablations").glob("*.toml")}
    assert VARIANTS.keys() == files - {"data_1m2"} | {"iaa"}  # that one changes the data
    config = small("without_stage1", "pretrain_projector.steps=7")
    assert [s.steps for s in config.stage] == [7 + 60, 50]


def test_runs_and_table(monkeypatch, tmp_path, capsys):
    """Each run is trained and asked once; the table has means and spreads; nothing is repeated."""
    commands = []

    def run(command):
        """In place of a process: the files that it writes."""
        commands.append(command[1:])
        if command[1] == "train.py":
            out = [word for word in command if word.startswith("out=")][-1].removeprefix("out=")
            row = {"step": 0, "loss": 1.0, "lr": 0.1, "flops": 1,
                   "held_out": 0.25 + 0.5 * (out[-1] == "1")}
            Path(out, "instruct/adaptor").mkdir(parents=True, exist_ok=True)
            Path(out, "instruct/log.jsonl").write_text(json.dumps(row) + "\n")
        else:
            folder = Path(command[command.index("--model") + 1], "eval/easy-vqa")
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text('{"right, %": {"all": 70.0}}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", run)
    arguments = ["--set", f"out={tmp_path}", "--only", "iaa", "structure_a", "--seeds", "2"]
    ablate.main(arguments)
    assert [command[0] for command in commands] == ["train.py", "-m"] * 4
    assert f"out={tmp_path}/structure_a-1" in commands[-2] and 'structure="a"' in commands[-2]
    assert commands[-1][-2:] == ["--limit", "300"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "structure_a         2    70 ± 0     0.5 ± 0.35"
    ablate.main(arguments)  # train.py is asked again: it refuses a run of other settings
    assert [command[0] for command in commands[8:]] == ["train.py"] * 4
    monkeypatch.setattr(ablate.subprocess, "run", lambda _: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit, match="failed: python train.py --config"):
        ablate.main([*arguments, "--seeds", "3"])
