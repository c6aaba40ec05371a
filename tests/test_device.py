"""common/device.py: the device and the dtype that every command chooses, and what it refuses."""

import pytest
import torch

from common import device
from common.device import Ranks, can_compute, choose_device, choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    """The choice is kept for the life of a process: no test leaves its own behind."""
    device.fast_dtype.cache_clear()
    yield
    device.fast_dtype.cache_clear()


@pytest.mark.parametrize(("seconds", "name", "why"), [
    ((1.0, 3.0), "bf16", "takes 0.33 times as long"), ((200.0, 1.0), "fp32", "takes 2e+02 times")])
def test_a_cpu_is_timed(monkeypatch, seconds, name, why):
    """auto takes the dtype of the faster product, timed once; a name is taken at its word."""
    timed = []
    monkeypatch.setattr(device, "time_products", lambda: timed.append(1) or seconds)
    for _ in range(2):
        chosen, reason = choose_dtype("auto", CPU)
        assert chosen == name and why in reason
    assert len(timed) == 1
    assert [choose_dtype(asked, CPU)[0] for asked in ("bf16", "fp32")] == ["bf16", "fp32"]


def test_products_are_timed():
    """Both dtypes run here, in a time that nobody notices."""
    bf16, fp32 = device.time_products()
    assert 0 < bf16 < 60 and 0 < fp32 < 60


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_a_gpu_is_asked(monkeypatch, capability, name):
    """bf16 from compute capability 8.0 on; fp32 on other devices, where bf16 was never tried."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    chosen, why = choose_dtype("auto", GPU)
    assert chosen == name and "compute capability is {}.{}".format(*capability) in why
    assert choose_dtype("auto", torch.device("mps")) == ("fp32", "bf16 was never tried on mps")


def test_what_a_device_cannot_do_is_one_line(monkeypatch):
    """An unknown dtype or device, and a dtype that the device lacks: with those that it has."""
    with pytest.raises(ValueError, match="^dtype 'fp16': one of auto, bf16, fp32$"):
        choose_dtype("fp16", CPU)
    assert can_compute(torch.bfloat16, CPU) and not can_compute(torch.bits8, CPU)
    monkeypatch.setattr(device, "can_compute", lambda dtype, device: dtype is torch.float32)
    with pytest.raises(ValueError, match="^the device cpu cannot compute in bf16: choose fp32$"):
        choose_dtype("bf16", CPU)
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"^device '{name}' cannot be used here") as error:
            choose_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_first_device_that_there_is(monkeypatch, cuda, mps, chosen):
    """cuda, else mps, else cpu; a name overrides."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert choose_device().type == chosen and choose_device("cpu") == CPU


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
