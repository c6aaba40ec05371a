"""One process among many: joining them, sums over all of them, and which of them was lost.

`torchrun` starts the processes and tells each its rank by environment variables. NCCL carries the
data between GPUs, gloo between processors.

A rank that dies or hangs leaves the others waiting in a collective, which fails at once where a
connection broke, and after `timeout_s` where nobody answers. Each rank that fails so, or by an
error of its own, leaves a note in the group's key-value store: the ranks without a note are the
lost ones. A step begins with a word to the store, so that no rank outlives its launcher.
A process that loads data and dies stops its rank, too, with a line that says so.
"""

import contextlib
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common.files import lock

# In errors that gloo's threads raise, and where the launcher ended a process that loads data.
BROKEN = ("gloo", "pair closure", "Connection closed", "killed by signal: Terminated")
GRACE_S = 5  # for the other ranks' notes
WAITED = "waited"  # the note of a rank whose collective failed


class LostRank(ConnectionError):
    """A collective failed; the message names the ranks that did not answer, and the step."""


class Terminated(BaseException):
    """SIGTERM came: the launcher ends all ranks where one has failed. No loader may catch it."""


class Ranks:
    """This process's place among the ranks; a context that joins the group and leaves it.

    backend: of the group; NCCL or gloo, as the device asks, where none is named.
    """

    def __init__(self, timeout_s: float, backend: str = ""):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.place, self.timeout = "start", timedelta(seconds=timeout_s)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if local >= there:
                raise ValueError(f"process {local + 1} on a machine with {there} GPUs")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        self.backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")

    def __enter__(self) -> "Ranks":
        if self.world == 1:
            return self
        signal.signal(signal.SIGTERM, self.terminate)
        try:
            self.store, *_ = next(rendezvous("env://", timeout=self.timeout))
            self.begin(self.place)  # before all have joined, so that no rank is without a word
            dist.init_process_group(self.backend, store=dist.PrefixStore("group", self.store),
                                    rank=self.rank, world_size=self.world, timeout=self.timeout)
        except (RuntimeError, ValueError, Terminated) as error:
            reason = str(error).splitlines()[0]
            raise LostRank(f"rank {self.rank} of {self.world} found no others: {reason}") from None
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            if self.world > 1:
                dist.destroy_process_group()
            return
        if self.place != "start":  # there may be loaders, whose end is to be expected
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self.world > 1:
            self.explain(kind, error)
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            line = f"rank {self.rank} stopped in {self.place}: {error}".strip()
            raise ChildProcessError(line) from None

    def explain(self, kind, error) -> None:
        """Raise LostRank where the error is of another rank's loss, else leave it as a note."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the line comes first
        broken = isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN)
        if isinstance(error, (dist.DistError, Terminated)) or broken:
            told = " on SIGTERM" if isinstance(error, Terminated) else ""
            told = " as a loader was ended" if "killed by signal" in str(error) else told
            line = f"rank {self.rank} stopped{told} in {self.place}: {self.lost()}"
            raise LostRank(line) from None
        with contextlib.suppress(dist.DistError):
            self.store.set(f"note/{self.rank}", f"{kind.__name__}: {error}".splitlines()[0])

    def terminate(self, number: int, frame) -> None:
        """SIGTERM's handler."""
        raise Terminated("SIGTERM")

    def lost(self) -> str:
        """Leave a note; say which ranks leave none for GRACE_S seconds, or failed by themselves."""
        others, notes = set(range(self.world)) - {self.rank}, {}
        try:
            self.store.set(f"note/{self.rank}", WAITED)
            deadline = time.monotonic() + GRACE_S
            while len(notes) < len(others) and time.monotonic() < deadline:
                time.sleep(0.1)
                for rank in others - notes.keys():
                    if self.store.check([f"note/{rank}"]):
                        notes[rank] = self.store.get(f"note/{rank}").decode()
            silent = sorted(others - notes.keys())
            places = [self.store.get(f"place/{r}").decode() for r in silent]
        except dist.DistError:
            launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return f"{'the launcher' if launched else 'rank 0'}, which keeps the notes, is dead"
        said = [f"rank {r} failed ({notes[r]})" for r in sorted(notes) if notes[r] != WAITED]
        said += [f"rank {r} is dead or hangs in {p}" for r, p in zip(silent, places, strict=True)]
        return ", ".join(said) or "so did all others"

    def begin(self, place: str) -> None:
        """Note where training is, for messages; fails where the launcher is gone."""
        self.place = place
        if self.world > 1:
            self.store.set(f"place/{self.rank}", place)

    def sum(self, value: float) -> float:
        """Sum of a number over all ranks."""
        if self.world == 1:
            return value
        device = "cpu" if self.backend == "gloo" else self.device
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)

    def alone(self, folder: Path) -> contextlib.AbstractContextManager:
        """Keep `folder` for these ranks: rank 0 takes its lock (InUse where others have it)."""
        return lock(folder) if self.rank == 0 else contextlib.nullcontext()

    def say(self, text: str) -> None:
        """Print once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)
