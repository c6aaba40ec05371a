"""train.py: one-line errors, the schedule, stages from end to end, resume to the bit, two ranks."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import processes
from safetensors.torch import load_file

from config import StageConfig, read_config
from files import lock
from ranks import LostRank
from train import lr_at, train

ROOT = Path(__file__).parent.parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


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
threads = 1
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


def run(world, *arguments, processes=1, **options):
    """train.py as a user starts it."""
    command = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc_per_node", str(processes), str(ROOT / "train.py")]
    command += ["--config", str(world / "config.toml"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=ONE_THREAD, timeout=240, **options)


def tensors(world, out, stage):
    """The finished adaptor of a stage."""
    return load_file(world / out / stage / "adaptor" / "adaptor.safetensors")


@pytest.fixture(scope="module")
def trained(world):
    """The config run from end to end, once."""
    result = run(world)
    assert result.returncode == 0, result.stderr
    return result


def test_stages_build_on_each_other(world, trained):
    """Each stage starts from the one before; the first trains only the projector."""
    stages = ("pretrain_projector", "instruct", "grounding")
    first, second, third = (tensors(world, "run", name) for name in stages)
    assert set(first) == {f"projector.{part}" for part in
                          ("up.weight", "up.bias", "down.weight", "down.bias")}
    assert second.keys() == third.keys() > first.keys()
    assert not torch.equal(first["projector.up.weight"], second["projector.up.weight"])
    assert (second["head.weight"] - third["head.weight"]).abs().max() < 0.02  # two steps of 1e-3
    index = json.loads((world / "run" / "iaa.json").read_text())
    assert index["adaptors"] == {"mm": "instruct/adaptor", "grounding": "grounding/adaptor"}
    assert "held-out" in trained.stdout and "padding" in trained.stdout


def test_log_has_a_line_a_step(world, trained):
    """log.jsonl holds the steps in order, the held-out loss at the end, and a loss that fell."""
    log = (world / "run" / "instruct" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"lr", "grad_norm", "tokens_per_s", "tflops", "padding", "memory_gb",
            "data_wait"} <= lines[0].keys()


def test_finished_stages_are_not_trained_again(world, trained):
    """The same command on a finished run changes nothing and says so."""
    path = world / "run" / "instruct" / "adaptor" / "adaptor.safetensors"
    before = path.stat().st_mtime_ns
    result = run(world)
    assert result.returncode == 0 and result.stdout.count("finished before") == 3
    assert path.stat().st_mtime_ns == before


def test_killed_run_ends_with_the_same_bits(world, trained):
    """kill -9 inside a stage, started again: the adaptor is that of the run never killed."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml"),
               "--set", f"out={world}/killed"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith("instruct 5/8"):
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (world / "killed" / "instruct" / "adaptor").exists()
    result = run(world, "--set", f"out={world}/killed")
    assert result.returncode == 0, result.stderr
    assert "from step 4" in result.stdout
    for stage in ("instruct", "grounding"):
        expected, got = tensors(world, "run", stage), tensors(world, "killed", stage)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    log = (world / "killed" / "instruct" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(8))


def test_full_disk_leaves_the_last_checkpoint(world, trained):
    """A checkpoint that finds no room: one line, nothing half written; the run goes on later."""
    out, stage = ("--set", f"out={world}/full"), world / "full" / "instruct"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml"), *out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith("instruct 3/8"):
            process.kill()
    process.wait()
    before = {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))}
    assert {path.parent.name for path in before} == {"step-000002"}
    largest = max(map(len, before.values()))
    result = run(world, *out, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (largest - 1, largest - 1)))
    assert result.returncode == 1 and "instruct 4/8" in result.stdout
    assert result.stderr.startswith("train.py: ") and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr and str(stage / "step-000004") in result.stderr
    assert {path: path.read_bytes() for path in sorted(stage.glob("step-*/*"))} == before
    result = run(world, *out)
    assert result.returncode == 0 and "from step 2" in result.stdout
    expected, got = tensors(world, "run", "instruct"), tensors(world, "full", "instruct")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not list(stage.glob(".*.tmp"))


def test_kept_features_give_the_same_bits(world, trained, monkeypatch):
    """With `features`, and again from its files alone, the tower switched off: equal adaptors."""
    settings = [f'features="{world}/features"']
    for out in ("keeping", "kept"):
        train(read_config(world / "config.toml", [*settings, f"out={world}/{out}"]), None)
        for stage in ("pretrain_projector", "instruct", "grounding"):
            expected, got = tensors(world, "run", stage), tensors(world, out, stage)
            assert all(torch.equal(expected[name], got[name]) for name in expected)
        monkeypatch.setattr("clip.Clip.forward", None)
    assert len(list(world.glob("features/*/*"))) == 24


