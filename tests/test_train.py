"""train.py: one-line errors, the schedule, stages from end to end, resume to the bit, two ranks."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from processes import processes
from safetensors.torch import load_file

from common.device import Ranks, fast_dtype
from train import lr_at, main, train
from training import checkpoint
from training.config import StageConfig, read_config
from training.log import Log
from training.zero import DataParallel

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_base):
    """A folder with a tiny base, 24 rows of pictures and captions, a config of three stages."""
    folder = tmp_path_factory.mktemp("world")
    tiny_base(folder)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        pixels = rng.integers(0, 255, (20, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"},
                 {"from": "gpt", "value": "a " * (1 + i % 5) + "dog"}]
        rows.append({"id": str(i), "image": f"{i}.png", "workflow": "mm", "source": "t",
                     "split": "train", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(f"""
out = "{folder}/run"
llm = "{folder}/llama"
vision = "{folder}/clip"
images = "{folder}"
insertion = 2
dtype = "fp32"
workers = 0
[[stage]]
name = "pretrain_projector"
trains = "projector"
template = "plain"
data = ["{folder}/rows.jsonl"]
held_out = ["{folder}/rows.jsonl"]
steps = 3
batch = 4
micro_batch = 4
eval_rows = 4
lr = 1e-3
[[stage]]
name = "instruct"
data = ["{folder}/rows.jsonl"]
steps = 8
batch = 8
micro_batch = 4
lr = 1e-3
save_every = 2
[[stage]]
name = "grounding"
adaptor = "grounding"
data = ["{folder}/rows.jsonl"]
steps = 2
batch = 4
micro_batch = 4
lr = 1e-3
""")
    return folder


def go(world, out, *settings, stage=None):
    """The config run in this process, into `world / out`."""
    train(read_config(str(world / "config.toml"), [f"out={world / out}", *settings]), stage)


def tensors(world, out, stage):
    """The finished adaptor of a stage."""
    return load_file(world / out / stage / "adaptor" / "adaptor.safetensors")


@pytest.fixture(scope="module")
def trained(world):
    """The config run from end to end, once, as a user starts it; what it prints."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def fails(world, monkeypatch):
    """A function that runs train.py here, sees it end with one line, and returns that."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv",
                            ["train.py", "--config", str(world / "config.toml"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code
        return stopped.value.code

    return call


def test_stages_build_on_each_other(world, trained):
    """Each stage starts from the one before; the first trains only the projector."""
    stages = ("pretrain_projector", "instruct", "grounding")
    first, second, third = (tensors(world, "run", name) for name in stages)
    assert set(first) == {f"projector.{part}" for part in
                          ("up.weight", "up.bias", "down.weight", "down.bias")}
    assert second.keys() == third.keys() > first.keys()
    assert not torch.equal(first["projector.up.weight"], second["projector.up.weight"])
    index = json.loads((world / "run" / "iaa.json").read_text())
    assert index["adaptors"] == {"mm": "instruct/adaptor", "grounding": "grounding/adaptor"}
    assert "held-out" in trained
    assert "min of training left at the rate of the first steps" in trained
    assert "computing in fp32 on cpu: as asked" in trained


def test_a_stage_begins_where_the_one_before_ended(world, trained, tmp_path):
    """At a rate of 0 it ends as it began: all that was trained before, else the frozen copies."""
    frozen = load_file(next((world / "llama").glob("*.safetensors")))
    for before, stage in (("pretrain_projector", "instruct"), ("instruct", "grounding")):
        shutil.copytree(world / "run" / before, tmp_path / stage / before)
        go(world, tmp_path / stage, "stage.lr=0", "stage.steps=1", stage=stage)
        got, wanted = tensors(tmp_path, stage, stage), tensors(world, "run", before)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        if stage == "instruct":
            assert torch.equal(got["head.weight"], frozen["head.weight"])


def test_log_has_a_line_a_step(world, trained):
    """log.jsonl holds the steps in order, the held-out loss at the end, and a loss that fell."""
    log = (world / "run" / "instruct" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"lr", "grad_norm", "tokens_per_s", "tflops", "padding", "memory_gb",
            "data_wait"} <= lines[0].keys()


def test_finished_stages_are_not_trained_again(world, trained, capsys):
    """The same command on a finished run changes nothing and says so."""
    path = world / "run" / "instruct" / "adaptor" / "adaptor.safetensors"
    before = path.stat().st_mtime_ns
    go(world, "run")
    assert capsys.readouterr().out.count("finished before") == 3
    assert path.stat().st_mtime_ns == before


def test_a_finished_stage_of_other_settings_is_named(world, trained, tmp_path, capsys):
    """It, or one that it came from: nothing is overwritten. What makes no other result may change.
    """
    shutil.copytree(world / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
    for setting, said in (("insertion=1", "instruct was made with another adaptor's configuration"),
                          ("grounding.lr=1", "grounding was made with another lr"),
                          ('stages=["instruct"]', "instruct was made with another beginning"),
                          ("seed=3", "pretrain_projector was made with another seed")):
        with pytest.raises(ValueError, match=said):
            go(world, tmp_path / "run", setting)
    assert {path: path.read_bytes() for path in before} == before
    go(world, tmp_path / "run", "stage.micro_batch=2", "stage.zero=3")
    assert capsys.readouterr().out.count("finished before") >= 3
    for left in ('stages=["pretrain_projector"]', 'stages=["pretrain_projector", "instruct"]'):
        go(world, tmp_path / "run", left)
        index = json.loads((tmp_path / "run" / "iaa.json").read_text())
        last = left.split('"')[-2]  # the later finished stage of a name that the run has
        assert index["adaptors"] == {"mm": f"{last}/adaptor", "grounding": "grounding/adaptor"}
    shutil.rmtree(tmp_path / "run" / "instruct")
    with pytest.raises(ValueError, match="grounding was made with another beginning"):
        go(world, tmp_path / "run", "instruct.steps=2")
    assert not (tmp_path / "run" / "instruct").exists()  # said before it is trained
    go(world, tmp_path / "run", "stage.eval_every=50", "instruct.held_out=[]")
    assert (tmp_path / "run" / "instruct" / "adaptor").is_dir()


def dies(config: str, settings: list[str], step: int, saving: str = "") -> None:
    """In a process of its own: train until that line of `instruct` is logged, then kill -9.

    saving: not there, but in the save that follows, when checkpoint.py calls the function so named.
    """
    log, armed = Log.step, []

    def last(self, number, *rest):
        log(self, number, *rest)
        if self.stage.name == "instruct" and number + 1 == step:
            armed.append(step)
            if not saving:
                os.kill(os.getpid(), signal.SIGKILL)

    def fatal(*arguments):
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    Log.step = last
    if saving:
        call = getattr(checkpoint, saving)
        setattr(checkpoint, saving, fatal)
    train(read_config(config, settings), None)


def killed(world, out: str, step: int, saving: str = "") -> None:
    arguments = (str(world / "config.toml"), [f"out={world}/{out}"], step, saving)
    with processes(1, dies, *arguments) as (begun, _):
        begun[0].join(60)
        assert begun[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("step, saving, resumes", [
    (5, "", 4), (4, "save_file", 2), (4, "write_json", 2), (6, "remove", 6)])
def test_killed_run_ends_with_the_same_bits(world, trained, capsys, step, saving, resumes):
    """kill -9 in a stage, or at some point of a save, started again: as the run never killed.

    Before the manifest is written, the save has not happened; behind it, it has.
    """
    out = f"killed-{step}-{saving}"
    killed(world, out, step, saving)
    assert not (world / out / "instruct" / "adaptor").exists()
    go(world, out)
    assert f"from step {resumes}" in capsys.readouterr().out
    for stage in ("instruct", "grounding"):
        expected, got = tensors(world, "run", stage), tensors(world, out, stage)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    log = (world / out / "instruct" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(8))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing(world, tmp_path, fails, monkeypatch, where):
    """Skipped and counted; after some in a row the run stops, and what is saved is intact."""
    monkeypatch.setattr("train.MAX_BAD_STEPS", 2)
    forward = DataParallel.forward_backward

    def spoiled(self, batch, scored, last):
        loss = forward(self, batch, scored, last)
        if self.steps >= 4:
            if where == "gradient":
                next(iter(self.masters.values())).grad.view(-1)[0] = float("inf")
            loss = loss if where == "gradient" else loss * float("nan")
        self.steps += last
        return loss

    monkeypatch.setattr(DataParallel, "steps", 0, raising=False)
    monkeypatch.setattr(DataParallel, "forward_backward", spoiled)
    said = fails("--stage", "instruct", "--set", f"out={tmp_path}", "--set", "instruct.start=none")
    assert "stage instruct, step 6: 2 steps in a row were not finite" in said
    folder = tmp_path / "instruct"
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-000002", "step-000004"]
    monkeypatch.undo()
    go(world, tmp_path, "instruct.start=none", stage="instruct")
    go(world, tmp_path / "whole", "instruct.start=none", stage="instruct")
    expected = tensors(tmp_path, "whole", "instruct")
    got = load_file(folder / "adaptor" / "adaptor.safetensors")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def cramped(config: str, settings: list[str], size: int) -> None:
    """In a process of its own, where no file can grow beyond `size` bytes: as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    train(read_config(config, settings), None)


