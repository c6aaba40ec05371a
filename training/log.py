"""The log of a training stage: a line of JSON for each step, and progress on the screen."""

import json
import math
import resource
import sys
import time
from collections import deque
from pathlib import Path

import torch

from common.files import write_text, writing
from data import Batch
from iaa import IAA
from training.config import StageConfig
from training.plan import step_flops
from training.ranks import Ranks

PRINT_S = 15  # seconds between two lines of progress where they cannot be rewritten
RECENT = 20  # steps over which the rate is measured


class Log:
    """A stage's `log.jsonl`, a line a step, and its progress on the screen.

    later: FLOPs of the stages after this one. Of a resumed stage, lines of steps that run again are
    cut from the file.
    """

    def __init__(
        self, model: IAA, out: str, stage: StageConfig, ranks: Ranks, first: int, later: float
    ):
        self.model, self.out, self.stage, self.ranks, self.later = model, out, stage, ranks, later
        self.path = Path(out, stage.name, "log.jsonl")
        self.first, self.clock, self.printed = first, time.perf_counter(), 0.0
        self.recent = deque(maxlen=RECENT)  # (FLOPs, seconds) of the last steps
        self.tokens, self.padded, self.skipped, self.cut, self.flops = 0, 0, 0, 0, 0.0
        if self.path.is_file():
            lines = [x for x in self.path.read_text().splitlines() if x.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] < first]
            self.flops = sum(json.loads(line).get("flops", 0.0) for line in kept)
            if ranks.rank == 0:
                write_text(self.path, "".join(line + "\n" for line in kept))

    def step(self, step: int, values: dict, batches: list[Batch], wait_s: float) -> None:
        """Note a step. Tokens and FLOPs of all ranks are estimated from this rank's share."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        share = self.stage.batch / max(1, sum(len(b.tokens) for b in batches))
        flops = share * sum(step_flops(self.model, self.stage.adaptor, *b.tokens.shape, b.scored)
                            for b in batches)
        tokens = sum(int(b.lengths.sum()) for b in batches)
        self.flops += flops
        self.recent.append((flops, seconds))
        self.tokens += tokens
        self.padded += sum(b.tokens.numel() for b in batches)
        self.cut += sum(b.cut for b in batches)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.ranks.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        row = {"step": step, **values, "tokens_per_s": share * tokens / seconds, "flops": flops,
               "tflops": flops / seconds / 1e12, "data_wait": wait_s / seconds,
               "padding": 1 - self.tokens / max(1, self.padded), "seconds": seconds,
               "memory_gb": memory / 1e9, "cut": self.cut}
        for reason in [reason for b in batches for reason in b.skipped]:
            self.skipped += 1
            print(f"skipped {reason} ({self.skipped} so far)", file=sys.stderr)
        if self.ranks.rank == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            self.show(step, row)

    def show(self, step: int, row: dict) -> None:
        """The progress line: rewritten on a terminal, elsewhere printed every PRINT_S seconds."""
        rate = sum(f for f, _ in self.recent) / sum(s for _, s in self.recent)  # FLOP/s
        done, last = step + 1 - self.first, step + 1 == self.stage.steps
        stage_s = (self.stage.steps - step - 1) * sum(s for _, s in self.recent) / len(self.recent)
        run_s = stage_s + self.later / rate
        if done == min(4, self.stage.steps - self.first):  # the first step alone is a slow one
            print(f"{'':79}\r{self.out}: about {math.ceil(run_s / 60)} min of training "
                  "left at the rate of the first steps", flush=True)
        held_out = f"  held-out {row['held_out']:.4f}" if "held_out" in row else ""
        cut = f"  {self.cut} rows cut" if self.cut else ""
        line = (f"{self.stage.name} {step + 1}/{self.stage.steps}  loss {row['loss']:.4f}"
                f"{held_out}  {row['tokens_per_s']:,.0f} tokens/s  {rate / 1e12:.3f} TFLOP/s{cut}"
                f"  {stage_s / 60:.1f} min left, {run_s / 60:.1f} of the run")
        if sys.stdout.isatty():
            print(f"\r{line}\x1b[K", end="\n" if last or held_out else "", flush=True)
        elif held_out or last or done == 1 or time.perf_counter() - self.printed > PRINT_S:
            self.printed = time.perf_counter()
            print(line, flush=True)
