"""bench_zero.py on tiny models: every variant trains the same model."""

import pytest
from conftest import CLIP, LLAMA, write_base
from processes import processes

from clip import Clip
from llama import Llama
from speed import bench_zero


def one_turn(options: list[str]) -> list[tuple]:
    """What bench_zero.py returns after a step and one more."""
    bench_zero.TURNS = 1
    return bench_zero.main(options)


def test_all_variants_compute_the_same_loss(tmp_path):
    """ZeRO's sharded stages, DDP and FSDP2 on 2 ranks: losses of two steps alike."""
    write_base(tmp_path / "llm", Llama(LLAMA))
    write_base(tmp_path / "vision", Clip(CLIP))
    options = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision"),
               "--inserted", "2", "--dtype", "fp32"]
    with processes(2, one_turn, options) as (_, result):
        _, rows = result(300)
    assert [name for name, _ in rows] == [name for pair in bench_zero.PAIRS for name in pair]
    for _, losses in rows:
        assert losses == pytest.approx(rows[1][1], rel=1e-4)
        assert len(set(losses)) == 2  # it trains
