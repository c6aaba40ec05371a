"""train.py: one-line errors, the schedule, stages from end to end, resume to the bit, two ranks."""

import json
import multiprocessing
import os
import re
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
from conftest import edit, last_line, talk, tiny_base, write_rows
from PIL import Image
from processes import processes
from safetensors.torch import load_file

from common import device
from common.device import Ranks, fast_dtype
from iaa import load_iaa
from train import lr_at, main, train
from training import checkpoint
from training.config import StageConfig, read_config
from training.log import read_log
from training.zero import DataParallel

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny base, 24 rows of pictures and captions, a config of three stages."""
    folder = tmp_path_factory.mktemp("world")
    tiny_base(folder)
    rng, rows = np.random.default_rng(0), []
    for i in range(24):
        pixels = rng.integers(0, 255, (20, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        turns = talk("<image>\nWhat?", "a " * (1 + i % 5) + "dog")
        rows.append({"image": f"{i}.png", "conversations": turns})
    write_rows(folder / "rows.jsonl", rows)
    run = {"out": "run", "llm": "llama", "vision": "clip", "images": "."}
    lines = [f'{key} = "{folder}/{name}"' for key, name in run.items()]
    lines += ["insertion = 2", 'dtype = "fp32"', "workers = 0"]
    for stage in ({"name": "pretrain_projector", "trains": "projector", "template": "plain",
                   "held_out": [f"{folder}/rows.jsonl"], "steps": 3, "batch": 4, "eval_rows": 4},
                  {"name": "instruct", "steps": 8, "batch": 8, "save_every": 2},
                  {"name": "grounding", "adaptor": "grounding", "trains": "layers", "steps": 2,
                   "batch": 4}):
        stage |= {"data": [f"{folder}/rows.jsonl"], "micro_batch": 4, "lr": 1e-3}
        lines += ["[[stage]]", *(f"{key} = {json.dumps(value)}" for key, value in stage.items())]
    (folder / "config.toml").write_text("\n".join(lines))
    return folder


def go(world, out, *settings, stage=None):
    """The config run in this process, into `world / out`."""
    train(read_config(str(world / "config.toml"), [f"out={world / out}", *settings]), stage)


def alone(world, out, *settings):
    """The second stage alone, from the frozen model."""
    go(world, out, "instruct.start=none", *settings, stage="instruct")


def tensors(world, out, stage):
    """The finished adaptor of a stage."""
    return load_file(world / out / stage / "adaptor" / "adaptor.safetensors")


def check_same(world, out, expected):
    """`instruct` ended with the same bits, its log has each step once, nothing else is left."""
    got = tensors(world, out, "instruct")
    assert got.keys() == expected.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    log = read_log(world / out / "instruct" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(8))
    left = {path.name for path in (world / out / "instruct").iterdir()}
    assert left == {"adaptor", "log.jsonl"}


@pytest.fixture(scope="module")
def trained(world):
    """The config run from end to end, once, as a user starts it; what it prints."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def whole(world):
    """The adaptor of the second stage alone, never stopped."""
    alone(world, "whole")
    return tensors(world, "whole", "instruct")


@pytest.fixture
def fails(world, monkeypatch):
    """A function that runs train.py here, sees it end with one line, and returns that."""

    def call(*arguments) -> str:
        monkeypatch.setattr(sys, "argv",
                            ["train.py", "--config", str(world / "config.toml"), *arguments])
        return last_line(main)

    return call


