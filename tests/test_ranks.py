"""training/ranks.py: which backend carries what; the rest runs in test_train.py."""

import pytest

from training.ranks import Ranks


def test_backends(monkeypatch):
    """NCCL on a GPU; gloo where it is named, and its sums then stay on the processor."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert Ranks(60).backend == "nccl"
    ranks, seen = Ranks(60, "gloo"), []
    assert (ranks.backend, ranks.device.type) == ("gloo", "cuda")
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: seen.append(t.device.type))
    ranks.world = 2
    assert ranks.sum(1.5) == 1.5 and seen == ["cpu"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 2 on a machine with 1 GPUs"):
        Ranks(60)
