"""bench.py and bench_peer.py: counts against literals, un-fusing, a whole run on a tiny model."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from speed import bench
from speed import bench_cases
from speed import costs
from speed.bench_peer import Peer, peer_llama, unfused
from clip import Clip, ClipConfig
from llama import Llama, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = LlamaConfig(11, 6, 2, 3, 1, 2, 5, 512)  # D 6, 2 layers, H 3, K 1, E 2, F 5, V 11


def test_counts_of_a_tiny_model():
    """By hand: a layer's matrices hold 6 x 10 + 6 x 6 + 3 x 6 x 5 = 186 weights."""
    assert costs.layer_weights(TINY) == 6 * (3 + 1 + 1) * 2 + 6 * 6 + 3 * 6 * 5 == 186
    layer = Llama(TINY).layers[0]
    assert sum(p.numel() for p in layer.parameters()) == 186 + 2 * 6
    matrices, attention, head = 2 * 7 * 2 * 186, 7 * 7 * 2 * 6 * 2, 2 * 6 * 11
    assert costs.forward_flops(TINY, 2, 1, 7, 1) == matrices + attention + head == 6516
    trained = 2 * 7 * 1 * 186 + 3 * head  # gradients: an insertion layer's, 3 rows of the head
    forward = 2 * 7 * 3 * 186 + 7 * 7 * 3 * 6 * 2 + 3 * head
    assert costs.training_flops(TINY, 1, 1, 7, 3) == 2 * forward + 7 * 7 * 3 * 6 * 2 + trained
    weights = 2 * (186 + 12) + 6 + 6 * 11  # layers with their norms, the last norm, the head
    cache = 2 * 2 * 1 * 2 * 20
    assert costs.decode_bytes(TINY, 2, 20, 2) == 2 * (weights + cache) == 1256
    assert costs.decode_bytes(TINY, 2, 20, 1, 16, 2) == weights + 2 * 16 * cache  # int8, 16 rows


def test_unfused_weights_are_the_fused_ones():
    """Joined again, q, k, v and gate, up are our matrices; transformers' names come once each."""
    state = Llama(TINY).state_dict()
    theirs = unfused(state, TINY)
    assert len(theirs) == 3 + 2 * 9
    joined = torch.cat([theirs[f"model.layers.1.self_attn.{c}_proj.weight"] for c in "qkv"])
    assert torch.equal(joined, state["layers.1.attention.qkv.weight"])
    joined = torch.cat([theirs[f"model.layers.1.mlp.{c}_proj.weight"] for c in ("gate", "up")])
    assert torch.equal(joined, state["layers.1.ffn.gate_up.weight"])


@pytest.fixture
def bases(tmp_path, write_base) -> list[str]:
    """--llm and --vision of a tiny random model."""
    write_base(tmp_path / "llm", Llama(LlamaConfig(61, 24, 3, 6, 2, 10, 26, 512, rope_theta=100.0)))
    write_base(tmp_path / "vision", Clip(ClipConfig(20, 2, 4, 28, 4, 8)))
    return ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]


