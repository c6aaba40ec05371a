"""bench.py: medians, equal work of the peers, a whole run on a tiny model."""

import pytest
import torch
from conftest import CLIP, LLAMA, write_base
from torch.utils.flop_counter import FlopCounterMode

from clip import Clip
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig
from speed import bench
from speed.bench import TransformersIAA, transformers_llama
from training.log import count


def test_a_whole_run_on_a_tiny_model(tmp_path, capsys, monkeypatch):
    """Every figure of every variant of ours has a row with its rate; sizes by name."""
    # without peers, which take minutes to import and to build
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(bench, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(bench, "frozen_config", lambda name, kind: CLIP)
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "TURNS", 3)
    llama = Llama(LlamaConfig(61, 24, 3, 6, 2, 10, 26, 512, rope_theta=100.0))
    write_base(tmp_path / "llm", llama)
    bench.main(["--llm", str(tmp_path / "llm"), "--vision", "no/such/ViT-L", "--inserted", "2",
                "--dtype", "fp32"])
    missing, *rows = capsys.readouterr().out.splitlines()
    assert missing == "transformers is not installed: its rows are left out"
    answers = ("ours", "ours, 2 inserted", "ours, picture", "ours, int8")
    expected = [("training", "ours, 0 inserted"), ("training", "ours, 2 inserted"), *(
        (figure, name) for name in answers for figure in ("prefill", "decode"))]
    assert len(rows) == len(expected)
    for row, (figure, name) in zip(rows, expected, strict=True):
        assert row.startswith(f"{figure:9} {name:18}") and " tokens/s  2 turns" in row
        assert ("times as fast as ours (" in row) == (name == "ours, int8")


@pytest.mark.parametrize(("allowed_s", "rows"), [
    (0, "4.0 tokens/s  1 turns  5.00 times as fast as transformers (0.8)"),
    (9, "8.0 tokens/s  2 turns  3.00 times as fast as transformers (2.7)")])
def test_measuring(allowed_s, rows, capsys, monkeypatch):
    """The first turn warms up, and counts only where no time is left for another."""
    monkeypatch.setattr(bench, "SECONDS", allowed_s)
    monkeypatch.setattr(bench, "TURNS", 3)
    ours, theirs = iter([2.0, 1.0, 1.0]), iter([10.0, 4.0, 2.0])
    bench.measure("ours", lambda: (next(ours),), ("transformers", lambda: (next(theirs),)),
                  {"decode": 8})
    assert capsys.readouterr().out.split(maxsplit=2) == ["decode", "ours", rows + "\n"]


def test_peers_do_the_same_work():
    """Where transformers is installed: as many weights and FLOPs as ours; all is trained."""
    pytest.importorskip("transformers", reason="needs requirements/dev.txt")
    model, tokens = IAA(Llama(LLAMA), Clip(CLIP), 10), torch.zeros(1, 7, dtype=int, device="meta")
    model.adaptors["mm"] = Adaptor(AdaptorConfig((0, 1)), LLAMA, CLIP.width)
    model.adaptors["mm"].init_from_frozen(model.llama)
    batch = bench.make_batch(model, 2, 20, 5)
    theirs = TransformersIAA(model, "mm")
    trained, expected = ([w for w in m.parameters() if w.requires_grad] for m in (theirs, model))
    assert count(trained) == count(expected)
    theirs.loss(batch.tokens, batch.targets, "mm", batch.images).backward()
    assert all(weight.grad is not None for weight in trained)
    model.to("meta")
    peer = transformers_llama(model.llama)
    assert count(peer.parameters()) == count(model.llama.parameters())

    def flops(forward) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward()
        return counter.get_total_flops()

    assert flops(lambda: peer(tokens)) == flops(lambda: model.logits(model(tokens)))
