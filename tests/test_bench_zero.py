"""bench_zero.py on tiny models: every variant trains the same model, and every figure is there."""

from functools import partial

import pytest
import torch
from conftest import CLIP, LLAMA
from processes import server

from clip import Clip
from llama import Llama
from speed.bench_zero import PAIRS, main


def test_all_variants_compute_the_same_loss(monkeypatch, tmp_path, write_base, capsys):
    """ZeRO's stages, DDP and FSDP2 on 2 ranks: losses of four steps alike, all figures positive."""
    write_base(tmp_path / "llm", Llama(LLAMA))
    write_base(tmp_path / "vision", Clip(CLIP))
    server()  # its processes have torch imported
    monkeypatch.setattr("speed.bench_zero.multiprocessing.spawn",
                        partial(torch.multiprocessing.start_processes, start_method="forkserver"))
    rows = main(["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision"),
                 "--inserted", "2", "--ranks", "2", "--runs", "2", "--rows", "2",
                 "--dtype", "fp32", "--text", "30"])
    assert [row["name"] for row in rows] == [name for pair in PAIRS for name in pair]
    for row in rows:
        assert row["losses"] == pytest.approx(rows[1]["losses"], rel=1e-4)
        assert min(row["seconds"]) > 0
    assert len(set(rows[1]["losses"])) == 4  # it trains
    assert capsys.readouterr().out.count("ms a step") == len(rows)