def test_a_whole_run_on_a_tiny_model(bases, tmp_path, capsys, monkeypatch):
    """Every kind and variant of ours gets a rate and a share; table and JSON are written."""
    limits = {"matrix product, TFLOP/s": 1.0, "memory, GB/s": 1.0}
    monkeypatch.setattr(bench, "measure_limits", lambda *_: limits)
    # without peers, which take minutes
    monkeypatch.setattr(bench_cases.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(bench_cases, "set_memory_use", lambda: None)
    monkeypatch.setattr(bench_cases, "NEW", 8)
    path = tmp_path / "bench.json"
    bench.main([*bases, "--runs", "1", "--inserted", "2", "--dtype", "fp32",
                "--no-memory", "--threads", "1", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    ours = ["ours", "ours, 2 inserted"]
    assert [(row["what"], row["model"]) for row in rows] == [
        ("prefill", ours[0]), ("prefill", ours[1]), ("decode", ours[0]), ("decode", ours[1]),
        ("decode", "ours, fp32"), ("decode", "ours, int8"),
        ("batch", "1 row"), ("batch", "16 rows"),
        ("mixed", "3 workflows apart"), ("mixed", "in one batch"),
        ("length", "400 tokens"), ("length", "503 tokens"),  # of a context of 512, 8 are new
        ("answer", ours[0]), ("answer", ours[1]), ("training", ours[0]), ("training", ours[1])]
    ratios = {row["model"]: row["times_as_fast"] for row in rows if row["against"]}
    assert ratios.keys() == {"ours, int8", "16 rows", "in one batch", "503 tokens", ours[1]}
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert all((row["share_of_limit"] > 0) == (row["what"] != "mixed") for row in rows)
    assert "| decode | ours, 2 inserted |" in capsys.readouterr().out


def test_least_seconds_are_the_counts(bases):
    """Weights by their form, the cache never below the run's dtype, 64 steps at mid-answer."""
    options = ["--dtype", "bf16", "--inserted", "2", "--device", "cpu"]
    run = bench.Bench(bench.arguments([*bases, *options]))
    c, limits = run.config, {"matrix product, TFLOP/s": 1e-12, "memory, GB/s": 1e-9}

    def least(kind, name):
        return pytest.approx(run.least_seconds(kind, name, limits))

    weights, cache = costs.decode_bytes(c, 3, 0, 1), 2 * 3 * 2 * 10 * (320 + 32)  # L 3, K 2, E 10
    assert 64 * (2 * weights + 2 * cache) == least("decode", "ours")
    assert 64 * (4 * weights + 4 * cache) == least("decode", "ours, fp32")
    assert 64 * (weights + 2 * cache) == least("decode", "ours, int8")
    assert 64 * (2 * weights + 2 * 16 * cache) == least("batch", "16 rows")
    assert costs.forward_flops(c, 5, 1, 320, 1) == least("prefill", "ours, 2 inserted")
    assert costs.training_flops(c, 0, 8, 342, 160) == least("training", "ours")
    assert run.least_seconds("mixed", "in one batch", limits) == 0


def test_peer_computes_the_same(bases):
    """Where transformers is installed: the peer's logits and training loss equal ours."""
    pytest.importorskip("transformers", reason="needs requirements-dev.txt")
    options = ["--dtype", "fp32", "--inserted", "2", "--device", "cpu"]
    run = bench.Bench(bench.arguments([*bases, *options]))
    peer = peer_llama(run.model.llama)
    tokens = run.random_tokens(1, 40)
    with torch.no_grad():
        ours = run.model.logits(run.model(tokens))
        torch.testing.assert_close(peer(tokens).logits, ours, atol=1e-4, rtol=0)
    adaptor = run.adaptor(2)
    run.model.adaptors["mm"] = adaptor
    theirs = Peer(peer, run.model.clip, adaptor, run.model.image_token)
    b = run.batch
    wanted, got = (model.loss(b.tokens, b.targets, "mm", b.images) for model in (run.model, theirs))
    torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's counters")
def test_peak_memory_sees_what_is_allocated():
    """A tensor of 64 MB that lives for a moment shows, each time in a process of its own."""
    def peak(work: str) -> int:
        code = f"import bench, torch; print(bench.peak_memory(lambda: {work}, 'cpu'))"
        return int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))

    assert 40e6 < peak("torch.ones(2**24).sum()") - peak("None") < 150e6


def test_profile_names_what_takes_the_time(bases, capsys):
    """Large products are "matrices", a softmax "attention", a wait "Python"."""
    matrix = torch.randn(500, 500)
    products = bench.profile(lambda: [matrix @ matrix for _ in range(9)], "cpu")
    assert max(products, key=products.get) == "matrices"
    softmax = bench.profile(lambda: [matrix.softmax(-1) for _ in range(99)], "cpu")
    assert softmax["attention"] > softmax["matrices"] == 0
    assert bench.profile(lambda: time.sleep(0.05), "cpu")["Python"] > 0.9
    bench.main([*bases, "--profile", "--only", "prefill", "--device", "cpu"])
    assert "| prefill | ours, 3 inserted |" in capsys.readouterr().out


def test_flops_of_8b_literal():
    """2 x 6.98e9 weights x 640 tokens, attention and head: 9.0 TFLOP; 8 layers more: 1.250."""
    assert "9.0, IAA-8 11.3 (1.250 times), IAA-14" in costs.flops_of_8b()
