"""bench.py and peers.py: counts against literals, un-fusing, a whole run on a tiny model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clip import Clip, ClipConfig
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig
from speed import bench
from speed.peers import TransformersIAA, split_weights, transformers_llama

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
    """FLOPs as torch counts them; bytes by hand: a layer's matrices hold 186 weights."""
    monkeypatch.setattr(bench, "NEW", 26)
    flops, read = bench.answer_needs(TINY, layers, 7, 1, 4)  # int8, a cache in fp32
    model = tiny_model().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = model(torch.zeros(1, 7, dtype=torch.int64, device="meta"), workflow)
        model.logits(x[:, -1], workflow)
    assert flops == counter.get_total_flops()
    cache = layers * 2 * 1 * 2 * 20  # at the middle of the answer
    assert read == layers * (6 * 10 + 6 * 6 + 3 * 6 * 5) + 6 * 11 + 4 * cache


def test_split_weights_are_the_fused_ones():
    """Joined again, q, k, v and gate, up are our matrices; transformers' names come once each."""
    state = Llama(TINY).state_dict()
    theirs = split_weights(state, TINY)
    assert len(theirs) == 3 + 2 * 9
    joined = torch.cat([theirs[f"model.layers.1.self_attn.{c}_proj.weight"] for c in "qkv"])
    assert torch.equal(joined, state["layers.1.attention.qkv.weight"])
    joined = torch.cat([theirs[f"model.layers.1.mlp.{c}_proj.weight"] for c in ("gate", "up")])
    assert torch.equal(joined, state["layers.1.ffn.gate_up.weight"])


def test_a_whole_run_on_a_tiny_model(tmp_path, write_base, capsys, monkeypatch):
    """Every figure of every variant of ours has a row with its rate and share; sizes by name."""
    # without peers, which take minutes to import and to build
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(bench, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench, "frozen_config", lambda name, kind: TOWER)
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


def test_peers_compute_the_same():
    """Where transformers is installed: the peers' logits and training loss equal ours."""
    pytest.importorskip("transformers", reason="needs requirements/dev.txt")
    model, tokens = tiny_model(), torch.arange(10)[None]
    with torch.no_grad():
        ours = model.logits(model(tokens))
        theirs = transformers_llama(model.llama)(tokens).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    b = bench.make_batch(model, 2, 20, 5)
    wanted, got = (m.loss(b.tokens, b.targets, "mm", b.images)
                   for m in (model, TransformersIAA(model, "mm")))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