def test_stages_build_on_each_other(world, trained):
    """The first stage trains the projector, the last leaves the ends; a line a step, less loss."""
    stages = ("pretrain_projector", "instruct", "grounding")
    first, second, third = (tensors(world, "run", name) for name in stages)
    assert set(first) == {f"projector.{part}" for part in
                          ("up.weight", "up.bias", "down.weight", "down.bias")}
    assert second.keys() == third.keys() > first.keys()
    assert not torch.equal(first["projector.up.weight"], second["projector.up.weight"])
    for name in second:
        ends = name in ("embedding.weight", "norm.weight", "head.weight")
        assert torch.equal(second[name], third[name]) == ends
    index = json.loads((world / "run" / "iaa.json").read_text())
    assert index["adaptors"] == {"mm": "instruct/adaptor", "grounding": "grounding/adaptor"}
    lines = read_log(world / "run" / "instruct" / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"lr", "grad_norm", "tokens_per_s", "tflops", "padding", "memory_gb",
            "data_wait"} <= lines[0].keys()
    assert "held-out" in trained
    assert " min left, " in trained and trained.count("PFLOP in all") == 3
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


def test_finished_stages_are_not_trained_again(world, trained, tmp_path, capsys):
    """One made with other settings, or from another beginning, is named and not overwritten."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    go(world, run)
    files = {path: path.read_bytes() for path in run.rglob("*.*")}
    for setting, said in (("insertion=1", "instruct was made with another adaptor's configuration"),
                          ("grounding.lr=1", "grounding was made with another lr"),
                          ('stages=["instruct"]', "instruct was made with another beginning"),
                          ("seed=3", "pretrain_projector was made with another seed")):
        with pytest.raises(ValueError, match=said):
            go(world, run, setting)
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == files
    go(world, run, "stage.micro_batch=2", "stage.zero=3")  # they make no other result
    assert capsys.readouterr().out.count("finished before") == 6
    for left in (["pretrain_projector"], ["pretrain_projector", "instruct"]):
        go(world, run, f"stages={json.dumps(left)}")
        index = json.loads((run / "iaa.json").read_text())  # the later stage of a name counts
        assert index["adaptors"] == {"mm": f"{left[-1]}/adaptor", "grounding": "grounding/adaptor"}
    shutil.rmtree(run / "instruct")
    with pytest.raises(ValueError, match="grounding was made with another beginning"):
        go(world, run, "instruct.steps=2")
    assert not (run / "instruct").exists()  # said before it is trained
    go(world, run, "stage.eval_every=50", "instruct.held_out=[]")
    assert (run / "instruct" / "adaptor").is_dir()
    shutil.rmtree(run / "grounding")
    go(world, run, 'stages=["pretrain_projector"]')
    index = json.loads((run / "iaa.json").read_text())  # without the adaptor that is gone
    assert index["adaptors"] == {"mm": "pretrain_projector/adaptor"}


def instruct(config, settings, rank=0, step=0, sent=signal.SIGKILL, whom="rank", saving=""):
    """In a process of its own: the command for the second stage alone, from the frozen model.

    As `step` begins, `rank` sends a signal to its "rank", its "loader", or "all" of these. saving:
    not yet then, but when checkpoint.py next calls the function so named.
    """
    def strike(*_, **settings):
        loaders = [child.pid for child in multiprocessing.active_children()]
        whole = {"rank": [os.getpid()], "loader": loaders, "all": [*loaders, os.getpid()]}
        for pid in whole[whom]:
            os.kill(pid, sent)

    def note(self, progress):
        self.noted = progress
        if self.rank == rank and progress.endswith(f"step {step}"):
            setattr(checkpoint, saving, strike) if saving else strike()

    Ranks.progress = property(lambda self: self.noted, note)
    device.SILENT_S = 2
    sys.argv = ["train.py", "--config", config, "--stage", "instruct"]
    for setting in ("instruct.start=none", *settings):
        sys.argv += ["--set", setting]
    main()


def killed(world, out: str, step: int, saving: str = "") -> None:
    """A run that was killed: see `instruct`."""
    fault = (0, step, signal.SIGKILL, "rank", saving)
    with processes(1, instruct, str(world / "config.toml"), [f"out={world}/{out}"], *fault) as (
            begun, _):
        begun[0].join(60)
        assert begun[0].exitcode == -signal.SIGKILL
    assert not (world / out / "instruct" / "adaptor").exists()


@pytest.mark.parametrize("step, saving, resumes", [
    (6, "", 4), (4, "save_file", 2), (4, "write_json", 2), (6, "rmtree", 6)])
def test_killed_run_ends_with_the_same_bits(world, whole, capsys, step, saving, resumes):
    """kill -9 in a stage, or within a save, which has happened once the manifest is written."""
    out = f"killed-{step}-{saving}"
    killed(world, out, step, saving)
    (world / out / "instruct" / ".adaptor.123.tmp").mkdir()  # as if it had been killed there, too
    alone(world, out)
    assert f"from step {resumes}" in capsys.readouterr().out
    check_same(world, out, whole)


def test_steps_that_are_not_finite_change_nothing(world, whole, fails, monkeypatch):
    """Skipped; after some in a row the run stops. None is saved: checkpoints before are kept."""
    forward, folder = DataParallel.forward_backward, world / "infinite" / "instruct"

    def spoiled(self, batch, scored, last):
        loss = forward(self, batch, scored, last)
        if self.steps in (4, 6):
            next(iter(self.masters.values())).grad.view(-1)[0] = float("inf")
        self.steps += last
        return loss * (float("nan") if self.steps in (6, 8) else 1)

    with monkeypatch.context() as patch:
        patch.setattr("train.MAX_BAD_STEPS", 4)
        patch.setattr(DataParallel, "steps", 0, raising=False)
        patch.setattr(DataParallel, "forward_backward", spoiled)
        said = fails("--stage", "instruct", "--set", f"out={folder.parent}", "--set",
                     "instruct.start=none")
    assert "stage instruct, step 8: 4 steps in a row were not finite" in said
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-000002", "step-000004"]
    alone(world, folder.parent.name)
    check_same(world, folder.parent.name, whole)


def cramped(config: str, settings: list[str], size: int) -> None:
    """In a process of its own, where no file can grow beyond `size` bytes: as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    instruct(config, settings)


