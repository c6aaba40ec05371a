"""bench.py and peers.py: counts against literals, un-fusing, a whole run on a tiny model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip import Clip, ClipConfig
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig
from speed import bench
from speed.peers import TransformersIAA, transformers_llama
from training.log import count
from training.plan import frozen_config

TINY = LlamaConfig(11, 6, 2, 3, 1, 2, 5, 512)  # D 6, 2 layers, H 3, K 1, E 2, F 5, V 11
TOWER = ClipConfig(20, 2, 4, 28, 4, 8)


def tiny_model() -> IAA:
    """With an insertion layer after each frozen one, all weights random."""
    model = IAA(Llama(TINY), Clip(TOWER), 10)
    model.adaptors["mm"] = Adaptor(AdaptorConfig((0, 1)), TINY, TOWER.width)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.adaptors["mm"].init_from_frozen(model.llama)
    return model


@pytest.mark.parametrize(("workflow", "layers"), [("text", 2), ("mm", 4)])
def test_what_an_answer_needs(workflow, layers, monkeypatch):
    """By hand: a layer's matrices hold 186 weights, its norms 12; a prompt of 7 tokens."""
    monkeypatch.setattr(bench, "NEW", 26)
    flops, read = bench.answer_needs(tiny_model().to("meta"), workflow, 7, 1)  # int8, cache in fp32
    assert flops == layers * (2 * 7 * 186 + 4 * 7 * 7 * 3 * 2) + 2 * 6 * 11
    cache = layers * 2 * 1 * 2 * 20  # at the middle of the answer
    assert read == layers * (186 + 12) + 6 * 11 + 4 * cache


def test_a_whole_run_on_a_tiny_model(tmp_path, write_base, capsys, monkeypatch):
    """Every figure of every variant of ours has a row with its rate and share; sizes by name."""
    # without peers, which take minutes to import and to build
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(bench, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench, "frozen_config",
                        lambda name, kind: TOWER if kind == "clip" else frozen_config(name, kind))
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "TURNS", 3)
    llama = Llama(LlamaConfig(61, 24, 3, 6, 2, 10, 26, 512, rope_theta=100.0))
    write_base(tmp_path / "llm", llama)
    bench.main(["--llm", str(tmp_path / "llm"), "--vision", "no/such/ViT-L", "--inserted", "2",
                "--dtype", "fp32"])
    limits, missing, *rows = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" in limits and missing == "transformers is not installed: its rows are left out"
    answers = ("ours", "ours, 2 inserted", "ours, picture", "ours, int8")
    expected = [("training", "ours, 0 inserted"), ("training", "ours, 2 inserted"), *(
        (figure, name) for name in answers for figure in ("prefill", "decode"))]
    assert len(rows) == len(expected)
    for row, (figure, name) in zip(rows, expected, strict=True):
        assert row.startswith(f"{figure:9} {name:18}")
        assert " tokens/s  2 turns" in row and "% of limit" in row


@pytest.mark.parametrize(("allowed_s", "rows"), [
    (0, "4.0 tokens/s  1 turns   25% of limit  5.00 times as fast as transformers (0.8)"),
    (9, "8.0 tokens/s  2 turns   50% of limit  3.00 times as fast as transformers (2.7)")])
def test_measuring(allowed_s, rows, capsys, monkeypatch):
    """The first turn warms up, and counts only where no time is left for another."""
    monkeypatch.setattr(bench, "SECONDS", allowed_s)
    monkeypatch.setattr(bench, "TURNS", 3)
    ours, theirs = iter([2.0, 1.0, 1.0]), iter([10.0, 4.0, 2.0])
    bench.measure({"decode": 8}, "ours", lambda: (next(ours),), lambda: (next(theirs),),
                  {"decode": (8, 4)})
    assert capsys.readouterr().out.split(maxsplit=2) == ["decode", "ours", rows + "\n"]


def test_peers_do_the_same_work():
    """Where transformers is installed: as many weights and FLOPs as ours; all is trained."""
    pytest.importorskip("transformers", reason="needs requirements/dev.txt")
    model, tokens = tiny_model(), torch.zeros(1, 7, dtype=torch.int64, device="meta")
    batch = bench.make_batch(model, 2, 20, 5)
    theirs = TransformersIAA(model, "mm")
    trained, expected = ([w for w in m.parameters() if w.requires_grad] for m in (theirs, model))
    assert count(trained) == count(expected)
    theirs.loss(batch.tokens, batch.targets, "mm", batch.images).backward()
    assert all(weight.grad is not None for weight in trained)
    ours = model.to("meta").llama
    peer = transformers_llama(ours)
    assert count(peer.parameters()) == count(ours.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer(tokens, logits_to_keep=1)
    assert counter.get_total_flops() == bench.answer_needs(model, "text", 7, 1)[0]
