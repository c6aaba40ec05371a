"""Which device and which dtype to compute with, and this process's place among the ranks.

bf16 is fast on some processors only: two cores of a Zen 4 multiply bf16 matrices 3 times as fast as
fp32 ones, two cores of a Zen 2 (AVX2 only, as many laptops) take 200 times as long. Processor flags
do not tell which kernels torch has for them, so a CPU is timed.

A rank that is dead or frozen makes the collectives of the others fail: at once where a connection
broke, else after `timeout_s`. Each of them then ends with one line: its rank, where it was, and
which rank is lost. Each rank tells the others through torch's store, once a second, that it lives.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.pool import ThreadPool

import torch
import torch.distributed as dist

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that users type
CHOICES = ("auto", *DTYPES)
SILENT_S = 5  # a rank that gives no sign of life for so long is lost


def choose_device(name: str | None = None) -> torch.device:
    """The named device, or the first that this machine has of cuda, mps and cpu.

    Raises ValueError for a device that torch does not know or cannot use here.
    """
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({first})") from None


def time_products() -> tuple[float, float]:
    """Seconds of one matrix product on this CPU in bf16 and in fp32: the best of some turns."""
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(4):  # in turns, so that other work on the machine hits both
        for dtype in best:
            a = torch.ones(256, 256, dtype=dtype)  # a millisecond in fp32 on a slow core
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
    try:
        a = torch.ones(2, 2, dtype=DTYPES[name], device=device)
        a @ a
    except (RuntimeError, TypeError):  # every device has fp32, an old Mac no bf16
        raise ValueError(f"the device {device} cannot compute in {name}: choose fp32") from None
    return name, "as asked"


def within(seconds: float, function: Callable):
    """function(), in a thread. Raises multiprocessing.TimeoutError after `seconds`."""
    with ThreadPool(1) as pool:  # at its end it does not wait for the thread
        return pool.apply_async(function).get(seconds)


class Ranks:
    """A context: joins the process group, leaves it. Attributes: rank, world, device, progress.

    timeout_s: how long a collective waits for the other ranks. backend: "" for that of the device.
    Raises ValueError where there are more processes than GPUs, ConnectionError for a lost rank.
    """

    def __init__(self, timeout_s: float, backend: str = ""):
        self.rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets all three
        self.launcher = f"launched on {socket.gethostname()} by {os.getppid()}:"
        self.progress, self.timeout_s = "the start", timeout_s  # progress: for the last line
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            if local >= (gpus := torch.cuda.device_count()):
                raise ValueError(f"local rank {local}, but this machine has {gpus} GPUs")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self.backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def where_stopped(self) -> str:
        """The beginning of the line that a rank ends with."""
        return f"rank {self.rank} of {self.world} stopped in {self.progress}"

    def join(self) -> None:
        """Join the group. The store keeps what ranks tell each other beside the collectives."""
        limit = timedelta(seconds=self.timeout_s)
        self.store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        self.store.set_timeout(limit)
        self.store.set(f"beat {self.rank}", "0")
        self.store.set(f"{self.launcher} {self.rank}", str(os.getpid()))
        dist.init_process_group(self.backend, store=self.store, rank=self.rank,
                                world_size=self.world, timeout=limit)

    def beat(self) -> None:
        """In a thread: tell the others once a second that this rank lives, also as it computes."""
        with contextlib.suppress(RuntimeError):  # the rank that keeps the store has left
            while True:
                self.store.set(f"beat {self.rank}", str(time.monotonic()))
                time.sleep(1)

    def find_lost(self) -> str:
        """A text that names the ranks without a beat for SILENT_S that have not left, "" for none.

        Those of the same launcher are killed: torchrun waits --shutdown_timeout for a frozen one.
        """
        names = [f"beat {rank}" for rank in range(self.world)]
        before = self.store.multi_get(names)
        time.sleep(SILENT_S)
        pairs = zip(before, self.store.multi_get(names), strict=True)
        lost = [str(rank) for rank, (old, new) in enumerate(pairs)
                if old == new and not self.store.check([f"left {rank}"])]
        for rank in lost:
            if self.store.check([key := f"{self.launcher} {rank}"]):  # else of another machine
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(self.store.get(key)), signal.SIGKILL)
        return f"no sign of life from rank {', '.join(lost)}; " if lost else ""

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            try:  # a store whose machine is frozen is awaited without limit
                within(self.timeout_s + SILENT_S, self.join)
            except (RuntimeError, multiprocessing.TimeoutError) as error:
                raise ConnectionError(f"rank {self.rank} of {self.world}: the ranks did not find "
                                      f"each other in {self.timeout_s} s ({error})") from error
            threading.Thread(target=self.beat, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        for loader in multiprocessing.active_children():  # Python would wait for a frozen one
            loader.kill()
        if self.world == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return
        with contextlib.suppress(RuntimeError):  # no store any more
            self.store.set(f"left {self.rank}", "")
        if isinstance(error, RuntimeError):  # a collective failed
            try:
                lost = within(3 * SILENT_S, self.find_lost)
            except (RuntimeError, multiprocessing.TimeoutError):
                lost = "no answer from the store, which rank 0 or its launcher keeps; "
            reason = str(error).split("\n")[0]
            raise ConnectionError(f"{self.where_stopped}: {lost}{reason}") from error

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks. All must call it, and what calls it below."""
        if self.world == 1:
            return value
        device = "cpu" if self.backend == "gloo" else self.device  # gloo is for processors
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def agree_on_dtype(self, name: str) -> str:
        """fp32 where any rank has chosen it, else `name`: ranks may have timed differently."""
        return "fp32" if self.sum(name == "fp32") else name

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)

    def print0(self, text: str) -> None:
        """Print once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)
