"""zero.py on 1 to 4 gloo processes: the same weights as one process, bytes as the head says."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import processes
from torch import Tensor

import iaa
from clip import Clip, ClipConfig
from common.device import DTYPES, Ranks
from data import Batch
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig, set_recompute
from train import batch_loss, held_out_loss, make_optimizer, train_step
from training.checkpoint import resume_state, save_state
from training.config import Config, StageConfig
from training.log import Row
from training.plan import memory_and_traffic
from training.zero import Unit, build_state, model_parts, timetable

STEPS = 6
IMAGE = 40  # the placeholder's token
ADAPTORS = {  # what is trained
    "c": AdaptorConfig((0, 2), "c"),
    "a": AdaptorConfig((0, 1), "a", own_embedding=False),
    "tied": AdaptorConfig(own_llm=True, own_embedding=False, own_head=False),  # all but one weight
    "projector": AdaptorConfig(own_embedding=False, own_head=False),
    "layers": AdaptorConfig((0, 2), "c"),  # its ends are constants
}
AS_ONE = [  # ranks, kind, ZeRO stage, rows, micro-batches, settings
    (1, "c", 0, 16, 4, {}),
    (2, "c", 1, 16, 4, {"dtype": "bf16"}),  # for the bytes only
    (2, "c", 2, 16, 8, {}),
    (2, "c", 3, 16, 2, {"shard_frozen": False}),
    (2, "projector", 1, 16, 8, {}),  # a rank whose loss reaches no trained weight
    (2, "tied", 3, 16, 8, {"recompute": True}),
    (2, "layers", 2, 16, 4, {}),
    (2, "layers", 3, 16, 4, {}),
    (3, "a", 0, 12, 4, {}),  # 4 micro-batches among 3 ranks
    (3, "tied", 2, 12, 4, {"reduce_fp32": True}),
    (4, "projector", 3, 16, 2, {}),  # two ranks without any rows
]
RESUMED = [(2, 3, 0, 2), (3, 1, 2, 4), (4, 2, 4, 5), (1, 0, 5, STEPS)]  # ranks, stage, first, last


def tiny(kind: str) -> tuple[IAA, Adaptor]:
    """A model of odd sizes, so that shards are uneven, and an adaptor that is not at its start."""
    torch.manual_seed(0)
    llama = LlamaConfig(41, 12, 3, 2, 1, 6, 20, context=64, tied=kind in ("tied", "projector"))
    vision = ClipConfig(10, 2, 2, 14, 4, 8, feature_norm=True)  # 4 patches
    model = IAA(Llama(llama), Clip(vision), IMAGE)
    adaptor = Adaptor(ADAPTORS[kind], llama, vision.width)
    adaptor.init_from_frozen(model.llama)
    for gate in adaptor.gates:
        torch.nn.init.normal_(gate.weight, std=0.1)
    if kind == "layers":
        adaptor.freeze_embedding_and_head(torch.float32, "cpu")
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


def settings_of(zero: int, number: int, cuts: int, **settings) -> tuple[Config, StageConfig]:
    """The configuration of a run on tiny models, and its stage."""
    stage = StageConfig("s", ["x"], steps=STEPS, lr=1e-2, batch=number, micro_batch=number // cuts,
                        zero=zero, warmup=0.1)
    settings = {"dtype": "fp32"} | settings
    return Config("out", "llm", "vision", "images", [stage], **settings), stage


def open_state(kind: str, config: Config, ranks: Ranks):
    """Adaptor, state and optimizer of a run on tiny models."""
    (model, adaptor), (stage,) = tiny(kind), config.stage
    model.llama.to(DTYPES[config.dtype])
    model.clip.to(DTYPES[config.dtype])
    set_recompute(model, config.recompute)
    state = build_state(partial(batch_loss, model, "mm", ranks.device), model, "mm", stage.zero,
                        ranks.world, ranks.device, config.shard_frozen, config.reduce_fp32)
    return adaptor, state, make_optimizer(state.masters, stage)


def whole_weights(state, adaptor: Adaptor) -> dict:
    """The adaptor's weights as numpy arrays, as they are saved."""
    with state.gathered():
        return {name: w.detach().clone().float().numpy() for name, w in adaptor.named_parameters()}


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextlib.contextmanager
def measured(state, adaptor: Adaptor, optimizer: torch.optim.AdamW) -> Iterator[dict]:
    """Of the last step: bytes by kind, from live tensors, as AdamW begins; the most gathered; the
    most that waits to be reduced; the bytes of all buffers that collectives send."""
    found, (model,) = {"most": 0, "waiting": 0}, state.loss.args[:1]
    gather, reduce, reduce_all = Unit.gather_if_freed, Unit.start_reduce_scatter, dist.all_reduce

    def gathering(unit: Unit) -> None:
        gather(unit)
        found["most"] = max(found["most"], stored(u.flat for u in state.units))

    def reducing(unit: Unit, dtype: torch.dtype) -> tuple:
        waiting = stored(u.gradient for u in state.units if u.gradient is not None)
        found["waiting"] = max(found["waiting"], waiting)
        return reduce(unit, dtype)

    def held(*_) -> None:
        weights = [*state.masters.values(), *adaptor.parameters()]
        trained = [w for w in adaptor.parameters() if w.requires_grad]
        frozen = [w for w in model.parameters() if not w.requires_grad]
        if state.zero == 3 and len(state.units) > len(state.trained):
            frozen = [unit.shard for unit in state.units if not unit.trained]
        found.update({"frozen weights": stored(frozen),
                      "trained weights": stored(trained) if state.zero else 0,
                      "fp32 masters": stored(state.masters.values()),
                      "gradients": stored(w.grad for w in weights if w.grad is not None)})

    def counted(call):
        def collective(output: Tensor, source: Tensor, **settings):
            found["sent"] += max(output.nbytes, source.nbytes)
            return call(output, source, **settings)
        return collective

    def all_reduce(tensor: Tensor) -> None:
        # A reduce_scatter and an all_gather. A single number is a loss, a norm or a count.
        found["sent"] += 2 * tensor.nbytes if tensor.ndim else 0
        reduce_all(tensor)

    optimizer.register_step_pre_hook(held)
    with mock.patch.multiple(Unit, gather_if_freed=gathering, start_reduce_scatter=reducing), \
         mock.patch.multiple(dist, all_reduce=all_reduce,
                             all_gather_single=counted(dist.all_gather_single),
                             reduce_scatter_single=counted(dist.reduce_scatter_single)):
        yield found
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    found["moments"] = stored(moments)