def test_accumulation_and_ranks_change_nothing(world, trained):
    """One micro-batch or several, one process or two: the same weights to rounding."""
    for out, setting, ranks in (("whole", "instruct.micro_batch=8", 1),
                                ("two", "stage.micro_batch=2", 2)):
        result = run(world, "--set", f"out={world}/{out}", "--set", setting, processes=ranks)
        assert result.returncode == 0, result.stderr
        expected, got = tensors(world, "run", "instruct"), tensors(world, out, "instruct")
        for name in expected:
            assert torch.allclose(expected[name], got[name], rtol=0, atol=2e-5), (out, name)


def instruct(config: str, settings: list[str]) -> None:
    """On a rank: the second stage alone, from the frozen model."""
    train(read_config(config, ["instruct.start=none", *settings]), "instruct")


def steps_done(out: Path, wanted: int) -> None:
    """Wait until the log has as many steps."""
    path, deadline = out / "instruct" / "log.jsonl", time.time() + 60
    while not path.is_file() or path.read_text().count("\n") < wanted:
        assert time.time() < deadline, "the ranks do not train"
        time.sleep(0.02)


def test_killed_ranks_end_with_the_same_bits(world, tmp_path):
    """kill -9 of one of two ranks at stage 3, started again: the bits of the run never killed."""
    config = str(world / "config.toml")

    def go(out: str, kill: bool) -> None:
        settings = ["stage.zero=3", "stage.save_every=1", "stage.steps=20", f"out={tmp_path}/{out}"]
        with processes(2, instruct, config, settings) as (started, result):
            if kill:
                steps_done(tmp_path / out, 3)
                os.kill(started[0].pid, signal.SIGKILL)
                assert isinstance(result(60)[1], LostRank)
            else:
                assert [result(60)[1], result(60)[1]] == [None, None]

    go("whole", kill=False)
    go("killed", kill=True)
    assert not (tmp_path / "killed" / "instruct" / "adaptor").exists()
    go("killed", kill=False)
    expected, got = tensors(tmp_path, "whole", "instruct"), tensors(tmp_path, "killed", "instruct")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    left = {path.name for path in (tmp_path / "killed" / "instruct").iterdir()}
    assert left == {"adaptor", "log.jsonl"}


@pytest.mark.parametrize("fault, zero", [(signal.SIGKILL, 3), (signal.SIGSTOP, 0)])
def test_a_lost_rank_is_named(world, tmp_path, fault, zero):
    """A rank that dies or hangs: the other stops within the timeout, naming it and the step."""
    settings = [f"out={tmp_path}", "timeout_s=3", f"stage.zero={zero}", "instruct.steps=5000"]
    with processes(2, instruct, str(world / "config.toml"), settings) as (started, result):
        steps_done(tmp_path, 3)
        os.kill(started[1].pid, fault)
        rank, error = result(20)
        assert rank == 0 and isinstance(error, LostRank), error
        step = r"stage instruct, step \d+"
        line = f"rank 0 stopped in {step}: rank 1 is dead or hangs in {step}"
        assert re.fullmatch(line, str(error))
        started[0].join(10)
        assert not started[0].is_alive()


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
    ("dtype=fp8", "dtype = 'fp8': one of bf16, fp32"),
    ("instruct.micro_batch=3", "batch = 8 is not a multiple of micro_batch = 3"),
    ("instruct.beta2=1.0", "beta1, beta2 = 0.9, 1.0: 0 or more, below 1"),
    ("instruct.data=[]", "data = []: at least one JSONL file"),
    ("instruct.clip_norm=0", "clip_norm = 0.0: must be above 0"),
    ("instruct.warmup=3", "warmup = 3.0: a share of the steps, 1 at most"),
    ("max_tokens=0", "max_tokens = 0: must be 1 or more"),
    ("workers=-1", "workers = -1: must be 0 or more"),
    ("threads=-1", "threads = -1: must be 0 or more"),
    ("nostage.steps=3", "no stage 'nostage'; there are: pretrain_projector, instruct, grounding"),
    ("steps", "write key=value"),
])
def test_config_errors_are_one_line(world, setting, message):
    """An unknown key, a wrong type, an impossible value: the message says what is accepted."""
    with pytest.raises(ValueError) as error:
        read_config(str(world / "config.toml"), [setting])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_stages_that_are_no_tables(tmp_path):
    """What is no [[stage]] is said before an override looks into it."""
    (tmp_path / "c.toml").write_text("stage = [1]")
    with pytest.raises(ValueError, match=r"write \[\[stage\]\]"):
        read_config(str(tmp_path / "c.toml"), ["stage.steps=3"])