def test_full_disk_leaves_the_last_checkpoint(world, trained, capsys):
    """A checkpoint that finds no room: one line, nothing half written; the run goes on later."""
    stage = world / "full" / "instruct"
    killed(world, "full", 3)
    before = {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))}
    assert {path.parent.name for path in before} == {"step-000002"}
    size = max(map(len, before.values())) - 1
    settings = [f"out={world}/full"]
    with processes(1, cramped, str(world / "config.toml"), settings, size) as (_, result):
        error = result(60)[1]
    assert isinstance(error, OSError) and "\n" not in str(error)
    assert "File too large" in str(error) and str(stage / "step-000004") in str(error)
    assert {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))} == before
    go(world, "full")
    assert "from step 2" in capsys.readouterr().out
    expected, got = tensors(world, "run", "instruct"), tensors(world, "full", "instruct")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list(stage.glob(".*.tmp*"))


def instruct(config: str, settings: list[str], fault: tuple | None = None) -> None:
    """On a rank: the second stage alone, from the frozen model.

    fault: (rank, signal), which that rank sends itself, or its loader, as step 4 begins.
    """

    def note(self, place):
        self.noted = place
        if fault and self.rank == fault[0] and place.endswith("step 4"):
            loaders = [child.pid for child in multiprocessing.active_children()]
            os.kill((*loaders, os.getpid())[0], fault[1])

    Ranks.place = property(lambda self: self.noted, note)
    train(read_config(config, ["instruct.start=none", *settings]), "instruct")