def test_full_disk_leaves_the_last_checkpoint(world, whole, capsys):
    """A checkpoint that finds no room: one line, nothing half written; the run goes on later."""
    stage = world / "full" / "instruct"
    killed(world, "full", 4)
    before = {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))}
    assert {path.parent.name for path in before} == {"step-000002"}
    size = max(map(len, before.values())) - 1
    with processes(1, cramped, str(world / "config.toml"), [f"out={world}/full"], size) as (
            _, result):
        said = result(60)[1].code
    assert "\n" not in said and "File too large" in said and str(stage / "step-000004") in said
    assert {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))} == before
    alone(world, "full")
    assert "from step 2" in capsys.readouterr().out
    check_same(world, "full", whole)


def test_ranks_and_killed_ranks_change_nothing(world, whole, tmp_path):
    """Two ranks at stage 3: one process's weights to rounding; killed, resumed: the same bits."""
    def both(out: str, *fault) -> list:
        settings = ["stage.zero=3", "stage.save_every=1", "instruct.micro_batch=2",
                    f"out={tmp_path}/{out}"]
        with processes(2, instruct, str(world / "config.toml"), settings, *fault) as (_, result):
            return [result(60)[1] for _ in range(1 if fault else 2)]

    assert both("whole") == [None, None]
    expected = tensors(tmp_path, "whole", "instruct")
    for name, weight in whole.items():
        assert torch.allclose(weight, expected[name], rtol=0, atol=2e-5), name
    assert "rank 1 of 2 stopped in stage instruct, step " in both("killed", 0, 4)[0].code
    assert not (tmp_path / "killed" / "instruct" / "adaptor").exists()
    assert both("killed") == [None, None]
    check_same(tmp_path, "killed", expected)


