"""ZeRO's stages beside torch's DDP and FSDP2: the time of a training step.

    torchrun --nproc_per_node 2 -m speed.bench_zero [--llm FOLDER] [--vision FOLDER]

- All train one IAA model on the same rows, from the same weights, with AdamW and clipping.
- Stages 1 and 2 are paired with DDP, stage 3 with FSDP2 (`fully_shard` of each layer). The two of
  a pair take turns, so that whatever else the machine does hits both. "times as fast" is the median
  of the ratios within a turn.
- What a rank holds and sends is said by `python -m training.plan`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from clip import ClipLayer
from common.device import DTYPES, Ranks, choose_dtype
from common.files import one_line
from data import Batch
from iaa import IAA
from llama import DecoderLayer
from speed.bench import WORKFLOW, build_model, make_batch, options
from train import batch_loss, make_optimizer, train_step
from training.config import StageConfig
from training.zero import DataParallel, build_state

PAIRS = [("ZeRO-1", "DDP"), ("ZeRO-2", "DDP"), ("ZeRO-3", "FSDP2")]
TURNS = 5
STAGE = StageConfig("bench", ["none"], 1000, warmup=0.0)  # without warm-up: the peak rate


class Loss(nn.Module):
    """The loss of a batch as a module, for DDP and FSDP2, with the adaptor's parameters only."""

    def __init__(self, model: IAA, loss: Callable[[Batch], Tensor], world: int):
        super().__init__()
        self.adaptor, self.loss, self.world = model.adaptors[WORKFLOW], loss, world

    def forward(self, batch: Batch) -> Tensor:
        """The loss times the number of ranks, as both divide the gradient by it."""
        return self.loss(batch) * self.world


def fsdp2(loss: Loss, model: IAA, ranks: Ranks) -> nn.Module:
    """The loss under FSDP2, a decoder layer a group, as its documentation advises."""
    loss.whole = model  # FSDP2 shards what a module registers; `Loss` registers no frozen weight
    llama, adaptor, dtype = model.llama, model.adaptors[WORKFLOW], model.llama.dtype
    parts = [m for m in model.modules() if isinstance(m, (DecoderLayer, ClipLayer))]
    parts += [adaptor.embedding, adaptor.projector, [adaptor.norm, adaptor.head], model.clip]
    # The LLM's own embedding, norm and head are not used. In groups of their own they stay in
    # shards. A tied head is None.
    parts += [part for part in (llama.embedding, llama.norm, llama.head) if part is not None]
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(dtype, dtype, cast_forward_inputs=False)
    for part in [*parts, loss]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return loss


def make_step(name: str, args: argparse.Namespace, ranks: Ranks) -> Callable[[], float]:
    """A function that does one step of the named variant and returns the loss."""
    model = build_model(args, args.inserted)
    torch.manual_seed(ranks.rank)  # every rank has rows of its own
    batch = make_batch(model, rows=4, text=100, scored=20)
    loss, scale = partial(batch_loss, model, WORKFLOW, ranks.device), 1
    if name.startswith("ZeRO"):
        state = build_state(loss, model, WORKFLOW, int(name[-1]), ranks.world, ranks.device)
    else:
        loss, scale = Loss(model, loss, ranks.world), ranks.world
        loss = DistributedDataParallel(loss) if name == "DDP" else fsdp2(loss, model, ranks)
        trained = {n: w for n, w in loss.named_parameters() if w.requires_grad}
        state = DataParallel(loss, trained, world=1)  # they sum gradients by themselves
    optimizer = make_optimizer(state.masters, STAGE)
    return lambda: train_step(state, [batch], optimizer, STAGE, 0, ranks)[0] / scale


def compare(pair: tuple[str, str], args: argparse.Namespace, ranks: Ranks) -> list[tuple]:
    """Let both variants of a pair take turns; print. Returns the name and the losses of each."""
    steps = [make_step(name, args, ranks) for name in pair]
    losses, seconds = [[step()] for step in steps], ([], [])
    for _ in range(TURNS):
        for step, found, taken in zip(steps, losses, seconds, strict=True):
            ranks.barrier()
            start = time.perf_counter()
            found.append(step())
            ranks.barrier()  # it reads a number of the device, so the device is done too
            taken.append(time.perf_counter() - start)
    ratio = median(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    ours, theirs = (1e3 * median(taken) for taken in seconds)
    ranks.print0(f"{pair[0]:20} {ours:8,.0f} ms a step  {ratio:.2f} times as fast as {pair[1]} "
                 f"({theirs:,.0f} ms)")
    return list(zip(pair, losses, strict=True))


@one_line("speed.bench_zero")
def main(argv: list[str] | None = None) -> list[tuple]:
    """Measure and print; returns the name and the losses of every variant."""
    args = options(__doc__).parse_args(argv)
    with Ranks(600) as ranks:
        if ranks.world == 1:
            raise ValueError("one process shares nothing: torchrun --nproc_per_node 2 "
                             "-m speed.bench_zero")
        name, why = choose_dtype(args.dtype, ranks.device)
        name = ranks.agree_on_dtype(name)
        args.dtype, args.device = DTYPES[name], ranks.device
        ranks.print0(f"{ranks.world} ranks, computing in {name}: {why}")
        return [row for pair in PAIRS for row in compare(pair, args, ranks)]


if __name__ == "__main__":
    main()