def test_accumulation_and_ranks_change_nothing(world, tmp_path):
    """One micro-batch or several, one process or two: the same weights to rounding."""
    config, found = str(world / "config.toml"), []
    for number, count in ((8, 1), (4, 1), (2, 2)):
        settings = [f"out={tmp_path}/{number}", f"instruct.micro_batch={number}"]
        with processes(count, instruct, config, settings) as (_, result):
            assert [result(60)[1] for _ in range(count)] == [None] * count
        found.append(tensors(tmp_path, str(number), "instruct"))
    for other in found[1:]:
        for name, expected in found[0].items():
            assert torch.allclose(expected, other[name], rtol=0, atol=2e-5), name


def test_killed_ranks_end_with_the_same_bits(world, tmp_path):
    """kill -9 of one of two ranks at stage 3, started again: the bits of the run never killed."""
    config = str(world / "config.toml")

    def both(out: str, fault: tuple | None) -> list:
        settings = ["stage.zero=3", "stage.save_every=1", f"out={tmp_path}/{out}"]
        with processes(2, instruct, config, settings, fault) as (_, result):
            return [result(60)[1] for _ in range(1 if fault else 2)]

    assert both("whole", None) == [None, None]
    assert isinstance(both("killed", (0, signal.SIGKILL))[0], ConnectionError)
    assert not (tmp_path / "killed" / "instruct" / "adaptor").exists()
    assert both("killed", None) == [None, None]
    expected, got = tensors(tmp_path, "whole", "instruct"), tensors(tmp_path, "killed", "instruct")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = {path.name for path in (tmp_path / "killed" / "instruct").iterdir()}
    assert left == {"adaptor", "log.jsonl"}


def test_a_rank_that_hangs_stops_the_others(world, tmp_path):
    """They end within the timeout, each with a line that names itself, the stage and the step."""
    settings, config = [f"out={tmp_path}", "timeout_s=6"], str(world / "config.toml")
    with processes(2, instruct, config, settings, (1, signal.SIGSTOP)) as (started, result):
        rank, error = result(60)
        assert rank == 0 and isinstance(error, ConnectionError), error
        assert str(error).startswith("rank 0 of 2 stopped in stage instruct, step 4: ")
        assert "\n" not in str(error)
        started[0].join(10)
        assert not started[0].is_alive()


def test_a_loader_that_dies_is_named(world, tmp_path):
    """As where memory ran out: the run ends with one line, not with torch's traceback."""
    settings, config = [f"out={tmp_path}", "workers=1"], str(world / "config.toml")
    with processes(1, instruct, config, settings, (0, signal.SIGKILL)) as (_, result):
        _, error = result(60)
    assert isinstance(error, ConnectionError) and "\n" not in str(error)
    assert str(error).startswith("rank 0 of 1 stopped in stage instruct, step 4: DataLoader worker")