@pytest.mark.parametrize("ranks, lost, sent, whom, workers, said", [
    (2, 1, signal.SIGSTOP, "rank", 1, "no sign of life from rank 1; "),
    (2, 1, signal.SIGKILL, "rank", 0, "no sign of life from rank 1; "),
    (2, 0, signal.SIGSTOP, "rank", 0, "no answer from the store, which rank 0 or its launcher"),
    (1, 0, signal.SIGKILL, "loader", 1, "DataLoader worker"),
    (1, 0, signal.SIGSTOP, "loader", 1, "the data loader gave no batch in 4 s")])
def test_a_lost_process_stops_the_others(world, tmp_path, ranks, lost, sent, whom, workers, said):
    """They end within the timeout, with a line that names the rank, the step, who is lost."""
    settings = [f"out={tmp_path}", "timeout_s=4", f"workers={workers}"]
    with processes(ranks, instruct, str(world / "config.toml"), settings, lost, 4, sent, whom) as (
            started, result):
        rank, stop = result(60)
        assert "\n" not in stop.code and said in stop.code
        assert f": rank {rank} of {ranks} stopped in stage instruct, step " in stop.code
        started[rank].join(10)
        assert not started[rank].is_alive()
        if lost == 1:  # the one that noticed has killed a frozen one
            started[lost].join(10)
            assert not started[lost].is_alive()


@pytest.mark.parametrize("ranks, save_every", [(1, 100), (1, 4), (2, 100)])
def test_sigterm_finishes_the_step_and_saves(world, whole, tmp_path, ranks, save_every):
    """All ranks leave after the same step, with code 143; started again: the same bits."""
    settings = [f"out={tmp_path}/run", "workers=1", f"stage.save_every={save_every}"]
    fault = (0, 4, signal.SIGTERM, "all")
    with processes(ranks, instruct, str(world / "config.toml"), settings, *fault) as (_, result):
        assert [result(60)[1].code for _ in range(ranks)] == [143] * ranks
    assert [path.name for path in (tmp_path / "run" / "instruct").glob("step-*")] == ["step-000004"]
    if ranks == 1:  # two ranks add up in another order
        alone(world, tmp_path / "run")
        check_same(world, tmp_path / "run", whole)


def test_sigterm_between_stages_begins_no_other(world, tmp_path, monkeypatch):
    """Sent in a stage's last step, it is heeded before the next one loads; code 143."""
    monkeypatch.setattr("train.SIGTERM.is_set", lambda: True)
    with pytest.raises(SystemExit) as stop:
        go(world, tmp_path / "run")
    assert stop.value.code == 143 and not (tmp_path / "run/pretrain_projector").exists()


def test_a_step_of_many_micro_batches_needs_few_open_files(world, tmp_path):
    """Four tensors each come from a worker's shared memory, which keeps a file open for each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        alone(world, tmp_path / "run", "workers=1", "instruct.batch=32", "instruct.micro_batch=1",
              "instruct.steps=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def flip(path: Path, place: int = -99) -> None:
    """Flip a bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(world):
    """A run that was killed behind the checkpoints of steps 2 and 4."""
    killed(world, "stopped", 6)
    return world / "stopped"


SHARD = "rank-0-of-1.safetensors"


@pytest.mark.parametrize("damage, said", [
    (lambda new: flip(new / SHARD), f"{SHARD} is not as it was written"),
    (lambda new: (new / SHARD).unlink(), f"{SHARD} is not as it was written"),
    (lambda new: shutil.copy(new.parent / "step-000002" / SHARD, new), f"{SHARD} is not as it was"),
    (lambda new: edit(new / "state.json", updates=3), "state.json is not as it was written"),
    (lambda new: flip(new / "state.json"), "state.json"),
    (lambda new: edit(new / "state.json", shards=2**62), "state.json: shards = 46116860184"),
    (lambda new: edit(new / "state.json", updates="4"), "state.json: updates = '4': expected int")])
def test_a_damaged_checkpoint_is_not_taken(stopped, tmp_path, damage, said):
    """One line names it; with it alone the run does not start again at step 0 by itself."""
    shutil.copytree(stopped / "instruct", tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "step-000004")
    assert checkpoint.read_manifest(tmp_path / "step-000002", Ranks(60))["step"] == 2
    with pytest.raises(ValueError) as error:
        checkpoint.read_manifest(tmp_path / "step-000004", Ranks(60))
    assert f"{tmp_path}/step-000004/{said}" in str(error.value) and "\n" not in str(error.value)


