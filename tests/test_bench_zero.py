"""bench_zero.py on tiny models: every variant trains the same model, and every figure is there."""

from functools import partial

import pytest
import torch
from processes import server

from speed.bench_zero import main


def test_all_variants_compute_the_same_loss(monkeypatch):
    """ZeRO's stages, DDP and FSDP2 on 2 ranks: losses of four steps alike, all figures positive."""
    server()  # its processes have torch imported
    monkeypatch.setattr("bench_zero.multiprocessing.spawn",
                        partial(torch.multiprocessing.start_processes, start_method="forkserver"))
    rows = main(["--llm", "tiny", "--vision", "tiny", "--inserted", "2", "--ranks", "2",
                 "--runs", "2", "--rows", "2", "--dtype", "fp32", "--text", "30"])
    names = ["ZeRO-0", "DDP", "ZeRO-1", "DDP", "ZeRO-2", "DDP", "ZeRO-3", "FSDP2",
             "ZeRO-3, frozen whole", "FSDP2, frozen whole"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["losses"] == pytest.approx(rows[1]["losses"], rel=1e-4)
        assert min(row["seconds"]) > 0 and row["peak_bytes"] > 0
    assert len(set(rows[1]["losses"])) == 4  # it trains
