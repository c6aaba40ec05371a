"""common/device.py: the device and the dtype that every command chooses, and what it refuses."""

import pytest
import torch

from common import device
from common.device import Ranks, choose_device, choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    """The choice is kept for the life of a process: no test leaves its own behind."""
    device.fast_dtype.cache_clear()
    yield
    device.fast_dtype.cache_clear()


@pytest.mark.parametrize(("place", "seconds", "capability", "name", "why"), [
    (CPU, (1.0, 3.0), None, "bf16", "takes 0.33 times as long as in fp32"),
    (CPU, (200.0, 1.0), None, "fp32", "takes 2e+02 times as long as in fp32"),
    (GPU, None, (7, 5), "fp32", "compute capability is 7.5, bf16 is fast from 8.0 on"),
    (GPU, None, (8, 0), "bf16", "compute capability is 8.0, bf16 is fast from 8.0 on"),
    (torch.device("mps"), None, None, "fp32", "bf16 was never tried on mps")])
def test_the_faster_dtype(monkeypatch, place, seconds, capability, name, why):
    """A CPU is timed, once; a GPU tells. A name is taken at its word."""
    timed = []
    monkeypatch.setattr(device, "time_products", lambda: timed.append(1) or seconds)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    for _ in range(2):
        chosen, reason = choose_dtype("auto", place)
        assert chosen == name and why in reason
    assert len(timed) == (place == CPU)
    assert [choose_dtype(asked, CPU)[0] for asked in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_what_a_device_cannot_do_is_one_line(monkeypatch):
    """An unknown dtype or device, and a dtype that the device lacks: with what is right."""
    assert all(0 < seconds < 60 for seconds in device.time_products())  # both run here
    with pytest.raises(ValueError, match="^dtype 'fp16': one of auto, bf16, fp32$"):
        choose_dtype("fp16", CPU)
    monkeypatch.setitem(device.DTYPES, "bf16", torch.bits8)  # no device computes in it
    with pytest.raises(ValueError, match="^the device cpu cannot compute in bf16: choose fp32$"):
        choose_dtype("bf16", CPU)
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"^device '{name}' cannot be used here") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_first_device_that_there_is(monkeypatch, cuda, mps, chosen):
    """cuda, else mps, else cpu; a name overrides. NCCL on a GPU, unless gloo is named."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert choose_device().type == chosen and choose_device("cpu") == CPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    ranks = Ranks(60)
    assert (ranks.backend, ranks.device.type) == (("nccl", "cuda") if cuda else ("gloo", "cpu"))
    if cuda:
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(ValueError, match="local rank 1, but this machine has 1 GPUs"):
            Ranks(60)


def test_sums_of_gloo_stay_on_the_processor(monkeypatch):
    """Also where the rank computes on a GPU: gloo sums there only."""
    seen, ranks = [], Ranks(60, "gloo")
    ranks.world, ranks.device = 2, GPU
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: seen.append(t.device.type))
    assert ranks.sum(1.5) == 1.5 and seen == ["cpu"]
