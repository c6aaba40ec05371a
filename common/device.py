"""Which device and which dtype to compute with, and this process's place among the ranks.

Processors differ by a factor of 200 in bf16: two cores of a Zen 4 multiply bf16 matrices 3 times as
fast as fp32 ones, two cores of a Zen 2 (AVX2 only, as many laptops) 200 times as slowly. Processor
flags do not tell which kernels torch has for them, so a CPU is timed.

A rank that is dead or frozen makes the collectives of the others fail: at once where a connection
broke, else after `timeout_s`. Each of them then ends with one line: its rank, and where it was.
"""

import functools
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that users type
CHOICES = ("auto", *DTYPES)


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the first that this machine has of cuda, mps and cpu.

    Raises ValueError for a device that torch does not know or cannot use here.
    """
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({first})") from None


def time_products() -> tuple[float, float]:
    """Seconds of one matrix product on this CPU in bf16 and in fp32: the best of some turns."""
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(4):  # in turns, so that other work on the machine hits both
        for dtype in best:
            a = torch.ones(384, 384, dtype=dtype)  # some ms in fp32 on one slow core
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return tuple(best.values())


@functools.cache
def fast_dtype(device: torch.device) -> tuple[str, str]:
    """The name of the faster dtype on `device`, and why, for the line that a command prints."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = "bf16" if major >= 8 else "fp32"
        return name, f"the GPU's compute capability is {major}.{minor}, bf16 is fast from 8.0 on"
    if device.type != "cpu":
        return "fp32", f"bf16 was never tried on {device.type}"
    bf16, fp32 = time_products()
    return ("bf16" if bf16 < fp32 else "fp32",
            f"on this CPU a bf16 matrix product takes {bf16 / fp32:.2g} times as long as in fp32")


def choose_dtype(name: str, device: torch.device) -> tuple[str, str]:
    """The name of the dtype to compute in, and why. name: "auto" for the faster one on `device`.

    Raises ValueError for a name that is not in CHOICES, or that the device cannot compute in.
    """
    if name not in CHOICES:
        raise ValueError(f"dtype {name!r}: one of {', '.join(CHOICES)}")
    if name == "auto":
        return fast_dtype(device)
    works = [known for known, dtype in DTYPES.items() if can_compute(dtype, device)]
    if name not in works:
        raise ValueError(f"the device {device} cannot compute in {name}: "
                         f"choose {' or '.join(works)}")
    return name, "as asked"


def can_compute(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix product in `dtype` runs on `device`."""
    try:
        a = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((a @ a).sum() == 8)
    except (RuntimeError, TypeError):
        return False


class Ranks:
    """A context that joins the group and leaves it. Attributes: rank, world, device.

    timeout_s: how long a collective waits for the other ranks. backend: "" for that of the device.
    Raises ValueError where there are more processes than GPUs.
    """

    def __init__(self, timeout_s: float, backend: str = ""):
        self.rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets all three
        self.place, self.timeout = "the start", timedelta(seconds=timeout_s)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if local >= (gpus := torch.cuda.device_count()):
                raise ValueError(f"process {local + 1} on a machine with {gpus} GPUs")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self.backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            try:
                dist.init_process_group(self.backend, timeout=self.timeout)
            except RuntimeError as error:  # Python calls no __exit__ where __enter__ fails
                self.__exit__(RuntimeError, error, None)
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A failed collective is a RuntimeError, and so is a data loader's process that died.
        if isinstance(error, RuntimeError):
            reason, loader = str(error).split("\n")[0], str(error).startswith("DataLoader worker")
            if loader:  # torch's handler would raise the same again, wherever this process is
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self.world > 1 or loader:
                raise ConnectionError(f"rank {self.rank} of {self.world} stopped in {self.place}: "
                                      f"{reason}") from error
        if error is None and self.world > 1:
            dist.destroy_process_group()

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.world == 1:
            return value
        device = "cpu" if self.backend == "gloo" else self.device  # gloo is for processors
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)

    def print0(self, text: str) -> None:
        """Print once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)