def test_the_checkpoint_before_a_damaged_one_is_taken(world, whole, stopped, fails, capsys):
    """And the run ends with the same bits; where none is intact, it does not begin anew."""
    again = world / "stopped-again"
    shutil.copytree(stopped, again)
    flip(again / "instruct" / "step-000004" / SHARD)
    alone(world, again)
    said = capsys.readouterr().out
    assert f"damaged checkpoint, not used: {again}/instruct/step-000004/{SHARD} is not" in said
    assert "from step 2" in said
    check_same(world, again, whole)
    shutil.copytree(stopped, world / "spoiled")
    flip(world / "spoiled" / "instruct" / "step-000004" / SHARD)
    (world / "spoiled/instruct/step-000002").rename(world / "spoiled/instruct/step-1000000")
    names = [path.name for path in checkpoint.list_checkpoints(world / "spoiled" / "instruct")]
    assert names == ["step-000004", "step-1000000"]  # by number; and that number is not its own
    assert "instruct: no checkpoint is intact; remove this folder" in fails(
        "--stage", "instruct", "--set", f"out={world}/spoiled", "--set", "instruct.start=none")


@pytest.mark.parametrize("line", [
    "{", "5", "\xff", '{"step": 1}', '{"stEp": 1, "loss": 2, "lr": 3, "flops": 7}'])
def test_a_damaged_log_is_named(tmp_path, line):
    """With the line; an unfinished last one is left out."""
    path, good = tmp_path / "log.jsonl", '{"step": 0, "loss": 2.5, "lr": 1e-3, "flops": 7}'
    path.write_text(f'{good}\n{good}\n{{"step": 1, "lo', encoding="latin-1")
    assert read_log(path) == [{"step": 0, "loss": 2.5, "lr": 0.001, "flops": 7}] * 2
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"^{path}:2: a damaged line; repair it or remove it$"):
        read_log(path)


def test_data_that_changed_is_named(world, trained, stopped, tmp_path, fails, capsys):
    """Between a kill and a resume, and under a finished stage, which runs without its data."""
    shutil.copytree(stopped, tmp_path / "stopped")
    shutil.copytree(world / "run", tmp_path / "run")
    rows, words = world / "rows.jsonl", world / "llama" / "tokenizer.json"
    for path, name in ((words, words.name), (rows, rows)):
        kept = path.read_bytes()
        path.write_bytes(kept.replace(b"What?", b"Who? ", 1) + b"\n" * (path == words))
        for arguments in (["--stage", "instruct", "--set", "instruct.start=none", "--set",
                           f"out={tmp_path}/stopped"], ["--set", f"out={tmp_path}/run"]):
            assert f"was made with another data file {name}: restore it" in fails(*arguments)
        path.write_bytes(kept)
    rows.unlink()
    try:
        go(world, tmp_path / "run")
        assert capsys.readouterr().out.count("finished before") == 3
        with pytest.raises(FileNotFoundError, match="rows.jsonl: no such data file"):
            alone(world, tmp_path / "stopped")
    finally:
        rows.write_bytes(kept)


