"""bench.py and peers.py: counts against literals, un-fusing, a whole run on a tiny model."""

import pytest
import torch

from clip import Clip, ClipConfig
from llama import Llama, LlamaConfig
from speed import bench
from speed.peers import TransformersIAA, split_weights, transformers_llama

TINY = LlamaConfig(11, 6, 2, 3, 1, 2, 5, 512)  # D 6, 2 layers, H 3, K 1, E 2, F 5, V 11
TOWER = ClipConfig(20, 2, 4, 28, 4, 8)


def test_counts_of_a_tiny_model():
    """By hand: a layer's matrices hold 6 x 10 + 6 x 6 + 3 x 6 x 5 = 186 weights."""
    model = bench.meta_model(TINY, TOWER, 1)
    attention, head = 4 * 7 * 7 * 3 * 2, 2 * 6 * 11  # 7 x 7 pairs, H E = 6, masked ones too
    assert bench.forward_flops(model, "text", 7) == 2 * (2 * 7 * 186 + attention) + head == 7692
    assert bench.forward_flops(model, "mm", 7) == 3 * (2 * 7 * 186 + attention) + head
    assert bench.forward_flops(model, "mm", 7, pictures=1) > bench.forward_flops(model, "mm", 7)
    weights, cache = 2 * (186 + 12) + 6 * 11, 2 * 2 * 1 * 2 * 20  # with two norms a layer
    assert bench.decode_bytes(model, "text", 20, 2, 2) == 2 * (weights + cache) == 1244
    assert bench.decode_bytes(model, "text", 20, 1, 4) == weights + 4 * cache  # int8, cache in fp32
    assert bench.decode_bytes(model, "mm", 0, 1, 1) == weights + 186 + 12


def test_split_weights_are_the_fused_ones():
    """Joined again, q, k, v and gate, up are our matrices; transformers' names come once each."""
    state = Llama(TINY).state_dict()
    theirs = split_weights(state, TINY)
    assert len(theirs) == 3 + 2 * 9
    joined = torch.cat([theirs[f"model.layers.1.self_attn.{c}_proj.weight"] for c in "qkv"])
    assert torch.equal(joined, state["layers.1.attention.qkv.weight"])
    joined = torch.cat([theirs[f"model.layers.1.mlp.{c}_proj.weight"] for c in ("gate", "up")])
    assert torch.equal(joined, state["layers.1.ffn.gate_up.weight"])


@pytest.fixture
def bases(tmp_path, write_base) -> list[str]:
    """--llm and --vision of a tiny random model."""
    write_base(tmp_path / "llm", Llama(LlamaConfig(61, 24, 3, 6, 2, 10, 26, 512, rope_theta=100.0)))
    write_base(tmp_path / "vision", Clip(TOWER))
    return ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]


def test_a_whole_run_on_a_tiny_model(bases, capsys, monkeypatch):
    """Every figure of every variant of ours has a rate, a share and a ratio."""
    # without peers, which take minutes to import and to build
    monkeypatch.setattr(bench, "installed", lambda _: False)
    monkeypatch.setattr(bench, "measure_limits", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(bench, "NEW", 4)
    bench.main([*bases, "--runs", "2", "--inserted", "2", "--dtype", "bf16", "--device", "cpu"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    variants = ["ours ", "ours, 2 inserted ", "ours, 2 inserted, picture", "ours, int8",
                "ours, fp32"]
    expected = [(figure, name) for figure in ("prefill", "decode") for name in variants]
    expected += [("training", "ours, 2 inserted"), ("training", "ours, 0 inserted")]
    assert len(rows) == len(expected)
    for row, (figure, name) in zip(rows, expected, strict=True):
        assert row.startswith(f"{figure:9} {name}") and "% of limit" in row and "(2 turns)" in row
    assert "1.00 times ours " in rows[0]


def test_a_slow_machine_counts_the_first_turn(capsys):
    """Where no second turn fits the budget, the first is the figure."""
    calls = []
    cases = {"ours": bench.Case(lambda: calls.append(1) or (2.0,), {"training": (8, 1.0)})}
    bench.measure(cases, budget=0.0, most=5)
    out = capsys.readouterr().out
    assert len(calls) == 1 and "4.0 tokens/s" in out and "50% of limit" in out and "1 turns" in out


def test_sizes_by_name(monkeypatch):
    """A size in place of a folder has random weights in the dtype."""
    monkeypatch.setattr(bench, "frozen_config", lambda name, kind: TINY)
    model = bench.frozen("llama", "no/such/3-8B", torch.bfloat16, torch.device("cpu"))
    assert model.dtype == torch.bfloat16 and model.config == TINY


def test_peers_compute_the_same():
    """Where transformers is installed: the peers' logits and training loss equal ours."""
    pytest.importorskip("transformers", reason="needs requirements/dev.txt")
    model = bench.meta_model(TINY, TOWER, 2).to_empty(device="cpu")
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.adaptors["mm"].init_from_frozen(model.llama)
    model.image_token = 10
    peer, tokens = transformers_llama(model.llama), torch.arange(10)[None]
    with torch.no_grad():
        ours = model.logits(model(tokens))
        torch.testing.assert_close(peer(tokens).logits, ours, atol=1e-4, rtol=0)
    theirs = TransformersIAA(peer, model.clip, model.adaptors["mm"], model.image_token)
    b = bench.make_batch(model, 2, 20, 5, 0)
    wanted, got = (m.loss(b.tokens, b.targets, "mm", b.images) for m in (model, theirs))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)
