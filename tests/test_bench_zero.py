"""bench_zero.py on tiny models: every variant trains the same model, and every figure is there."""

import pytest
from conftest import CLIP, LLAMA
from processes import processes

from clip import Clip
from llama import Llama
from speed.bench_zero import PAIRS, main


def test_all_variants_compute_the_same_loss(tmp_path, write_base):
    """ZeRO's stages, DDP and FSDP2 on 2 ranks: losses of two steps alike, all times positive."""
    write_base(tmp_path / "llm", Llama(LLAMA))
    write_base(tmp_path / "vision", Clip(CLIP))
    options = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision"), "--text", "30",
               "--inserted", "2", "--runs", "1", "--rows", "2", "--dtype", "fp32"]
    with processes(2, main, options) as (_, result):
        _, rows = result(300)
    assert [row["name"] for row in rows] == [name for pair in PAIRS for name in pair]
    for row in rows:
        assert row["losses"] == pytest.approx(rows[1]["losses"], rel=1e-4)
        assert min(row["seconds"]) > 0
    assert len(set(rows[1]["losses"])) == 2  # it trains
