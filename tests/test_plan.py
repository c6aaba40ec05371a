"""training/plan.py against what autograd keeps, what the allocator gave, and torch's own FLOPs."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import clip
import llama
from clip import Clip, ClipConfig
from common.device import DTYPES, Ranks
from data import UNSCORED, Batch
from iaa import IAA, Adaptor
from llama import DecoderLayer, Llama, LlamaConfig, set_recompute
from train import Loss, make_optimizer, train_step
from training import plan as planned
from training.config import Config, StageConfig, adaptor_config, read_config
from training.log import Row, average_row, meta_model, stage_flops, step_flops
from training.plan import frozen_config, memory_and_traffic
from training.zero import build_state

CONFIGS = Path(__file__).parent.parent / "configs"
LLAMA = LlamaConfig(1000, 64, 6, 4, 2, 16, 192, 512)
CLIP = ClipConfig(32, 3, 2, 64, 4, 16, feature_norm=True)  # 16 patches
ROW = Row(60, 20)
OWN_LLM = {"insertion": 0, "own_llm": True, "own_embedding": False, "own_head": False}


def on_meta(config: Config, stage: StageConfig) -> IAA:
    """The stage's model on the meta device, from its folders."""
    sizes = LlamaConfig.read(config.llm)[0], ClipConfig.read(config.vision)[0]
    return meta_model(config, stage, *sizes)


@pytest.fixture(scope="module")
def base(tmp_path_factory, write_base) -> Path:
    """The frozen models' folders."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder / "llama", Llama(LLAMA))
    write_base(folder / "clip", Clip(CLIP))
    return folder


def run_of(base: Path, **settings) -> tuple[Config, StageConfig]:
    """A run on the small models, and its stage."""
    own = {"batch": 4, "micro_batch": 4, "zero": 0, "trains": "adaptor"}
    own |= {key: settings.pop(key) for key in own.keys() & settings.keys()}
    stage = StageConfig("s", ["none"], steps=9, **own)
    settings = {"insertion": 2, "dtype": "fp32"} | settings
    return Config("none", f"{base}/llama", f"{base}/clip", "none", [stage], **settings), stage


def make_model(base: Path, config: Config, stage: StageConfig) -> IAA:
    """The stage's model, as train.py makes it."""
    dtype = DTYPES[config.dtype]
    model = IAA(Llama.load(config.llm, dtype), Clip.load(config.vision, dtype), 999)
    settings = adaptor_config(config, stage, LLAMA.layers)
    model.adaptors["mm"] = Adaptor(settings, LLAMA, CLIP.width)
    model.adaptors["mm"].init_from_frozen(model.llama)
    set_recompute(model, config.recompute)
    return model


def make_batch(rows: int) -> Batch:
    """Rows of ROW.tokens, a picture each, of which ROW.scored are scored."""
    tokens = torch.randint(0, 900, (rows, ROW.tokens))
    tokens[:, 1:17] = 999
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, -ROW.scored :] = tokens[:, -ROW.scored :]
    images = torch.randn(rows, 3, CLIP.image_px, CLIP.image_px)
    return Batch(tokens, targets, images, None, None, torch.full((rows,), ROW.tokens), [])


def kept(work) -> dict[int, int]:
    """Bytes of every storage that autograd keeps while `work` runs, by address."""
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(work())
    return found


def addresses(tensors) -> set[int]:
    """Of their storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_keeps_what_the_formula_says(dtype, trained):
    """Within 15 %, but for the layer's own weights and the rotary tables, which layers share."""
    layer = DecoderLayer(LLAMA).to(dtype).requires_grad_(trained)
    x = torch.randn(3, 50, 64, dtype=dtype, requires_grad=True) * 1
    rope = Llama(LLAMA).rope(torch.arange(50)[None], dtype)
    found = kept(lambda: layer(x, rope))
    shared = addresses([*layer.parameters(), *rope])
    size = sum(size for address, size in found.items() if address not in shared)
    formula = planned.layer_activations(LLAMA, dtype.itemsize, trained)
    assert size / 150 == pytest.approx(formula, rel=0.15)


