"""training/config.py and configs/: files over a base, errors, Table 1, the recipes."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import LLAMA
from PIL import Image

from iaa import Adaptor, AdaptorConfig
from train import train
from training.config import Config, adaptor_config, read_config

CONFIGS = Path(__file__).parent.parent / "configs"
ALL = sorted(CONFIGS.rglob("*.toml"))
RECIPES = [CONFIGS / f"iaa{n}.toml" for n in (8, 14, 22)]
ABLATIONS = sorted((CONFIGS / "ablations").glob("*.toml"))
USED = {name for path in [*RECIPES, *ABLATIONS] for stage in read_config(str(path), []).stage
        for name in stage.data}
THREE = ["pretrain_projector", "pretrain_adaptor", "instruct"]
NOTHING_OWN = {"insertion": 0, "own_embedding": False, "own_head": False}


def by_name(path: Path) -> str:
    """A test's name."""
    return path.stem


# Files over a base


@pytest.fixture
def write(tmp_path):
    """A function that writes NAME.toml and returns its path."""

    def to(name: str, text: str) -> str:
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    to("base", 'out = "o"\nllm = "l"\nvision = "v"\nimages = "i"\ninsertion = 8\n'
       '[[stage]]\nname = "one"\ndata = ["d"]\nsteps = 10\nlr = 1e-3\n'
       '[[stage]]\nname = "two"\ndata = ["d"]\nsteps = 20\n')
    return to


def test_a_file_goes_over_its_base(write):
    """Keys and stages' keys replace the base's, through a chain; what is not named stays."""
    write("middle", 'base = "base.toml"\nout = "m"\n[[stage]]\nname = "one"\nsteps = 11\n')
    path = write("sub/top", 'base = "../middle.toml"\nstructure = "a"\n'
                            '[[stage]]\nname = "one"\nbatch = 16\n')
    config = read_config(path, ["two.steps=5", "insertion=4", "stage.warmup=0.1", "system="])
    assert (config.out, config.llm, config.structure, config.insertion) == ("m", "l", "a", 4)
    assert [(s.name, s.steps, s.batch, s.lr, s.warmup) for s in config.stage] == [
        ("one", 11, 16, 1e-3, 0.1), ("two", 5, 128, 2e-5, 0.1)]
    assert (config.system, config.dtype) == ("", "auto")  # auto where nothing is said


@pytest.mark.parametrize(("stages", "names"), [
    ('["two"]', ["two"]), ('["two", "one"]', ["one", "two"])])
def test_stages_names_those_that_run(write, stages, names):
    """The others are left out; the order is the file's."""
    config = read_config(write("top", f'base = "base.toml"\nstages = {stages}\n'), [])
    assert [s.name for s in config.stage] == names


@pytest.mark.parametrize(("text", "message"), [
    ('base = "nope.toml"', "nope.toml: no such file"),
    ("base = ", "top.toml: not TOML"),
    ('base = "top.toml"', "top.toml: base = 'top.toml': another file is expected"),
    ("base = 3", "base = 3: another file is expected"),
    ('base = "base.toml"\n[[stage]]\nname = "three"', "no stage 'three' in base.toml; there are: "
                                                      "one, two"),
    ('base = "base.toml"\n[[stage]]\nsteps = 3', "no stage None in base.toml"),
    ('base = "base.toml"\nstage = [3]', "write [[stage]], with two brackets"),
    ('base = "base.toml"\nstages = ["three"]', "stages = ['three']: one or more of one, two"),
    ('base = "base.toml"\nstages = []', "stages = []: one or more of one, two"),
    ('base = "base.toml"\nstages = "one"', "stages = 'one': expected list[str] | None"),
    ('base = "base.toml"\nstructur = "a"', "unknown key 'structur'"),
    ('base = "base.toml"\ndtype = "fp16"', "dtype = 'fp16': one of auto, bf16, fp32"),
])
def test_errors_are_one_line(write, text, message):
    """What is wrong with a base, with stages or with a value, and in which file."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_config(write("top", text), [])
    assert message in str(error.value) and "\n" not in str(error.value)


# The recipes


@pytest.mark.parametrize("path", ALL, ids=by_name)
def test_every_config_is_typed(path):
    """Each file in configs/ builds, with a run's folder of its own."""
    config = read_config(str(path), [])
    assert isinstance(config, Config)
    assert [read_config(str(p), []).out for p in ALL].count(config.out) == 1


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_table_1(path):
    """Trained modules, rate, batch, steps, ZeRO stage of each stage; AdamW, schedule, warm-up."""
    config = read_config(str(path), [])
    assert [(s.name, s.trains, s.lr, s.batch, s.steps, s.zero) for s in config.stage] == [
        ("pretrain_projector", "projector", 1e-3, 256, 2500, 2),
        ("pretrain_adaptor", "adaptor", 2e-5, 256, 2500, 2),
        ("instruct", "adaptor", 2e-5, 128, 6600, 3),
        ("grounding", "adaptor", 2e-5, 128, 18000, 3),
    ]
    for stage in config.stage:
        assert (stage.beta1, stage.beta2, stage.eps) == (0.9, 0.98, 1e-6)
        assert (stage.weight_decay, stage.warmup, stage.lr_projector) == (0.0, 0.03, 0.0)
        assert stage.start == "" and stage.adaptor == ("grounding" if stage.name == "grounding"
                                                       else "mm")
    assert (config.structure, config.own_embedding, config.own_head) == ("c", True, True)
    assert f"iaa{config.insertion}" == path.stem


