"""ZeRO's stages beside torch's DDP and FSDP2: the time of a training step.

    torchrun --nproc_per_node 2 -m speed.bench_zero [--llm FOLDER] [--vision FOLDER]

- All train one IAA model on the same rows from the same random weights, with AdamW and clipping;
  only sizes are read from the folders, or from the name of a size.
- Stages 0 to 2 are paired with DDP, stage 3 with FSDP2 (`fully_shard` of each layer), with the
  frozen models in shards and whole. The two of a pair take turns, so that whatever else the machine
  does hits both. A ratio is the median of the ratios within a turn, below 1 where ours is faster.
- What a rank holds and sends is said by `python -m training.plan`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from clip import Clip, ClipLayer
from common.device import CHOICES, DTYPES, Ranks, choose_dtype
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


def compare(pair: tuple[str, str], args: argparse.Namespace, ranks: Ranks) -> list[dict]:
    """Both variants of a pair in turns: a row each with its name, losses and seconds."""
    stage = StageConfig("bench", ["none"], 1000, adaptor=WORKFLOW, warmup=0.0,  # the peak rate
                        batch=args.rows * ranks.world, micro_batch=args.rows)
    config = Config("none", args.llm, args.vision, "none", [stage], insertion=args.inserted,
                    dtype=args.dtype, shard_frozen="whole" not in pair[0])
    steps = {name: make_step(name, config, ranks, args.text, args.scored) for name in pair}
    rows = [{"name": name, "losses": [step()], "seconds": []} for name, step in steps.items()]
    for _ in range(args.runs):
        for row in rows:
            ranks.barrier()
            start = time.perf_counter()
            row["losses"].append(steps[row["name"]]())
            ranks.barrier()  # it reads a number of the device, so the device is done too
            row["seconds"].append(time.perf_counter() - start)
    ours, theirs = (row["seconds"] for row in rows)
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    ranks.print0(f"{pair[0]:20} {1e3 * median(ours):8,.0f} ms a step  {ratio:.2f} times {pair[1]}")
    ranks.print0(f"{pair[1]:20} {1e3 * median(theirs):8,.0f} ms a step")
    return rows


@one_line("bench_zero.py")
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default=DEMO[0], help="folder of the frozen LLM, or a size [%(default)s]")
    add("--vision", default=DEMO[1], help="folder of the vision tower, or a size [%(default)s]")
    add("--runs", type=int, default=5, help="turns [%(default)s]")
    add("--dtype", default="auto", help=f"compute in one of {', '.join(CHOICES)} [%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--rows", type=int, default=4, help="of a rank in a step [%(default)s]")
    add("--text", type=int, default=100, help="tokens of a row beside its image [%(default)s]")
    add("--scored", type=int, default=20, help="of them [%(default)s]")
    args = parser.parse_args(argv)
    if min(args.runs, args.rows, args.text, args.scored) < 1:
        raise ValueError("--runs, --rows, --text, --scored: 1 or more")
    with Ranks(600) as ranks:
        names = list(DTYPES)
        name, why = choose_dtype(args.dtype, ranks.device)
        chosen = ranks.sum(names.index(name) if ranks.rank == 0 else 0)  # a rank may time otherwise
        args.dtype = names[int(chosen)]
        ranks.print0(f"{ranks.world} ranks, computing in {args.dtype}: {why}")
        pairs = PAIRS if ranks.world > 1 else PAIRS[:1]  # alone, all stages are one
        return [row for pair in pairs for row in compare(pair, args, ranks)]


if __name__ == "__main__":
    main()
