"""Ablations: variants of the TOML files with the same budget; finished runs are not repeated."""

import json
from pathlib import Path
from statistics import stdev

import pytest

from evaluation import ablate
from training.config import read_config

VARIANTS = ablate.read_variants()


def small(name: str, *given: str):
    """A variant at the demo's size."""
    settings = ablate.settings_of_run(list(given), VARIANTS[name][1], Path("x"), 2)
    return read_config(ablate.BUDGET, settings)


def test_the_variants_are_the_files():
    """All of Tables 5 to 8 but what changes the data; the budget itself is iaa."""
    files = {path.stem for path in (ablate.CONFIGS / "ablations").glob("*.toml")}
    assert VARIANTS.keys() == files - {"data_1m2"} | {"iaa"}
    assert VARIANTS["structure_a"][0].startswith("Table 5, row 1")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_file_with_the_budget(name):
    """The parts and stages that its file says; the same steps in all, of the same batches."""
    whole, config = read_config(ablate.BUDGET, []), small(name)
    assert sum(s.steps for s in config.stage) == sum(s.steps for s in whole.stage)
    assert config.stage[-1] == whole.stage[-1] and config.stage[-1].held_out
    assert {s.batch for s in config.stage} == {4}
    assert (config.out, config.seed) == ("x", 2)
    if name != "iaa":
        large = read_config(str(ablate.CONFIGS / "ablations" / f"{name}.toml"), [])
        for key in ("structure", "own_embedding", "own_head", "own_llm", "insertion"):
            assert getattr(config, key) == getattr(large, key)
        assert [s.name for s in config.stage] == [s.name for s in large.stage]


def test_settings_of_the_caller_count_for_every_variant():
    """A dropped stage's steps, the caller's own, go to the first one left."""
    config = small("without_stage1", "pretrain_projector.steps=7")
    assert [s.steps for s in config.stage] == [7 + 60, 50]


def test_runs_and_table(monkeypatch, tmp_path):
    """Each run is trained and asked once; the table has means and spreads; nothing is repeated."""
    commands = []

    def run(*command):
        """In place of a command: the files that it writes."""
        commands.append(command)
        if command[0] == "train.py":
            out = [word for word in command if word.startswith("out=")][-1].removeprefix("out=")
            for stage in ("pretrain_projector", "pretrain_adaptor", "instruct"):
                Path(out, stage).mkdir(parents=True)
                row = {"step": 0, "loss": 1.0, "lr": 0.1, "flops": 1, "seconds": 60,
                       "held_out": 0.25 + 0.5 * (out[-1] == "1")}
                (Path(out, stage) / "log.jsonl").write_text(json.dumps(row) + "\n")
        else:
            folder = Path(command[command.index("--model") + 1], "eval", "easy-vqa")
            folder.mkdir(parents=True)
            (folder / "scores.json").write_text('{"right, %": {"all": 70.0}}')

    monkeypatch.setattr(ablate, "run", run)
    arguments = ["--set", f"out={tmp_path}", "--only", "iaa", "structure_a", "--seeds", "2"]
    ablate.main(arguments)
    assert [command[0] for command in commands] == ["train.py", "-m"] * 4
    assert f"out={tmp_path}/structure_a-1" in commands[-2] and 'structure="a"' in commands[-2]
    assert commands[-1][-2:] == ("--limit", "300")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[3].startswith("| structure_a | Table 5, row 1")
    assert lines[3].endswith(f"| 2 | 70 ± 0 | 0.5 ± {stdev([0.25, 0.75]):.2g} | 3 ± 0 |")
    ablate.main(arguments)
    assert len(commands) == 8


def test_a_failed_command_is_named():
    """Its own message is above."""
    with pytest.raises(ValueError, match="failed: python -c"):
        ablate.run("-c", "raise SystemExit(1)")
