"""Which device and which dtype to compute with: one choice for every command.

Processors differ by a factor of 200 in bf16: two cores of a Zen 4 multiply bf16 matrices 3 times as
fast as fp32 ones, two cores of a Zen 2 (AVX2 only, as many laptops) 200 times as slowly. Processor
flags do not tell which kernels torch has for them, so a CPU is timed.
"""

import functools
import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that users type
CHOICES = ("auto", *DTYPES)
TIMED_SIDE = 384  # of the matrices that are timed: some milliseconds in fp32 on one slow core


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
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({first})") from None


def time_products() -> tuple[float, float]:
    """Seconds of one matrix product on this CPU in bf16 and in fp32: the best of some turns."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(6):  # in turns, so that other work on the machine hits both; the first warms up
        for dtype in best:
            a = torch.ones(TIMED_SIDE, TIMED_SIDE, dtype=dtype)
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        if best[torch.bfloat16] > 20 * best[torch.float32]:
            break  # nothing is in doubt, and each further turn may take a second
    return best[torch.bfloat16], best[torch.float32]


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

    Raises ValueError, naming the dtypes that the device can compute in, where it cannot in `name`.
    """
    if name == "auto":
        return fast_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: one of {', '.join(CHOICES)}")
    works = [known for known, dtype in DTYPES.items() if can_compute(dtype, device)]
    if name not in works:
        raise ValueError(f"the device {device} cannot compute in {name}: "
                         f"choose {' or '.join(works)}")
    return name, "as asked"


def can_compute(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matrix product in `dtype` runs on `device`."""
    try:
        a = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((a @ a).sum().item() == 8)
    except (RuntimeError, TypeError):
        return False