def test_learning_rate_schedule():
    """Linear warm-up over 3 % of the steps, the peak right after, cosine to zero (Table 1)."""
    stage = StageConfig("s", ["x"], steps=100)
    assert [lr_at(step, stage) for step in (0, 1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_at(51, stage) == pytest.approx(0.5, abs=0.02)
    assert lr_at(99, stage) < 0.001


@pytest.mark.parametrize("setting, message", [
    ("stpes=3", "unknown key 'stpes'; known: "),
    ("instruct.stpes=3", "unknown key 'stpes' in stage[1]; known: "),
    ("instruct.steps='many'", "stage[1].steps = 'many': expected int"),
    ("instruct.steps=0", "stage instruct: steps = 0: must be 1 or more"),
    ("instruct.trains=all", "trains = 'all': \"projector\" or \"adaptor\""),
    ("dtype=fp8", "dtype = 'fp8': one of auto, bf16, fp32"),
    ("instruct.micro_batch=3", "batch = 8 is not a multiple of micro_batch = 3"),
    ("instruct.beta2=1.0", "beta1, beta2 = 0.9, 1.0: 0 or more, below 1"),
    ("instruct.data=[]", "data = []: at least one JSONL file"),
    ("instruct.clip_norm=0", "clip_norm = 0.0: must be above 0"),
    ("instruct.warmup=3", "warmup = 3.0: a share of the steps, 1 at most"),
    ("max_tokens=0", "max_tokens = 0: must be 1 or more"),
    ("workers=-1", "workers = -1: must be 0 or more"),
    ("nostage.steps=3", "no stage 'nostage'; there are: pretrain_projector, instruct, grounding"),
    ("steps", "write key=value"),
])
def test_config_errors_are_one_line(world, setting, message):
    """An unknown key, a wrong type, an impossible value: the message says what is accepted."""
    with pytest.raises(ValueError) as error:
        read_config(str(world / "config.toml"), [setting])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_stages_that_are_no_tables(tmp_path):
    """What is no [[stage]], or has no text as its name, is said where an override looks into it."""
    for text, said in (("stage = [1]", r"write \[\[stage\]\]"),
                       ("[[stage]]\nname = 3", "no stage 'wrong'; there are: 3")):
        (tmp_path / "c.toml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_config(str(tmp_path / "c.toml"), ["wrong.steps=3"])


def test_bad_input_is_one_line_without_a_traceback(world, fails, tmp_path):
    """Missing files, empty data, an unknown stage or one without its start, a bad insertion.

    What is wrong for a later stage is said before the first one is trained.
    """
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (["--set", "llm=/nowhere"], "/nowhere/config.json: no such file"),
        (["--set", f'stage.data=["{tmp_path}/empty.jsonl"]'], "empty.jsonl"),
        (["--stage", "instruct"], "starts from stage 'pretrain_projector'"),
        (["--set", "insertion=99"], "insertion = 99"),
        (["--set", "structure=d"], "structure = 'd'"),
        (["--set", f"vision={world}/llama"], "a model of kind 'llama', not 'clip'"),
        (["--set", "grounding.start=instuct"], "start = 'instuct'"),
        (["--set", "instruct.start=grounding"], "a stage before it (pretrain_projector)"),
        (["--set", "grounding.template=plian"], "template 'plian'"),
        (["--set", "grounding.template=llama3"], "no special token '<|start_header_id|>'"),
        (["--set", 'grounding.held_out=["none.jsonl"]'], "none.jsonl: no such data file"),
    ]
    for number, (arguments, message) in enumerate(cases):
        assert message in fails("--set", f"out={tmp_path}/{number}", *arguments)
        assert not list((tmp_path / str(number)).glob("*/adaptor"))
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml"),
               "--stage", "nope"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("train.py: no stage 'nope'")


def test_changed_settings_do_not_resume(world, tmp_path, monkeypatch):
    """Whatever the result depends on is named; what is FREE may change."""
    monkeypatch.setattr("iaa.Adaptor.save", Mock(side_effect=KeyboardInterrupt))

    def again(*settings):
        go(world, tmp_path / "run", "instruct.start=none", "stage.steps=3", "stage.save_every=1",
           *settings, stage="instruct")

    with pytest.raises(KeyboardInterrupt):
        again()
    shutil.copytree(world / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "other"}))
    for setting, key in (
            ("instruct.lr=2e-3", "lr"), ("instruct.batch=4", "batch"), ("seed=7", "seed"),
            ("max_tokens=99", "max_tokens"), ("system=x", "system"), ("dtype=bf16", "dtype"),
            ("insertion=1", "adaptor's configuration"), (f"llm={tmp_path}/llama", "base model")):
        with pytest.raises(ValueError, match=f"was made with another {key}: restore"):
            again(setting)
    with pytest.raises(KeyboardInterrupt):  # goes on to the end
        again("stage.save_every=2", "stage.eval_every=1", "stage.eval_rows=1", "stage.zero=2")


