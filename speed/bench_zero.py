"""ZeRO's stages beside torch's DDP and FSDP2: time of a step and peak memory of a rank.

    python bench_zero.py [--llm weights/smollm2] [--vision weights/dinov2-84px] [--ranks 1 2 4]

- All train one IAA model on the same rows from the same random weights, with AdamW and clipping;
  only sizes are read from the folders (or from a size's name, as for `train.py --plan`).
- Stages 0 to 2 are paired with DDP, stage 3 with FSDP2 (`fully_shard` of each layer), with the
  frozen models in shards and whole. The two of a pair take turns, so that whatever else the machine
  does hits both; a ratio is the median of the ratios within a turn, below 1 where ours is better.
- Memory is what torch's allocator counted at the peak of a step (CPU: by the profiler's events),
  on the rank that had most.
- On a CPU every rank is a process with one thread.
"""

import argparse
import gc
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from common.device import Ranks
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from speed.bench_cases import make_batch
from clip import Clip, ClipLayer
from training.config import DTYPES, Config, StageConfig, adaptor_config
from data import Batch
from common.files import one_line
from iaa import IAA, Adaptor
from llama import DecoderLayer, Llama
from training.plan import frozen_config
from train import Loss, Run, make_optimizer, share_out, train_step

PAIRS = [("ZeRO-0", "DDP"), ("ZeRO-1", "DDP"), ("ZeRO-2", "DDP"), ("ZeRO-3", "FSDP2"),
         ("ZeRO-3, frozen whole", "FSDP2, frozen whole")]
WORKFLOW = "mm"


@contextmanager
def freed_here() -> Iterator[None]:
    """Inside, gloo's threads let go of a collective's tensors before `wait` returns.

    The profiler counts what this thread frees. Where gloo's thread drops the last reference, a
    little later than this one, a tensor counts as held for good.
    """
    wait = dist.Work.wait

    def patient(work: dist.Work, *arguments) -> bool:
        done = wait(work, *arguments)
        time.sleep(0.01)
        return done

    dist.Work.wait = patient
    try:
        yield
    finally:
        dist.Work.wait = wait


@contextmanager
def allocations(device: torch.device) -> Iterator[dict[str, int]]:
    """Fills the dict it gives: bytes "held" more at the end of the block, and at its "peak"."""
    found = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found |= {"held": torch.cuda.memory_allocated() - before,
                  "peak": torch.cuda.max_memory_allocated() - before}
        return
    with (profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
          freed_here()):
        yield found
        gc.collect()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    found |= {"held": 0, "peak": 0}
    for event in sorted(events, key=lambda e: e.start_ns()):
        found["held"] += event.nbytes()
        found["peak"] = max(found["peak"], found["held"])


def make_model(config: Config, stage: StageConfig, device: torch.device) -> IAA:
    """The stage's model with random weights, the same at every call."""
    torch.manual_seed(0)
    sizes = frozen_config(config.llm, "llama")
    vision = frozen_config(config.vision, "clip")
    torch.set_default_dtype(DTYPES[config.dtype])  # frozen weights are never held in fp32
    model = IAA(Llama(sizes), Clip(vision), sizes.vocab_size - 1)
    torch.set_default_dtype(torch.float32)
    adaptor = Adaptor(adaptor_config(config, stage, sizes.layers), sizes, vision.width)
    adaptor.copy_frozen(model.llama)
    model.adaptors[WORKFLOW] = adaptor
    return model.to(device)


class Whole(nn.Module):
    """The loss as the forward pass of a module that has the whole model below it, for FSDP2."""

    def __init__(self, model: IAA, device: torch.device):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the batch's scored tokens."""
        b = batch.to(self.device)
        return self.model.loss(b.tokens, b.targets, WORKFLOW, b.images)


def fsdp(model: IAA, ranks: Ranks, dtype: torch.dtype, shard_frozen: bool) -> nn.Module:
    """The loss under FSDP2, a decoder layer a group, as its documentation advises."""
    whole, adaptor = Whole(model, ranks.device), model.adaptors[WORKFLOW]
    ignored = set() if shard_frozen else {w for w in model.parameters() if not w.requires_grad}
    settings = {"mesh": init_device_mesh(ranks.device.type, (ranks.world,)),
                "mp_policy": MixedPrecisionPolicy(dtype, dtype, cast_forward_inputs=False),
                "ignored_params": ignored}
    for layer in whole.modules():
        if isinstance(layer, (DecoderLayer, ClipLayer)) and (
                shard_frozen or next(layer.parameters()).requires_grad):
            fully_shard(layer, **settings)
    for part in (adaptor.embedding, adaptor.projector, [adaptor.norm, adaptor.head]):
        fully_shard(part, **settings)
    for part in (model.llama.embedding, model.llama.norm, model.llama.head, model.clip):
        if shard_frozen and part is not None:  # the LLM's own are not used: in shards they stay
            fully_shard(part, **settings)
    return fully_shard(whole, **settings)