def test_bad_input_is_one_line_without_a_traceback(world, trained, tmp_path):
    """Missing files, empty data, an unknown stage or one without its start, a bad insertion."""
    (tmp_path / "empty.jsonl").write_text("")
    cases = [
        (["--stage", "nope"], "no stage 'nope'"),
        (["--set", "llm=/nowhere"], "/nowhere/config.json: no such file"),
        (["--set", f'stage.data=["{tmp_path}/empty.jsonl"]'], "empty.jsonl"),
        (["--stage", "instruct"], "starts from stage 'pretrain_projector'"),
        (["--set", "insertion=99"], "insertion = 99"),
        (["--set", f"vision={world}/llama"], "the vision tower a Llama"),
    ]
    for number, (arguments, message) in enumerate(cases):
        result = run(world, "--set", f"out={tmp_path}/{number}", *arguments)
        assert result.returncode == 1 and message in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr and result.stderr.strip().count("\n") == 0


def test_boxes_on_cropped_pictures_are_refused(world, tmp_path):
    """A row that names a box stops the run where the tower crops: one line, out of a worker too."""
    shutil.copytree(world / "clip", tmp_path / "clip")
    settings = json.loads((tmp_path / "clip" / "config.json").read_text())
    settings["config"]["aspect"] = "crop"
    (tmp_path / "clip" / "config.json").write_text(json.dumps(settings))
    rows = (world / "rows.jsonl").read_text().replace("dog", "[0.1, 0.2, 0.3, 0.4]", 1)
    (tmp_path / "rows.jsonl").write_text(rows)
    result = run(world, "--set", f"out={tmp_path}/run", "--set", f"vision={tmp_path}/clip",
                 "--set", "workers=1", "--set", f'stage.data=["{tmp_path}/rows.jsonl"]')
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "rows.jsonl:1: names a box" in result.stderr


def test_two_runs_in_one_folder(world, trained):
    """The second says who has the folder, and touches nothing."""
    with lock(world / "run"):
        result = run(world)
    assert result.returncode == 1 and "is in use by another run" in result.stderr


def test_changed_settings_do_not_resume(world, trained):
    """A checkpoint made with another learning rate is refused by name, not mixed in."""
    arguments = ["--set", f"out={world}/changed", "--stage", "pretrain_projector"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(world / "config.toml"),
               *arguments, "--set", "stage.steps=2000", "--set", "stage.save_every=1"]
    process = subprocess.Popen(  # a background job ignores Ctrl-C and hands that down: undo it
        command, stdout=subprocess.DEVNULL, env=ONE_THREAD,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 60
    folder = world / "changed" / "pretrain_projector"
    while not list(folder.glob("step-*/state.json")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait()
    result = run(world, *arguments, "--set", "stage.steps=2000", "--set", "stage.lr=2e-3")
    assert result.returncode == 1 and "was made with another lr" in result.stderr
    result = run(world, *arguments, "--set", "stage.steps=2000", "--set", "seed=7")
    assert result.returncode == 1 and "was made with another seed" in result.stderr


def test_a_stage_starts_from_none_but_its_own_kind(world, trained, tmp_path):
    """The adaptor of another base, or with layers at other places, is refused."""
    shutil.copytree(world / "run" / "instruct", tmp_path / "run" / "instruct")
    path = tmp_path / "run" / "instruct" / "adaptor" / "config.json"
    kept = json.loads(path.read_text())
    for change, said in (({"base": {"llama": "00"}}, "another LLM"),
                         ({"adaptor": kept["adaptor"] | {"structure": "a"}}, "has structure a")):
        path.write_text(json.dumps(kept | change))
        result = run(world, "--set", f"out={tmp_path}/run", "--stage", "grounding")
        assert result.returncode == 1 and said in result.stderr, result.stderr


def test_broken_rows_are_skipped_counted_and_named(world, tmp_path):
    """A broken picture and a row without an answer do not stop training."""
    rows = (world / "rows.jsonl").read_text().splitlines()
    (world / "broken.png").write_bytes((world / "0.png").read_bytes()[:100])
    rows[0] = rows[0].replace("0.png", "broken.png")
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:6], "{not json"]) + "\n")
    result = run(world, "--stage", "pretrain_projector", "--set", f"out={tmp_path}/run",
                 "--set", f'stage.data=["{tmp_path}/rows.jsonl"]')
    assert result.returncode == 0, result.stderr
    assert "broken.png" in result.stderr and "rows.jsonl:7" in result.stderr


def test_llava_baseline_trains_its_own_llm(world, tmp_path):
    """N = 0 with a trained copy of the LLM: the frozen one stays as it is."""
    result = run(world, "--set", f"out={tmp_path}/run", "--set", "insertion=0",
                 "--set", "own_llm=true", "--set", "own_embedding=false",
                 "--set", "own_head=false", "--set", "stage.steps=2")
    assert result.returncode == 0, result.stderr
    trained = tensors(tmp_path, "run", "grounding")
    frozen = load_file(next((world / "llama").glob("*.safetensors")))
    name = "layers.0.ffn.down.weight"
    assert not torch.equal(trained[f"llm.{name}"], frozen[name])