def test_a_stage_starts_from_none_but_its_own_kind(world, trained, fails, tmp_path):
    """The adaptor of another base, or with layers at other places, is refused."""
    shutil.copytree(world / "run" / "instruct", tmp_path / "run" / "instruct")
    path = tmp_path / "run" / "instruct" / "adaptor" / "config.json"
    kept = json.loads(path.read_text())
    for change, said in (({"base": {"llama": "00"}}, "was trained on llama 00..."),
                         ({"adaptor": kept["adaptor"] | {"structure": "a"}}, "has structure a"),
                         ({"adaptor": kept["adaptor"] | {"insertion": [0, 1]}}, "layers [0, 1]")):
        path.write_text(json.dumps(kept | change))
        assert said in fails("--set", f"out={tmp_path}/run", "--stage", "grounding")


def test_broken_rows_are_skipped_counted_and_named(world, tmp_path, capsys):
    """A broken picture and a row without an answer do not stop training."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    (world / "broken.png").write_bytes((world / "0.png").read_bytes()[:100])
    rows[0] = rows[0].replace("0.png", "broken.png")
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:6], "{not json"]) + "\n")
    go(world, tmp_path / "run", f'stage.data=["{tmp_path}/rows.jsonl"]',
       stage="pretrain_projector")
    said = capsys.readouterr().err
    assert "broken.png" in said and "rows.jsonl:7" in said and "(2 so far)" in said


def test_held_out_rows_are_skipped_and_rows_cut_aloud(world, tmp_path, capsys):
    """A broken held-out row is named; rows longer than max_tokens are counted in the log."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "held.jsonl").write_text("\n".join(["{not json", *rows[:4]]) + "\n")
    go(world, tmp_path / "run", f'stage.held_out=["{tmp_path}/held.jsonl"]', "max_tokens=18",
       stage="pretrain_projector")
    said = capsys.readouterr().out
    assert f"held out: skipped {tmp_path}/held.jsonl:1: " in said
    log = (tmp_path / "run" / "pretrain_projector" / "log.jsonl").read_text().splitlines()
    cut = json.loads(log[-1])["cut"]
    assert 0 < cut < 12 and f"{cut} rows cut" in said


def test_llava_baseline_trains_its_own_llm(world, tmp_path):
    """N = 0 with a trained copy of the LLM: the frozen one stays as it is."""
    go(world, tmp_path / "run", "insertion=0", "own_llm=true", "own_embedding=false",
       "own_head=false", "stage.steps=2")
    trained = tensors(tmp_path, "run", "grounding")
    frozen = load_file(next((world / "llama").glob("*.safetensors")))
    name = "layers.0.ffn.down.weight"
    assert not torch.equal(trained[f"llm.{name}"], frozen[name])


def test_a_run_goes_on_in_its_own_dtype(world, tmp_path, capsys, monkeypatch):
    """Begun in bf16, continued under "auto" where fp32 is faster: one warning, the same bits."""
    for out in ("whole", "resumed"):
        go(world, tmp_path / out, "dtype=bf16", stage="pretrain_projector")
    go(world, tmp_path / "whole", "dtype=bf16", stage="instruct")
    capsys.readouterr()
    monkeypatch.setattr("common.device.time_products", lambda: (2.0, 1.0))
    fast_dtype.cache_clear()
    go(world, tmp_path / "resumed", "dtype=auto", stage="instruct")
    said = capsys.readouterr()
    assert said.err.count("warning: ") == 1 and "goes on in it, though fp32 is faster" in said.err
    assert "computing in bf16 on cpu: the run was begun in it" in said.out
    expected, got = tensors(tmp_path, "whole", "instruct"), tensors(tmp_path, "resumed", "instruct")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    go(world, tmp_path / "new", "dtype=auto", stage="pretrain_projector")
    assert "2 times as long as in fp32" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "fp32"
    fast_dtype.cache_clear()


def test_progress_is_one_line_on_a_terminal(world, tmp_path, capsys, monkeypatch):
    """Rewritten there; elsewhere a line now and then, with the time left of stage and run."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    go(world, tmp_path / "run", "instruct.start=none", "stage.held_out=[]", stage="instruct")
    said = capsys.readouterr().out
    assert said.count("\rinstruct") == 8 and said.count("\x1b[K") == 8
    assert "\rinstruct 8/8  loss" in said and " min left, " in said