def peak(base: Path, settings: dict) -> int:
    """Bytes at the fullest moment of a step of one process, by the allocator's count."""
    def traced():
        return profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def events(profiler) -> list[int]:
        found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return [e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]

    config, stage = run_of(base, **settings)
    batches = [make_batch(stage.micro_batch) for _ in range(stage.batch // stage.micro_batch)]
    ranks = Ranks(60)
    with traced() as before:
        model = make_model(base, config, stage)
        state = build_state(Loss(model, "mm", ranks.device), model, "mm", 0, 1, ranks.device)
        optimizer = make_optimizer(state.masters, stage)
        train_step(state, batches, optimizer, stage, 1, ranks)  # makes the moments
    with traced() as during:
        train_step(state, batches, optimizer, stage, 2, ranks)
    held, most = sum(events(before)), 0
    for size in events(during):
        held += size
        most = max(most, held)
    return most


@pytest.mark.parametrize("settings", [
    {}, {"dtype": "bf16"}, {"dtype": "bf16", "recompute": True}, {"structure": "a"},
    {"trains": "projector"}, OWN_LLM], ids=str)
def test_memory_of_a_step_is_as_planned(base, settings):
    """With two micro-batches the fullest moment of a step within 15 %; with one, never more."""
    for batch in (8, 4):
        config, stage = run_of(base, **settings, batch=batch)
        held, sent = memory_and_traffic(on_meta(config, stage), config, stage, ROW, 1)
        measured, size = peak(base, settings | {"batch": batch}), sum(held.values())
        assert sent == 0
        assert 0.87 * size < measured < 1.15 * size if batch == 8 else measured < 1.15 * size


@pytest.mark.parametrize("settings", [
    {}, {"trains": "projector"}, {"recompute": True}, {"structure": "b"}, OWN_LLM], ids=str)
def test_flops_are_those_of_the_products(base, settings):
    """Against torch's own count of a text-only pass, within 1 %, by the products it can see."""
    config, stage = run_of(base, **settings)
    model = make_model(base, config, stage)
    batch = make_batch(4)
    tokens = batch.tokens.clamp(max=900)  # no placeholder
    embedding = model.adaptors["mm"].embedding or model.llama.embedding
    if not settings.get("own_llm"):
        embedding.requires_grad_(True)  # so that gradients flow through all layers, as of a picture
    with FlopCounterMode(display=False) as counter:
        model.loss(tokens, batch.targets, "mm").backward()
    count = step_flops(model, "mm", 4, ROW.tokens, 4 * ROW.scored, config.recompute)
    # torch's count leaves out attention on a CPU, which is what the formula has for it.
    layers = LLAMA.layers + len(model.adaptors["mm"].layers)
    times = 18 if config.recompute else 14
    attention = times * 4 * ROW.tokens**2 * layers * LLAMA.heads * LLAMA.head_size
    assert counter.get_total_flops() == pytest.approx(count - attention, rel=0.01)


def test_attention_is_counted_as_torch_counts_it():
    """4 H E a pair of tokens forward and 10 backward, as for torch's fused kernels."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    shape = (2, 4, 50, 16)
    pairs = 2 * 4 * 16 * 50**2
    assert sdpa_flop_count(shape, shape, shape) == 4 * pairs
    assert sdpa_backward_flop_count(shape, shape, shape, shape) == 10 * pairs


def test_the_papers_run_is_planned_in_seconds(monkeypatch, tmp_path, capsys):
    """IAA-8 on Llama 3 8B and CLIP ViT-L/14-336: known numbers of weights, no weights, no data."""
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    planned.main(["--config", str(CONFIGS / "iaa8.toml")])
    assert time.process_time() - start < 10
    shown = capsys.readouterr().out
    projector = (1024 + 1) * 4096 + (4096 + 1) * 4096
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    vocab = 128256 * 4096
    trained = projector + 8 * layer + 2 * vocab + 4096
    assert f"stage pretrain_projector: trains {projector:,} weights" in shown
    for name in ("pretrain_adaptor", "instruct", "grounding"):
        assert f"stage {name}: trains {trained:,} weights" in shown
    assert f"frozen LLM {32 * layer + 2 * vocab + 4096:,}," in shown  # 8,030,261,248
    assert "ZeRO-2*" in shown and "ZeRO-3*" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [
    *sorted(CONFIGS.glob("iaa*.toml")), *sorted((CONFIGS / "ablations").glob("*.toml"))],
    ids=lambda path: path.stem)
def test_every_recipe_is_planned(path, monkeypatch, tmp_path, capsys):
    """Without weights or data: each of its stages, and the hours."""
    monkeypatch.chdir(tmp_path)
    planned.main(["--config", str(path), "--world", "4"])
    shown = capsys.readouterr().out
    assert [line.split()[1].rstrip(":") for line in shown.splitlines()
            if line.startswith("stage ")] == [s.name for s in read_config(str(path), []).stage]
    assert "hours at 4 x 312 TFLOP/s" in shown.splitlines()[-1]


def test_hours_are_those_of_the_rank_that_has_most(base, capsys):
    """4 micro-batches of a step take 3 ranks as long as 2 ranks, and 64 as long as 4."""
    config, _ = run_of(base, batch=16)
    hours = {}
    for world in (1, 2, 3, 4, 64):
        last = planned.plan(config, world, 80, 1e-9, 1.0, None).splitlines()[-1]
        hours[world] = float(last.split()[0].replace(",", ""))
    assert [hours[1] / hours[n] for n in (2, 3, 4, 64)] == pytest.approx([2, 2, 4, 4], rel=1e-3)


def test_frozen_sizes_come_from_the_folder_or_its_name(base):
    """A folder's own config first, else the longest size that the path ends with, else an error."""
    assert frozen_config(f"{base}/clip", "clip") == CLIP
    assert frozen_config("weights/llama3.1-8b", "llama") is llama.SIZES["3.1-8B"]
    assert frozen_config("weights/ViT-L/14", "clip") is clip.SIZES["ViT-L/14"]
    with pytest.raises(ValueError, match="weights/nothing: no such folder; .*--set llm=NAME"):
        frozen_config("weights/nothing", "llama")
    with pytest.raises(ValueError, match="kind 'clip', not 'llama'"):
        frozen_config(f"{base}/clip", "llama")


def test_rows_are_measured_where_the_data_is(tiny_base, tmp_path):
    """Mean tokens of the rows on disk; `text` instead where given; 100 where neither is there."""
    tiny_base(tmp_path)
    config, stage = run_of(tmp_path)
    stage = replace(stage, data=[str(tmp_path / "rows.jsonl")], template="plain")
    model = on_meta(config, stage)
    patches = model.clip.config.patches
    assert average_row(config, stage, model) == Row(patches + 100, 50)
    row = {"id": "1", "image": "1.png", "workflow": "mm", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    rows = [json.dumps(row), "broken", json.dumps(row).replace("cat", "crocodile")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    found = average_row(config, stage, model)
    assert found.source == "mean of 2 rows of the data"
    assert patches + len("A cat.") <= found.tokens <= patches + len("A crocodile.") + 4
    assert len("A cat.") <= found.scored <= len("A crocodile.") + 2
    cut = replace(config, max_tokens=patches + 2)
    assert average_row(cut, stage, model).tokens == patches + 2  # as in training
    assert average_row(config, stage, model, 30) == Row(patches + 30, 15)
    step = step_flops(model, "mm", stage.batch, found.tokens, stage.batch * found.scored)
    assert stage_flops(config, stage) == stage.steps * step