def test_learning_rate_schedule():
    """Linear warm-up over 3 % of the steps, the peak right after, cosine to zero (Table 1)."""
    stage = StageConfig("s", ["x"], steps=100)
    assert [lr_at(step, stage) for step in (0, 1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_at(51, stage) == pytest.approx(0.5, abs=0.02)
    assert lr_at(99, stage) < 0.001


def test_bad_input_is_one_line_without_a_traceback(world, fails, tmp_path):
    """Also of a later stage, before the first one is trained."""
    (tmp_path / "empty.jsonl").write_text("")
    shutil.copytree(world / "clip", tmp_path / "clip")
    flip(next((tmp_path / "clip").glob("*.safetensors")))
    cases = [
        (["--set", f"vision={tmp_path}/clip"], f"{tmp_path}/clip: the weights do not have the SHA"),
        (["--set", "llm=/nowhere"], "/nowhere/config.json: no such file"),
        (["--set", f'stage.data=["{tmp_path}/empty.jsonl"]'], "empty.jsonl"),
        (["--stage", "instruct"], "starts from stage 'pretrain_projector'"),
        (["--stage", "nope"], "train.py: no stage 'nope'; there are: pretrain_projector, "),
        (["--set", "insertion=[99]"], "insertion layer after layer 99, but the LLM ends at 2"),
        (["--set", "stage.eps=0"], "eps = 0.0: must be above 0"),  # 0 / 0 without a gradient
        (["--set", f"vision={world}/llama"], "a model of kind 'llama', not 'clip'"),
        (["--set", "grounding.template=plian"], "template 'plian'"),
        (["--set", "grounding.template=llama3"], "no special token '<|start_header_id|>'"),
        (["--set", 'grounding.held_out=["none.jsonl"]'], "none.jsonl: no such data file"),
        (["--set", "images=nowhere"], "images = 'nowhere': no such folder"),
    ]
    for number, (arguments, message) in enumerate(cases):
        assert message in fails("--set", f"out={tmp_path}/{number}", *arguments)
        assert not list((tmp_path / str(number)).glob("*/adaptor"))


def test_two_runs_in_one_folder(world, tmp_path, fails):
    """The second ends at once: it would remove the first one's checkpoint in the making."""
    code = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('locked', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "locked\n"
        assert f"{tmp_path}: another train.py is at work in" in fails("--set", f"out={tmp_path}")
        other.stdin.close()


def test_changed_settings_do_not_resume(world, tmp_path, monkeypatch):
    """Whatever the result depends on is named; what is FREE may change."""
    monkeypatch.setattr("iaa.Adaptor.save", Mock(side_effect=KeyboardInterrupt))

    def again(*settings):
        alone(world, tmp_path / "run", "stage.steps=3", "stage.save_every=1", *settings)

    with pytest.raises(KeyboardInterrupt):
        again()
    tiny_base(tmp_path, seed=1)
    for setting, key in (
            ("instruct.lr=2e-3", "lr"), ("instruct.batch=4", "batch"), ("seed=7", "seed"),
            ("max_tokens=99", "max_tokens"), ("system=x", "system"), ("dtype=bf16", "dtype"),
            ("frozen_dtype=int8", "frozen_dtype"),
            ("insertion=1", "adaptor's configuration"), (f"llm={tmp_path}/llama", "base model")):
        with pytest.raises(ValueError, match=f"was made with another {key}: restore"):
            again(setting)
    begun = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (begun["dtype"], begun["seed"]) == ("fp32", 0)  # what is refused changes nothing
    with pytest.raises(KeyboardInterrupt):  # goes on to the end
        again("stage.save_every=2", "stage.eval_every=1", "stage.eval_rows=1", "stage.zero=2")


def test_a_run_may_lie_behind_a_link(world, tmp_path):
    """`iaa.json` leads from the real folder to the frozen models."""
    (tmp_path / "disk" / "far").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "far")
    alone(world, tmp_path / "runs" / "a", "stage.steps=1")
    assert [*load_iaa(tmp_path / "runs" / "a", torch.float32)[0].adaptors] == ["mm"]


def test_a_stage_starts_from_none_but_its_own_kind(world, trained, fails, tmp_path):
    """The adaptor of another base, or with layers at other places, is refused."""
    shutil.copytree(world / "run" / "instruct", tmp_path / "run" / "instruct")
    path = tmp_path / "run" / "instruct" / "adaptor" / "config.json"
    kept = path.read_text()
    adaptor = json.loads(kept)["adaptor"]
    for change, said in (({"base": {"llama": "00"}}, "was trained on llama 00..."),
                         ({"adaptor": adaptor | {"structure": "a"}}, "has structure = 'a', stage"),
                         ({"adaptor": adaptor | {"insertion": [0, 1]}}, "insertion = (0, 1)")):
        path.write_text(kept)
        edit(path, **change)
        assert said in fails("--set", f"out={tmp_path}/run", "--stage", "grounding")


def test_rows_that_are_broken_or_long_do_not_stop_training(world, tmp_path, capsys, monkeypatch):
    """A broken picture, a broken row, also a held-out one, are named; rows that are cut counted."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    (world / "broken.png").write_bytes((world / "0.png").read_bytes()[:100])
    (tmp_path / "held.jsonl").write_text("\n".join(["{not json", *rows[:4]]) + "\n")
    rows[0] = rows[0].replace("0.png", "broken.png")
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:6], "{not json"]) + "\n")
    settings = (f'stage.data=["{tmp_path}/rows.jsonl"]', "max_tokens=18", "stage.save_every=1",
                f'stage.held_out=["{tmp_path}/held.jsonl"]')
    go(world, tmp_path / "run", *settings, stage="pretrain_projector")
    said = capsys.readouterr()
    assert "broken.png" in said.err and "rows.jsonl:7" in said.err
    assert f"held out: skipped {tmp_path}/held.jsonl:1: " in said.out
    last = read_log(tmp_path / "run" / "pretrain_projector" / "log.jsonl")[-1]
    cut, skipped = last["cut"], last["skipped"]
    assert 0 < cut < 12 and f"{cut} rows cut  {skipped} rows skipped" in said.out
    assert skipped == len(re.findall("^skipped", said.err, re.M)) > 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("iaa.Adaptor.save", Mock(side_effect=KeyboardInterrupt))
        go(world, tmp_path / "killed", *settings, stage="pretrain_projector")
    go(world, tmp_path / "killed", *settings, stage="pretrain_projector")  # counts on
    again = read_log(tmp_path / "killed" / "pretrain_projector" / "log.jsonl")[-1]
    assert (again["cut"], again["skipped"]) == (cut, skipped)


def test_llava_baseline_trains_its_own_llm(world, tmp_path, capsys, monkeypatch):
    """N = 0 with a trained copy of the LLM. On a terminal the progress is one line, rewritten."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    alone(world, tmp_path, "insertion=0", "own_llm=true", "own_embedding=false", "own_head=false",
          "stage.steps=3", "stage.held_out=[]")
    name, frozen = "layers.0.ffn.down.weight", load_file(*(world / "llama").glob("*.safetensors"))
    assert not torch.equal(tensors(tmp_path, "", "instruct")[f"llm.{name}"], frozen[name])
    said = capsys.readouterr().out
    assert said.count("\r\x1b[?7linstruct") == 3 and said.count("\x1b[K") == 3
    assert "linstruct 3/3  loss" in said and " min left, " in said


def test_a_run_goes_on_in_its_own_dtype(world, tmp_path, capsys, monkeypatch):
    """Begun in bf16, continued under "auto" where fp32 is faster: one warning."""
    monkeypatch.setattr("common.device.time_products", lambda: (2.0, 1.0))
    fast_dtype.cache_clear()
    go(world, tmp_path / "run", "dtype=bf16", stage="pretrain_projector")
    for out, dtype in (("run", "bf16"), ("new", "fp32")):
        capsys.readouterr()
        alone(world, tmp_path / out, "dtype=auto", "stage.steps=1")
        said = capsys.readouterr().out
        assert said.count("goes on in it, though fp32 is faster") == (out == "run")
        reason = {"run": "the run was begun in it", "new": "on this CPU a bf16 matrix product"}
        assert f"computing in {dtype} on cpu: {reason[out]}" in said
        assert json.loads((tmp_path / out / "config.json").read_text())["dtype"] == dtype
    fast_dtype.cache_clear()