@pytest.mark.parametrize(("name", "changed", "stages"), [
    ("insertion_0", NOTHING_OWN, THREE), ("insertion_4", {"insertion": 4}, THREE),
    ("insertion_14", {"insertion": 14}, THREE), ("structure_a", {"structure": "a"}, THREE),
    ("structure_b", {"structure": "b"}, THREE),
    ("frozen_ends", {"own_embedding": False, "own_head": False}, THREE),
    ("without_stage1", {}, THREE[1:]),
    ("without_stage2", {}, [THREE[0], THREE[2]]),
    ("data_1m2", {}, THREE),
    ("llava", NOTHING_OWN | {"own_llm": True}, [THREE[0], THREE[2]]),
])
def test_ablations_change_what_they_say(name, changed, stages):
    """Against IAA-8, nothing else differs; the 1.2M rows are one epoch of LLaVA's two files."""
    whole = asdict(read_config(str(RECIPES[0]), []))
    config = read_config(str(CONFIGS / "ablations" / f"{name}.toml"), [])
    own, apart = asdict(config), {"out", "stage", "stages"}
    assert {key: own[key] for key in own if own[key] != whole[key] and key not in apart} == changed
    assert [stage.name for stage in config.stage] == stages
    smaller = name in ("data_1m2", "llava")
    for stage in own["stage"]:
        same = next(s for s in whole["stage"] if s["name"] == stage["name"])
        other = {key for key in stage if stage[key] != same[key]}
        assert other == ({"data", "steps"} if smaller else set())
    if smaller:
        rows = {s.data[0]: s.steps * s.batch for s in config.stage}
        assert rows["data/llava-pretrain.jsonl"] == pytest.approx(558_128, rel=1e-3)
        assert rows["data/llava-mix665k.jsonl"] == pytest.approx(665_298, rel=1e-3)


def test_no_ablation_is_forgotten():
    """The table above has a row for each file."""
    (mark,) = test_ablations_change_what_they_say.pytestmark
    assert {row[0] for row in mark.args[1]} == {path.stem for path in ABLATIONS}


def test_the_head_says_where_data_comes_from():
    """Each data file of a recipe stands at the head of iaa8.toml, behind it the command."""
    text = (CONFIGS / "iaa8.toml").read_text()
    listed = re.findall(r"^#   ([\w-]+\.jsonl) +[\w-]+  ", text, re.M)
    assert sorted(f"data/{name}" for name in listed) == sorted(USED)


@pytest.mark.parametrize("path", [*RECIPES, *ABLATIONS], ids=by_name)
def test_adaptors_of_the_recipes(path):
    """A stage that trains the projector has nothing else; the others have what the file says."""
    config = read_config(str(path), [])
    sizes = replace(LLAMA, layers=32)
    for stage in config.stage:
        made = adaptor_config(config, stage, sizes.layers)
        if stage.trains == "projector":
            assert made == AdaptorConfig((), own_embedding=False, own_head=False)
        else:
            assert len(made.insertion) == config.insertion and made.structure == config.structure
            assert (made.own_embedding, made.own_head, made.own_llm) == (
                config.own_embedding, config.own_head, config.own_llm)
        with torch.device("meta"):
            Adaptor(made, sizes, 1)


def test_dry_run(tmp_path, tiny_base, monkeypatch):
    """IAA-8: every stage trains a step and hands on; 32 tiny layers as the LLM, 4 rows a file."""
    tiny_base(tmp_path / "weights", layers=32)
    (tmp_path / "weights" / "llama").rename(tmp_path / "weights" / "llama3-8b")
    (tmp_path / "weights" / "clip").rename(tmp_path / "weights" / "clip-vit-l-14-336")
    (tmp_path / "data" / "images").mkdir(parents=True)
    Image.new("RGB", (20, 30), "red").save(tmp_path / "data" / "images" / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    row = {"id": "x", "image": "red.png", "workflow": "mm", "conversations": turns}
    for name in USED:
        (tmp_path / name).write_text((json.dumps(row) + "\n") * 4)
    monkeypatch.chdir(tmp_path)
    config = read_config(str(RECIPES[0]), ["stage.steps=1", "stage.batch=1", "workers=0",
                                           "stage.micro_batch=1", "dtype=fp32"])
    train(config, None)
    index = json.loads(Path(config.out, "iaa.json").read_text())
    last = {stage.adaptor: stage.name for stage in config.stage}
    assert index["adaptors"] == {name: f"{stage}/adaptor" for name, stage in last.items()}
    for stage in config.stage:
        meta = json.loads(Path(config.out, stage.name, "adaptor", "config.json").read_text())
        assert AdaptorConfig(**meta["adaptor"]) == adaptor_config(config, stage, 32)
        assert len(Path(config.out, stage.name, "log.jsonl").read_text().splitlines()) == 1