def work(
    ranks: Ranks, kind: str, zero: int, number: int, cuts: int, settings: dict,
    folder: str = "", first: int = 0, last: int = STEPS
) -> dict:
    """Train for some steps; losses, norms, weights, bytes. folder: of checkpoints to go on from."""
    config, stage = settings_of(zero, number, cuts, **settings)
    adaptor, state, optimizer = open_state(kind, config, ranks)
    if folder:
        assert resume_state(Path(folder), ranks, state, optimizer, asdict(stage)) == first
    losses = []
    with measured(state, adaptor, optimizer) as found:
        for step in range(first, last):
            found["sent"] = 0
            batches = cut(step, number, cuts, ranks)
            losses.append(train_step(state, batches, optimizer, stage, step, ranks)[:2])
    if folder:
        save_state(Path(folder), ranks, state, optimizer, asdict(stage), last)
    return {"losses": losses, "held_out": held_out_loss(state, [join(rows(99, 4))]),
            "weights": whole_weights(state, adaptor), "bytes": found}


def poisoned(ranks: Ranks, zero: int) -> list:
    """Steps of which the second has a NaN on the last rank only, in its last micro-batch."""
    config, stage = settings_of(zero, 16, 4)
    adaptor, state, optimizer = open_state("c", config, ranks)
    before = whole_weights(state, adaptor)
    done = []
    for step in range(3):
        batches = cut(step, 16, 4, ranks)
        if step == 1 and ranks.rank == ranks.world - 1:
            batches[-1].images[0, 0, 0, 0] = float("nan")
        done.append(train_step(state, batches, optimizer, stage, step, ranks)[2])
    after = whole_weights(state, adaptor)
    assert all((after[name] != before[name]).any() for name in after)
    return done + [all(torch.tensor(w).isfinite().all().item() for w in after.values())]


def joined(cases: list[tuple]) -> list:
    """On a rank: join the group, do all cases, with the loss in pieces, run again in backward."""
    iaa.LOSS_ROWS = 3
    with Ranks(60) as ranks:
        return [function(ranks, *arguments) for function, *arguments in cases]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """A function: ranks, what they do and with what -> result of each rank; one launch for all."""
    folder = str(tmp_path_factory.mktemp("resumed"))
    cases = [(world, work, *case) for world, *case in AS_ONE]
    cases += [(world, work, "c", zero, 16, 4, {}, folder, first, last)
              for world, zero, first, last in RESUMED]
    cases += [(2, poisoned, 0), (2, poisoned, 3)]
    found = []
    for world in (2, 3, 4, 1):
        mine = [case for case in cases if case[0] == world]
        with processes(world, joined, [case[1:] for case in mine]) as (_, result):
            ranks = dict(result(600) for _ in range(world))
        for error in ranks.values():
            if isinstance(error, Exception):
                raise error
        results = zip(*(ranks[rank] for rank in range(world)), strict=True)
        found += zip(mine, map(list, results), strict=True)

    def get(*case) -> list:
        return next(results for key, results in found if key[: len(case)] == case)

    get.resumed = [results[0] for key, results in found if folder in key]
    get.left = sorted(path.name for path in Path(folder).iterdir())
    return get


