"""ZeRO's stages beside torch's DDP and FSDP2: the time of a training step.

    python -m speed.bench_zero [--llm weights/smollm2] [--vision weights/dinov2-84px] [--ranks 1 2 4]

- All train one IAA model on the same rows from the same random weights, with AdamW and clipping;
  only sizes are read from the folders, or from the name of a size.
- Stages 0 to 2 are paired with DDP, stage 3 with FSDP2 (`fully_shard` of each layer), with the
  frozen models in shards and whole. The two of a pair take turns, so that whatever else the machine
  does hits both. A ratio is the median of the ratios within a turn, below 1 where ours is faster.
- On a GPU each row also has the peak memory of the fullest rank, as torch's allocator counted it.
  `python -m training.plan` says it by arithmetic.
- On a CPU every rank is a process with one thread.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from clip import Clip, ClipLayer
from common.device import CHOICES, DTYPES, Ranks, choose_device, choose_dtype
from common.files import one_line
from data import Batch
from iaa import IAA, Adaptor
from llama import DecoderLayer, Llama
from speed.bench import DEMO, WORKFLOW, make_batch
from train import Loss, make_optimizer, train_step
from training.config import Config, StageConfig, adaptor_config
from training.plan import frozen_config
from training.zero import build_state

PAIRS = [("ZeRO-0", "DDP"), ("ZeRO-1", "DDP"), ("ZeRO-2", "DDP"), ("ZeRO-3", "FSDP2"),
         ("ZeRO-3, frozen whole", "FSDP2, frozen whole")]


def make_model(config: Config, stage: StageConfig, device: torch.device) -> IAA:
    """The stage's model with random weights, the same at every call."""
    torch.manual_seed(0)
    sizes, vision = frozen_config(config.llm, "llama"), frozen_config(config.vision, "clip")
    dtype = DTYPES[config.dtype]
    model = IAA(Llama(sizes).to(dtype), Clip(vision).to(dtype), sizes.vocab_size - 1)
    adaptor = Adaptor(adaptor_config(config, stage, sizes.layers), sizes, vision.width)
    adaptor.init_from_frozen(model.llama)
    model.adaptors[WORKFLOW] = adaptor
    return model.to(device)


class WholeModel(nn.Module):
    """The loss as the forward pass of a module that has the whole model below it, for FSDP2."""

    def __init__(self, model: IAA, device: torch.device):
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropy over the batch's scored tokens."""
        b = batch.to(self.device)
        return self.model.loss(b.tokens, b.targets, WORKFLOW, b.images)


def fsdp(model: IAA, ranks: Ranks, dtype: torch.dtype, shard_frozen: bool) -> nn.Module:
    """The loss under FSDP2, a decoder layer a group, as its documentation advises."""
    whole, adaptor = WholeModel(model, ranks.device), model.adaptors[WORKFLOW]
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


def make_step(name: str, config: Config, ranks: Ranks, text: int, scored: int) -> Callable:
    """A function that does one step of the named variant and returns the loss."""
    zero = int(name[5]) if name.startswith("ZeRO") else 0
    stage = replace(config.stage[0], zero=zero)
    model = make_model(config, stage, ranks.device)
    batch = make_batch(model, stage.micro_batch, text, scored, ranks.rank)
    loss = Loss(model, WORKFLOW, ranks.device)
    if name.startswith("ZeRO"):
        state = build_state(loss, model, WORKFLOW, zero, ranks.world, ranks.device,
                            config.shard_frozen)
        optimizer = make_optimizer(state.masters, stage)
        return lambda: train_step(state, [batch], optimizer, stage, 0, ranks)[0]
    if name == "DDP":
        loss = DistributedDataParallel(loss) if ranks.world > 1 else loss
    else:
        loss = fsdp(model, ranks, DTYPES[config.dtype], "whole" not in name)
    masters = {n: w for n, w in loss.named_parameters() if w.requires_grad}
    optimizer = make_optimizer(masters, stage)

    def step() -> float:
        count = ranks.sum(batch.scored)
        total = loss(batch)
        (total * (ranks.world / count)).backward()  # both divide by the number of ranks
        nn.utils.clip_grad_norm_(masters.values(), stage.clip_norm)
        mean = ranks.sum(total.item()) / count
        optimizer.step()
        optimizer.zero_grad()
        return mean

    return step


def compare(pair: tuple[str, str], config: Config, ranks: Ranks, args) -> list[dict]:
    """Both variants in turns: name, losses, seconds, and on a GPU the peak memory of each."""
    on_gpu, rows, steps = ranks.device.type == "cuda", [], []
    for name in pair:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        step = make_step(name, config, ranks, args.text, args.scored)
        losses = [step()]  # the moments are made here
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        losses.append(step())
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        steps.append(step)
        rows.append({"name": name, "losses": losses, "seconds": [], "peak_bytes": peak})
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
    """A pair on `world` processes, printed: rank 0's rows, with the memory of the fullest rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(work, (world, port, pair, args, found), world)  # raises what a rank does
    ranks = dict(found.get() for _ in range(world))
    ours, theirs = ranks[0]
    turns = zip(ours["seconds"], theirs["seconds"], strict=True)
    ratio = f"  {median(a / b for a, b in turns):.2f} times {pair[1]}"
    for place, row in enumerate((ours, theirs)):
        memory = ""
        if row["peak_bytes"] is not None:
            row["peak_bytes"] = max(rows[place]["peak_bytes"] for rows in ranks.values())
            memory = f"  peak {row['peak_bytes'] / 1e6:,.0f} MB a rank"
        print(f"{world} ranks  {row['name']:20} {1e3 * median(row['seconds']):8,.0f} ms a step"
              f"{memory}{ratio if row is ours else ''}", flush=True)
    return [ours, theirs]


@one_line("bench_zero.py")
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default=DEMO[0], help="folder of the frozen LLM, or a size [%(default)s]")
    add("--vision", default=DEMO[1], help="folder of the vision tower, or a size [%(default)s]")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="[1 2 4]")
    add("--runs", type=int, default=5, help="turns [%(default)s]")
    add("--dtype", default="auto", help=f"compute in one of {', '.join(CHOICES)} [%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--rows", type=int, default=4, help="of a rank in a step [%(default)s]")
    add("--text", type=int, default=100, help="tokens of a row beside its image [%(default)s]")
    add("--scored", type=int, default=20, help="of them [%(default)s]")
    args = parser.parse_args(argv)
    if min(*args.ranks, args.runs, args.rows, args.text, args.scored) < 1:
        raise ValueError("--ranks, --runs, --rows, --text, --scored: 1 or more")
    args.dtype, why = choose_dtype(args.dtype, choose_device())
    print(f"computing in {args.dtype}: {why}", flush=True)
    frozen_config(args.llm, "llama"), frozen_config(args.vision, "clip")  # says what is missing
    pairs = {world: PAIRS if world > 1 else PAIRS[:1] for world in args.ranks}  # alone all are one
    return [row for world in args.ranks for pair in pairs[world]
            for row in measure(world, pair, args)]


if __name__ == "__main__":
    main()
