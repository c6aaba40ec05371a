"""This process's place among the ranks of a run: joining their group, and sums over all of them.

`torchrun` starts the processes and tells each one its rank in environment variables. NCCL carries
the data between GPUs, gloo between CPUs. A rank that is dead or frozen makes the collectives of the
others fail: at once where a connection broke, else after `timeout_s`. Each of them then ends with
one line that says its rank and where it was. torchrun names the rank that failed first.
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """A context that joins the group and leaves it. Attributes: rank, world, device.

    timeout_s: how long a collective waits for the other ranks. backend: "" for that of the device.
    Raises ValueError where there are more processes than GPUs.
    """

    def __init__(self, timeout_s: float, backend: str = ""):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.place, self.timeout = "the start", timedelta(seconds=timeout_s)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= there:
                raise ValueError(f"process {local + 1} on a machine with {there} GPUs")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self.backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            try:
                dist.init_process_group(self.backend, timeout=self.timeout)
            except (RuntimeError, ValueError) as error:
                raise self.stopped(error) from error
        return self

    def __exit__(self, kind, error, trace) -> None:
        # A failed collective is a RuntimeError, and so is a data loader's process that died.
        if isinstance(error, RuntimeError):
            loader = str(error).startswith("DataLoader worker")
            if loader:  # torch's handler would raise the same again, wherever this process is
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if self.world > 1 or loader:
                raise self.stopped(error) from error
        if error is None and self.world > 1:
            dist.destroy_process_group()

    def stopped(self, error: Exception) -> ConnectionError:
        """The error that says in one line which rank stopped where, and why."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ConnectionError(f"rank {self.rank} of {self.world} stopped in {self.place}: "
                               f"{reason}")

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.world == 1:
            return value
        device = "cpu" if self.backend == "gloo" else self.device
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
