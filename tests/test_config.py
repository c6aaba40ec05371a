"""training/config.py and configs/: files over a base, errors, Table 1, the recipes."""

from dataclasses import asdict
from pathlib import Path

import pytest

from iaa import AdaptorConfig, evenly_spaced_layers
from training.config import adaptor_config, read_config

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [CONFIGS / f"iaa{n}.toml" for n in (8, 14, 22)]
THREE = ["pretrain_projector", "pretrain_adaptor", "instruct"]
NOTHING_OWN = {"insertion": 0, "own_embedding": False, "own_head": False}
ABLATIONS = {  # name -> what differs from IAA-8, stages
    "insertion_0": (NOTHING_OWN, THREE), "insertion_4": ({"insertion": 4}, THREE),
    "insertion_14": ({"insertion": 14}, THREE), "structure_a": ({"structure": "a"}, THREE),
    "structure_b": ({"structure": "b"}, THREE),
    "frozen_ends": ({"own_embedding": False, "own_head": False}, THREE),
    "without_stage1": ({}, THREE[1:]), "without_stage2": ({}, [THREE[0], THREE[2]]),
    "data_1m2": ({}, THREE), "llava": (NOTHING_OWN | {"own_llm": True}, [THREE[0], THREE[2]]),
}


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
    assert [s.name for s in read_config(path, ['stages=["two"]']).stage] == ["two"]


@pytest.mark.parametrize("text, message", [
    ('base = "nope.toml"', "nope.toml"),
    ('base = "top.toml"', "a path, and no cycle, is expected"),
    ("base = ", "top.toml: not TOML"),
    ('base = "base.toml"\n[[stage]]\nname = "three"', "no stage 'three'; there are: one, two"),
    ('base = "base.toml"\n[[stage]]\nsteps = 3', "no stage None"),
    ("stage = 5", "write [[stage]], with two brackets"),
    ('base = "base.toml"\n[stage]\nname = "one"', "write [[stage]], with two brackets"),
    ('base = "base.toml"\nstages = ["three"]', "stages = ['three']: one or more of one, two"),
    ('base = "base.toml"\nstages = "one"', "stages = 'one': expected list[str] | None"),
    ('base = "base.toml"\nstages = ["two"]\n[[stage]]\nname = "two"\nstart = "one"',
     "top.toml: stage two: start = 'one': \"\", \"none\" or a stage before it in the run ()"),
    ('base = "base.toml"\nstructur = "a"', "unknown key 'structur'"),
    # From here on: settings of the command line.
    ("stpes=3", "unknown key 'stpes'; known: "),
    ("two.steps='many'", "stage[1].steps = 'many': expected int"),
    ("two.steps=0", "stage two: steps = 0: must be 1 or more"),
    ("two.lr=nan", "stage two: lr = nan: must be 0 or more"),
    ("two.trains=all", "trains = 'all': \"projector\", \"layers\" or \"adaptor\""),
    ("two.trains=projector", 'stage two: a stage that trains = "projector" cannot start from one'),
    ("two.micro_batch=3", "batch = 128 is not a multiple of micro_batch = 3"),
    ("two.data=[]", "data = []: at least one JSONL file"),
    ("two.warmup=3", "warmup = 3.0: a share of the steps, 1 at most"),
    ("frozen_dtype=int4", "frozen_dtype = 'int4': leave it out, or \"int8\""),
    ("tracker=wandb", "tracker = 'wandb': leave it out, or \"tensorboard\""),
    ("two.adaptor=text", "an adaptor cannot be named 'text'"),
    ("two.name=one", "two stages have the same name: ['one', 'one']"),
    ("two.name=a-b", "name = 'a-b': letters, digits (not first) and _"),
    ("one.start=two", 'start = \'two\': "", "none" or a stage before it'),
    ("dtype=fp8", "dtype = 'fp8': one of auto, bf16, fp32"),
    (f"timeout_s={2**62}", "timeout_s = 4611686018427387904: must be 1 or more, below 2^31"),
    ("steps", "write key=value"), ("stage=5", "write key=value or STAGE.key=value")])
def test_errors_are_one_line(write, text, message):
    """What is wrong with a base, a stage, a key or a value, in which file; what is accepted."""
    file = " = " in text
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_config(write("top", text if file else 'base = "base.toml"'), [] if file else [text])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_every_config_is_typed():
    """Each file in configs/ builds, with a run's folder of its own."""
    outs = [read_config(str(path), []).out for path in CONFIGS.rglob("*.toml")]
    assert len(outs) == len(set(outs)) > 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_table_1(path):
    """Trained modules, rate, batch, steps, ZeRO stage of each stage; AdamW, schedule, warm-up."""
    config = read_config(str(path), [])
    assert [(s.name, s.trains, s.lr, s.batch, s.steps, s.zero) for s in config.stage] == [
        ("pretrain_projector", "projector", 1e-3, 256, 2500, 2),
        ("pretrain_adaptor", "adaptor", 2e-5, 256, 2500, 2),
        ("instruct", "adaptor", 2e-5, 128, 6600, 3),
        ("grounding", "adaptor", 2e-5, 128, 18000, 3),
    ]
    whole = AdaptorConfig(evenly_spaced_layers(int(path.stem[3:]), 32))
    for stage in config.stage:
        assert (stage.beta1, stage.beta2, stage.eps) == (0.9, 0.98, 1e-6)
        assert (stage.weight_decay, stage.warmup, stage.lr_projector) == (0.0, 0.03, 0.0)
        assert stage.start == "" and stage.adaptor == ("grounding" if stage.name == "grounding"
                                                       else "mm")
        made = adaptor_config(config, stage, 32)
        assert made == (AdaptorConfig((), own_embedding=False, own_head=False)
                        if stage.trains == "projector" else whole)


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.toml")),
                         ids=lambda path: path.stem)
def test_ablations_change_what_they_say(path):
    """Against IAA-8, nothing else differs; the 1.2M rows are one epoch of LLaVA's two files."""
    changed, stages = ABLATIONS[path.stem]
    whole, config = asdict(read_config(str(RECIPES[0]), [])), read_config(str(path), [])
    own, apart = asdict(config), {"out", "stage", "stages"}
    assert {key: own[key] for key in own if own[key] != whole[key] and key not in apart} == changed
    assert [stage.name for stage in config.stage] == stages
    for stage in config.stage:
        adaptor_config(config, stage, 32)  # raises for what does not go together
    smaller = path.stem in ("data_1m2", "llava")
    for stage in own["stage"]:
        same = next(s for s in whole["stage"] if s["name"] == stage["name"])
        other = {key for key in stage if stage[key] != same[key]}
        assert other == ({"data", "steps"} if smaller else set())
    if smaller:
        rows = {s.data[0]: s.steps * s.batch for s in config.stage}
        assert rows["data/llava-pretrain.jsonl"] == pytest.approx(558_128, rel=1e-3)
        assert rows["data/llava-mix665k.jsonl"] == pytest.approx(665_298, rel=1e-3)
