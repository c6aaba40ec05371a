"""zero.py on 1 to 4 gloo processes: the same weights as one process, bytes as the head says."""

import multiprocessing
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint import resume_state, save_state
from clip import Clip, ClipConfig
from config import Config, StageConfig
from data import Batch
from iaa import IAA, Adaptor, AdaptorConfig
from llama import DecoderLayer, Llama, LlamaConfig
from parts import parts
from ranks import Ranks
from train import Run, held_out_loss, make_optimizer, share_out, train_step
from zero import Unit, bytes_gathered, bytes_held, bytes_sent, timetable

STEPS = 20
IMAGE = 40  # the placeholder's token
ADAPTORS = {  # what is trained
    "c": AdaptorConfig((0, 2), "c"),
    "a": AdaptorConfig((0, 1), "a", own_embedding=False),
    "tied": AdaptorConfig(own_llm=True, own_embedding=False, own_head=False),  # all but one weight
    "projector": AdaptorConfig(own_embedding=False, own_head=False),
}


def tiny(kind: str) -> tuple[IAA, Adaptor]:
    """A model of odd sizes, so that shards are uneven, and an adaptor that is not at its start."""
    torch.manual_seed(0)
    llama = LlamaConfig(41, 12, 3, 2, 1, 6, 20, context=64, tied=kind in ("tied", "projector"))
    vision = ClipConfig(10, 2, 2, 14, 4, 8)  # 4 patches
    model = IAA(Llama(llama), Clip(vision), IMAGE)
    adaptor = Adaptor(ADAPTORS[kind], llama, vision.width)
    adaptor.copy_frozen(model.llama)
    for gate in adaptor.gates:
        torch.nn.init.normal_(gate.weight, std=0.1)
    model.adaptors["mm"] = adaptor
    return model, adaptor


def rows(step: int, number: int) -> list[Batch]:
    """Rows of a step: the second quarter has no picture, and in every fifth step none has."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for i in range(number):
        picture = step % 5 != 4 and not number // 4 <= i < number // 2
        tokens = torch.randint(0, 39, (1, 9), generator=generator)
        tokens[0, 1:5] = IMAGE if picture else tokens[0, 1:5]
        targets = torch.randint(0, 39, (1, 9), generator=generator)
        targets[0, : 5 + i % 3] = -100
        images = torch.randn(1, 3, 8, 8, generator=generator) if picture else None
        made.append(Batch(tokens, targets, images, None, None, torch.tensor([9]), []))
    return made


def join(made: list[Batch]) -> Batch:
    """Rows as one micro-batch."""
    images = [b.images for b in made if b.images is not None]
    return Batch(torch.cat([b.tokens for b in made]), torch.cat([b.targets for b in made]),
                 torch.cat(images) if images else None, None, None,
                 torch.cat([b.lengths for b in made]), [])


def cut(step: int, number: int, parts_: int, ranks: Ranks) -> list[Batch | None]:
    """This rank's micro-batches of a step that has `number` rows in `parts_` micro-batches."""
    made, size = rows(step, number), number // parts_
    cuts = [join(made[i : i + size]) for i in range(0, number, size)]
    mine = cuts[ranks.rank :: ranks.world]
    return mine + [None] * (-(-parts_ // ranks.world) - len(mine))


def open_state(kind: str, stage: StageConfig, ranks: Ranks, **settings):
    """Adaptor, state and optimizer of a run on tiny models."""
    config = Config("out", "llm", "vision", "images", [stage], dtype="fp32", **settings)
    model, adaptor = tiny(kind)
    for layer in (m for m in model.modules() if isinstance(m, DecoderLayer)):
        layer.recompute = config.recompute
    state = share_out(Run(config, ranks, model, {}, None), stage, adaptor)
    return adaptor, state, make_optimizer(state.masters, stage)


def whole_weights(state, adaptor: Adaptor) -> dict:
    """The adaptor's weights as numpy arrays, as they are saved."""
    with state.whole():
        return {name: w.detach().clone().numpy() for name, w in adaptor.named_parameters()}


def work(ranks: Ranks, kind: str, zero: int, number: int, cuts: int, **settings) -> dict:
    """Train for STEPS; losses, norms, weights and the bytes sent in the last step."""
    stage = StageConfig("s", ["x"], steps=STEPS, lr=1e-2, batch=number, zero=zero, warmup=0.1,
                        micro_batch=1)
    adaptor, state, optimizer = open_state(kind, stage, ranks, **settings)
    losses = []
    for step in range(STEPS):
        before = getattr(state, "sent", 0)
        batches = cut(step, number, cuts, ranks)
        losses.append(train_step(state, batches, optimizer, stage, step, ranks)[:2])
    sent = getattr(state, "sent", 0) - before
    held_out = held_out_loss(state, [join(rows(99, 4))])
    return {"losses": losses, "held_out": held_out, "sent": sent,
            "weights": whole_weights(state, adaptor)}


def child(rank: int, world: int, place: str, results, function, arguments, settings) -> None:
    """A rank: join the others by way of a file, work, send back the result."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=world)
    results.put((rank, function(Ranks(60), *arguments, **settings)))
    dist.destroy_process_group()


def on_ranks(world: int, function, *arguments, **settings) -> list:
    """function(ranks, ...) on `world` processes; their results in order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "train"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=child, args=(
            rank, world, f"{folder}/group", results, function, arguments, settings))
            for rank in range(world)]
        for process in started:
            process.start()
        try:
            found = dict(results.get(timeout=120) for _ in started)
            for process in started:
                process.join(30)
        finally:
            for process in started:
                process.kill()
    return [found[rank] for rank in range(world)]


def error(found: dict, expected: dict) -> float:
    """The largest relative difference of a weight tensor, a loss or a norm."""
    errors = [0.0]
    for name, weight in expected["weights"].items():
        difference = torch.tensor(found["weights"][name] - weight).norm()
        errors.append((difference / torch.tensor(weight).norm()).item())
    for pair, wanted in zip(found["losses"], expected["losses"], strict=True):
        errors += [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(pair, wanted, strict=True)]
    errors.append(abs(found["held_out"] - expected["held_out"]) / expected["held_out"])
    return max(errors)


@pytest.fixture(scope="module")
def alone():
    """work() on one process, whole batches; each case once."""
    made = {}

    def get(kind: str, number: int) -> dict:
        if (kind, number) not in made:
            made[kind, number] = work(Ranks(60), kind, 0, number, 1)
        return made[kind, number]

    return get