def make_step(
    name: str, config: Config, ranks: Ranks, text: int, scored: int
) -> Callable[[], float]:
    """A function that does one step of the named variant and returns the loss."""
    zero = int(name[5]) if name.startswith("ZeRO") else 0
    stage = replace(config.stage[0], zero=zero)
    model = make_model(config, stage, ranks.device)
    batch = make_batch(model, stage.micro_batch, text, scored, ranks.rank)
    adaptor = model.adaptors[WORKFLOW]
    if name.startswith("ZeRO"):
        state = share_out(Run(config, ranks, model, {}, None), stage, adaptor)
        optimizer = make_optimizer(state.masters, stage)
        return lambda: train_step(state, [batch], optimizer, stage, 0, ranks)[0]
    if name == "DDP":
        loss_of = Loss(model, WORKFLOW, ranks.device)
        loss_of = DistributedDataParallel(loss_of) if ranks.world > 1 else loss_of
    else:
        loss_of = fsdp(model, ranks, DTYPES[config.dtype], "whole" not in name)
    masters = {n: w for n, w in loss_of.named_parameters() if w.requires_grad}
    optimizer = make_optimizer(masters, stage)

    def step() -> float:
        count = ranks.sum(batch.scored)
        loss = loss_of(batch)
        (loss * (ranks.world / count)).backward()  # both divide by the number of ranks
        nn.utils.clip_grad_norm_(masters.values(), stage.clip_norm)
        mean = ranks.sum(loss.item()) / count
        optimizer.step()
        optimizer.zero_grad()
        return mean

    return step


def compare(pair: tuple[str, str], config: Config, ranks: Ranks, args) -> list[dict]:
    """Memory of both, then their times in turns; a row of figures each."""
    steps, rows = [], []
    for name in pair:
        with allocations(ranks.device) as before:
            step = make_step(name, config, ranks, args.text, args.scored)
            losses = [step()]  # moments are made here
        with allocations(ranks.device) as during:
            losses.append(step())
        steps.append(step)
        rows.append({"name": name, "ranks": ranks.world, "losses": losses, "seconds": [],
                     "peak_bytes": before["held"] + during["peak"]})
    order = list(zip(steps, rows, strict=True))
    for _ in range(args.runs):
        order.reverse()
        for step, row in order:
            ranks.barrier()
            start = time.perf_counter()
            row["losses"].append(step())
            ranks.barrier()  # it reads a number of the device, so the device is done too
            row["seconds"].append(time.perf_counter() - start)
    return rows


def work(rank: int, world: int, port: int, pair: tuple, args: argparse.Namespace, found) -> None:
    """A rank of a comparison."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    stage = StageConfig("bench", ["none"], 1000, adaptor=WORKFLOW, warmup=0.0,  # the peak rate
                        batch=args.rows * world, micro_batch=args.rows)
    config = Config("none", args.llm, args.vision, "none", [stage], insertion=args.inserted,
                    dtype=args.dtype, shard_frozen="whole" not in pair[0])
    with Ranks(600) as ranks:
        found.put((rank, compare(pair, config, ranks, args)))


def measure(world: int, pair: tuple[str, str], args: argparse.Namespace) -> list[dict]:
    """A pair on `world` processes: rows with the ratios, and the memory of the fullest rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is silent
    found = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(work, (world, port, pair, args, found), world)  # raises what a rank does
    ranks = dict(found.get() for _ in range(world))
    ours, theirs = ranks[0]
    for place, row in enumerate((ours, theirs)):
        row["peak_bytes"] = max(rows[place]["peak_bytes"] for rows in ranks.values())
    turns = zip(ours["seconds"], theirs["seconds"], strict=True)
    ours["times"] = median(a / b for a, b in turns)
    ours["of_memory"] = ours["peak_bytes"] / theirs["peak_bytes"]
    return [ours, theirs]


def show(row: dict) -> str:
    """A row of the Markdown table."""
    ratios = [f"{row[key]:.2f}" if key in row else "" for key in ("times", "of_memory")]
    return (f"| {row['ranks']} | {row['name']} | {1e3 * median(row['seconds']):,.0f} | "
            f"{ratios[0]} | {row['peak_bytes'] / 1e6:,.0f} | {ratios[1]} |")


@one_line("bench_zero.py")
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default="weights/smollm2", help="folder, or a size's name [%(default)s]")
    add("--vision", default="weights/dinov2-84px", help="folder, or a size's name [%(default)s]")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="[1 2 4]")
    add("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="of ZeRO [0 1 2 3]")
    add("--runs", type=int, default=5, help="turns [%(default)s]")
    add("--dtype", choices=DTYPES, default="bf16", help="[%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--rows", type=int, default=4, help="of a rank in a step [%(default)s]")
    add("--text", type=int, default=100, help="tokens of a row beside its image [%(default)s]")
    add("--scored", type=int, default=20, help="of them [%(default)s]")
    add("--json", type=Path, help="write the figures here too")
    args = parser.parse_args(argv)
    if min(*args.ranks, args.runs, args.rows, args.text, args.scored) < 1:
        raise ValueError("--ranks, --runs, --rows, --text, --scored: 1 or more")
    for kind, folder in (("llama", args.llm), ("clip", args.vision)):
        frozen_config(folder, kind)  # says now what is missing
    rows = []
    print("| ranks | | ms a step | ratio | peak MB a rank | ratio |\n|--:|---|--:|--:|--:|--:|")
    for world in args.ranks:
        for pair in PAIRS if world > 1 else PAIRS[:1]:  # alone, all stages are one
            if int(pair[0][5]) in args.stages:
                rows += measure(world, pair, args)
                print(show(rows[-2]), show(rows[-1]), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
