"""ablate.py: equal budgets, shared first stages, resuming run by run, the table."""

import json
import shutil
from pathlib import Path
from statistics import stdev

import pytest
from PIL import Image
from processes import held
from safetensors.torch import load_file

from evaluation import ablate
from evaluation.ablate import VARIANTS, run_config, table
from training.config import read_config

CONFIGS = Path(__file__).parent.parent / "configs"
BUDGET = str(CONFIGS / "ablate.toml")
IN_CONFIGS = {"a": "structure_a", "b": "structure_b", "frozen-ends": "frozen_ends",
              "without-stage1": "without_stage1", "without-stage2": "without_stage2",
              "llava": "llava"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_same_budget(name):
    """Steps and rows of all stages but the last add up to the same; the last is the same."""
    whole, config = read_config(BUDGET, []), run_config(BUDGET, [], name, 2)
    assert sum(s.steps for s in config.stage) == sum(s.steps for s in whole.stage)
    assert config.stage[-1] == whole.stage[-1]
    assert {s.batch for s in config.stage} == {4}
    assert (config.out, config.seed) == (f"runs/ablate/{name}-2", 2)


@pytest.mark.parametrize("name, file", IN_CONFIGS.items())
def test_variants_are_those_of_the_whole_size(name, file):
    """The laptop's variant is what the file in configs/ablations is: same parts, same stages."""
    small = run_config(BUDGET, [], name, 0)
    large = read_config(str(CONFIGS / "ablations" / f"{file}.toml"), [])
    for key in ("structure", "own_embedding", "own_head", "own_llm", "insertion"):
        assert getattr(small, key) == getattr(large, key)
    assert [s.name for s in small.stage] == [s.name for s in large.stage]


def test_settings_of_the_caller_count_for_every_variant():
    """`--set` comes first, then the variant; a dropped stage's steps go to the first one left."""
    config = run_config(BUDGET, ["pretrain_projector.steps=7", "out=x"], "without-stage1", 0)
    assert [s.steps for s in config.stage] == [7 + 60, 50] and config.out == "x/without-stage1-0"


# ------------------------------------------------------------------------------ on tiny models


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_base):
    """A folder with a tiny base, easy-VQA's layout of files and the config of a tiny budget."""
    folder = tmp_path_factory.mktemp("lab")
    tiny_base(folder)
    Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(n), "image": "a.png", "workflow": "mm", "source": "t", "split": "train",
             "conversations": turns} for n in range(4)]
    for name in ("train-questions", "test-questions"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = "".join(f'[[stage]]\nname = "{name}"\ntrains = "{trains}"\nlr = 1e-3\nsteps = 2\n'
                     f'data = ["{folder}/train-questions.jsonl"]\nbatch = 2\nmicro_batch = 2\n'
                     f'held_out = ["{folder}/test-questions.jsonl"]\n'
                     for name, trains in (("pretrain_projector", "projector"),
                                          ("pretrain_adaptor", "adaptor"), ("instruct", "adaptor")))
    (folder / "tiny.toml").write_text(
        f'out = "{folder}/runs"\nllm = "{folder}/llama"\nvision = "{folder}/clip"\n'
        f'images = "{folder}"\ninsertion = 2\nsystem = ""\nworkers = 0\n{stages}')
    return folder


def run(lab, *names, seeds=1, questions=3, settings=()):
    """ablate.py on the tiny budget."""
    ablate.ablate(str(lab / "tiny.toml"), list(settings), list(names), seeds, questions)


@pytest.fixture(scope="module")
def done(lab):
    """Three variants with two seeds each, finished."""
    run(lab, "iaa", "a", "without-stage1", seeds=2)
    return lab / "runs"


def adaptor(folder):
    """A run's trained tensors."""
    return load_file(folder / "instruct" / "adaptor" / "adaptor.safetensors")


def test_the_table_has_a_row_a_variant(done):
    """Mean and standard deviation over the seeds beside the paper's figures."""
    lines = (done / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 3 + 2 and lines[3].startswith("| a | 5 | structure a | 2 | ")
    assert lines[3].endswith("| 1425.4 | 72.4 | 65.0 | 38.2 |")
    scores = [json.loads((done / f"a-{seed}" / "score.json").read_text()) for seed in (0, 1)]
    losses = [score["held_out"] for score in scores]
    assert f"{sum(losses) / 2:.3f} ± {stdev(losses):.3f}" in lines[3]
    assert scores[0]["questions"] == 3 and scores[0]["right"] in (0, pytest.approx(100))


def test_finished_runs_are_not_repeated(lab, done, capsys):
    """Nothing is written but the missing score of a run killed before it; other sizes rescore."""
    (done / "a-1" / "score.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    run(lab, "iaa", "a", "without-stage1", seeds=2)
    said = capsys.readouterr().out
    assert said.count("finished before\n") == 5 and (done / "a-1" / "score.json").is_file()
    run(lab, "iaa", questions=4)
    assert json.loads((done / "iaa-0" / "score.json").read_text())["questions"] == 4
    assert table(done, 4).count("\n| iaa |") == 1 and table(done, 4).count("\n| a |") == 0
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")} == before


def test_a_shared_first_stage_changes_nothing(lab, done, capsys):
    """A run alone, which trains its own first stage, ends with the bits of one that took it."""
    run(lab, "a", settings=[f"out={lab}/alone"])
    assert "taken from" not in capsys.readouterr().out
    own, shared = adaptor(lab / "alone" / "a-0"), adaptor(done / "a-0")
    assert own.keys() == shared.keys() and all(own[k].equal(shared[k]) for k in own)


def test_what_is_shared_is_the_same_seed_s_and_budget_s(lab, done, capsys):
    """Another seed or number of steps does not fit, the same does."""
    place = f"out={lab}/shared"
    shutil.copytree(done / "iaa-0", lab / "shared" / "iaa-0")
    run(lab, "b", seeds=2, settings=[place])
    run(lab, "without-stage2", "llava", settings=[place])
    taken = [line for line in capsys.readouterr().out.splitlines() if "taken from" in line]
    names = [line.rpartition("/")[2] for line in taken]
    assert names == ["iaa-0", "without-stage2-0"]  # b-0, llava-0; b-1 trained its own


def test_two_processes_share_the_runs(lab, done, capsys):
    """What another process is at is passed over, and is not in the table yet."""
    place = lab / "two"
    with held(place / "iaa-0", ".ablate-lock"):
        run(lab, "iaa", "a", settings=[f"out={place}"])
    assert capsys.readouterr().out.count("another process is at it") == 1
    assert [path.parent.name for path in place.glob("*/score.json")] == ["a-0"]
    assert "| a |" in (place / "table.md").read_text()


def test_other_settings_do_not_mix(lab, done):
    """A folder of runs made with another budget is refused before anything is trained."""
    with pytest.raises(ValueError, match=r"iaa-0 was made with another stage: remove it"):
        run(lab, "n0", "iaa", settings=["instruct.steps=3"])
    assert not (done / "n0-0").exists()