def error(found: dict, expected: dict) -> float:
    """The largest relative difference of a weight tensor, a loss or a norm; NaN if one is."""
    errors = []
    for name, weight in expected["weights"].items():
        difference = torch.tensor(found["weights"][name] - weight).norm()
        errors.append((difference / torch.tensor(weight).norm()).item())
    for pair, wanted in zip(found["losses"], expected["losses"], strict=True):
        errors += [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(pair, wanted, strict=True)]
    errors.append(abs(found["held_out"] - expected["held_out"]) / expected["held_out"])
    return torch.tensor(errors).max().item()  # Python's max passes over NaN


@cache
def alone(kind: str, number: int) -> dict:
    """work() on one process, whole batches."""
    return work(Ranks(60), kind, 0, number, 1, {})


@pytest.mark.parametrize("world, kind, zero, number, cuts, settings", AS_ONE)
def test_as_one_process(on_ranks, world, kind, zero, number, cuts, settings):
    """Some steps, rows or ranks without a picture: losses, norms and weights within 1e-5."""
    expected = alone(kind, number)
    start = {name: w.detach().numpy() for name, w in tiny(kind)[1].named_parameters()}
    assert error({**expected, "weights": start}, expected) > 1e-2  # training has changed them
    for one in on_ranks(world, work, kind, zero, number, cuts, settings):
        assert "dtype" in settings or error(one, expected) < 1e-5


@pytest.mark.parametrize("world, kind, zero, number, cuts, settings", AS_ONE)
def test_bytes_are_planned(on_ranks, world, kind, zero, number, cuts, settings):
    """Those of live tensors and collectives equal the plan, and are at most zero.py's table."""
    (model, _), (config, stage) = tiny(kind), settings_of(zero, number, cuts, **settings)
    model.llama.to(DTYPES[config.dtype])
    planned, sent = memory_and_traffic(model, config, stage, Row(9, 3), world)
    moving = [planned.pop(key) for key in ("activations", "units in transit")][1]
    units, _, _ = timetable(model, "mm", zero, config.shard_frozen)
    r, c = 4 if config.reduce_fp32 else model.llama.dtype.itemsize, model.llama.dtype.itemsize
    largest = r * max(unit.padded(world) for unit in units if unit.trained)
    p, f = (sum(w.numel() for w in model.parameters() if w.requires_grad == trained)
            for trained in (True, False))
    a, f = -(-cuts // world), f if config.shard_frozen else 0
    most_sent = {0: 8 * p, 1: (r + c) * p, 2: (a * r + c) * p,
                 3: a * ((r + 2 * c) * p + 2 * c * f)}[zero]
    for one in on_ranks(world, work, kind, zero, number, cuts, settings):
        found = one["bytes"]
        most, waiting = found.pop("most"), found.pop("waiting")
        assert found.pop("sent") * (world - 1) // world == sent
        assert sent <= most_sent * (world - 1) / world * 1.02  # padding
        if zero == 1:  # whole gradients, in fp32, until they are reduced with the last micro-batch
            found["gradients"] = max(found["gradients"], waiting)
        else:
            assert waiting <= largest
        assert zero != 3 or most == moving - 2 * largest  # two units
        assert found == planned
    if zero == 3 and config.shard_frozen:  # all of it 1 / N, but for padding
        assert sum(planned.values()) < (16 * p + 4 * f) / world * 1.05


@pytest.mark.parametrize("tied", [False, True])
def test_the_ends_of_an_own_llm_can_be_frozen(tied):
    """`trains = "layers"` of the LLaVA baseline: its layers and the projector are left."""
    model, _ = tiny("tied" if tied else "c")
    adaptor = Adaptor(ADAPTORS["tied"], model.llama.config, model.clip.config.width)
    adaptor.freeze_embedding_and_head(torch.float32, "cpu")
    trained = {name.split(".")[0] + "." + name.split(".")[1]
               for name, weight in adaptor.named_parameters() if weight.requires_grad}
    assert trained == {"projector.up", "projector.down", "llm.layers"}


@pytest.mark.parametrize("kind", ADAPTORS)
def test_parts_are_called_in_their_order(kind):
    """`model_parts` lists the parts as the forward pass calls them; nothing trained is missed."""
    model, adaptor = tiny(kind)
    listed, called = model_parts(model, "mm"), []
    for number, part in enumerate(listed):
        part.module.register_forward_pre_hook(lambda *_, n=number: called.append(n))
    batch = join(rows(0, 4))
    model.loss(batch.tokens, batch.targets, "mm", batch.images)
    assert called == list(range(len(listed)))
    assert {w for part in listed for w in part.weights} >= set(adaptor.parameters())


def test_resume_on_other_ranks_and_stages(on_ranks):
    """2 ranks at stage 3, then 3 at 1, 4 at 2, then 1: losses and weights of an unbroken run."""
    losses = [pair for part in on_ranks.resumed for pair in part["losses"]]
    assert error({**on_ranks.resumed[-1], "losses": losses}, alone("c", 16)) < 1e-5
    assert on_ranks.left == ["step-000005", "step-000006"]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_that_is_not_finite_is_skipped_by_all(on_ranks, zero):
    """NaN on one rank: no rank updates, the weights stay finite, the next step is done."""
    assert on_ranks(2, poisoned, zero) == [[True, False, True, True]] * 2
