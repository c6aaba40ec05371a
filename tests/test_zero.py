"""zero.py on 1 to 4 gloo processes: the same weights as one process, bytes as the head says."""

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import processes
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import iaa
from clip import Clip, ClipConfig
from common.device import DTYPES, Ranks
from data import Batch
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig, set_recompute
from train import Loss, held_out_loss, make_optimizer, train_step
from training.checkpoint import resume_state, save_state
from training.config import Config, StageConfig
from training.plan import bytes_held, bytes_sent
from training.zero import Unit, build_state, model_parts, timetable

STEPS = 10
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
    vision = ClipConfig(10, 2, 2, 14, 4, 8, feature_norm=True)  # 4 patches
    model = IAA(Llama(llama), Clip(vision), IMAGE)
    adaptor = Adaptor(ADAPTORS[kind], llama, vision.width)
    adaptor.init_from_frozen(model.llama)
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


def open_state(kind: str, stage: StageConfig, ranks: Ranks, dtype: str = "fp32", **settings):
    """Adaptor, state and optimizer of a run on tiny models."""
    config = Config("out", "llm", "vision", "images", [stage], dtype=dtype, **settings)
    model, adaptor = tiny(kind)
    model.llama.to(DTYPES[dtype])
    model.clip.to(DTYPES[dtype])
    set_recompute(model, config.recompute)
    loss = Loss(model, stage.adaptor, ranks.device)
    state = build_state(loss, model, stage.adaptor, stage.zero, ranks.world, ranks.device,
                        config.shard_frozen, config.reduce_fp32)
    return adaptor, state, make_optimizer(state.masters, stage)


def whole_weights(state, adaptor: Adaptor) -> dict:
    """The adaptor's weights as numpy arrays, as they are saved."""
    with state.gathered():
        return {name: w.detach().clone().numpy() for name, w in adaptor.named_parameters()}


def count_sent() -> list[int]:
    """The bytes that each of zero.py's collectives sends from now on, as they are called."""
    sent, all_gather, all_to_all = [], dist.all_gather_single, dist.all_to_all_single

    def gathering(output, own, **settings):
        sent.append(output.nbytes - own.nbytes)  # one's own shard to each of the others, in all
        return all_gather(output, own, **settings)

    def exchanging(output, own, **settings):
        sent.append(own.nbytes * (dist.get_world_size() - 1) // dist.get_world_size())
        return all_to_all(output, own, **settings)

    dist.all_gather_single, dist.all_to_all_single = gathering, exchanging
    return sent


def work(
    ranks: Ranks, kind: str, zero: int, number: int, cuts: int, steps: int = STEPS, **settings
) -> dict:
    """Train for some steps; losses, norms, weights and the bytes sent in the last step."""
    stage = StageConfig("s", ["x"], steps=STEPS, lr=1e-2, batch=number, zero=zero, warmup=0.1,
                        micro_batch=1)
    adaptor, state, optimizer = open_state(kind, stage, ranks, **settings)
    losses, sent = [], count_sent() if ranks.world > 1 else []
    for step in range(steps):
        before = sum(sent)
        batches = cut(step, number, cuts, ranks)
        losses.append(train_step(state, batches, optimizer, stage, step, ranks)[:2])
    sent = sum(sent) - before
    held_out = held_out_loss(state, [join(rows(99, 4))])
    return {"losses": losses, "held_out": held_out, "sent": sent,
            "weights": whole_weights(state, adaptor)}


def joined(function, arguments: tuple, settings: dict):
    """On a rank: join the group, work, with the loss in pieces, computed again in backward."""
    iaa.LOSS_ROWS = 3
    with Ranks(60) as ranks:
        return function(ranks, *arguments, **settings)


def on_ranks(world: int, function, *arguments, **settings) -> list:
    """function(ranks, ...) on `world` processes; their results in order."""
    with processes(world, joined, function, arguments, settings) as (_, result):
        found = dict(result(600) for _ in range(world))
    for one in found.values():
        if isinstance(one, Exception):
            raise one
    return [found[rank] for rank in range(world)]


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


@pytest.fixture(scope="module")
def alone():
    """work() on one process, whole batches; each case once."""
    made = {}

    def get(kind: str, number: int) -> dict:
        if (kind, number) not in made:
            made[kind, number] = work(Ranks(60), kind, 0, number, 1)
        return made[kind, number]

    return get


@pytest.mark.parametrize("kind, world, zero, number, cuts, settings", [
    ("c", 1, 0, 16, 4, {}),
    ("a", 3, 0, 12, 4, {}),  # 4 micro-batches among 3 ranks
    ("projector", 2, 1, 16, 8, {}),  # a rank whose loss reaches no trained weight
    ("tied", 3, 2, 12, 4, {"reduce_fp32": True}),
    ("tied", 2, 3, 16, 8, {"recompute": True}),
    ("projector", 4, 3, 16, 2, {}),  # two ranks without any rows
    ("c", 2, 3, 16, 2, {"shard_frozen": False}),
])
def test_as_one_process(alone, kind, world, zero, number, cuts, settings):
    """Ten steps, some rows or ranks without a picture: losses, norms and weights within 1e-5."""
    arguments = (work, kind, zero, number, cuts)
    found = on_ranks(world, *arguments, **settings) if world > 1 else [
        work(Ranks(60), *arguments[1:])]
    expected = alone(kind, number)
    start = {name: w.detach().numpy() for name, w in tiny(kind)[1].named_parameters()}
    assert error({**expected, "weights": start}, expected) > 1e-2  # training has changed them
    for one in found:
        assert error(one, expected) < 1e-5


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


def test_timetable_of_a_tied_model():
    """Every unit once in forward order, then in backward order; the tied head is the embedding's.
    """
    model, adaptor = tiny("tied")
    units, stops, turn = timetable(model, "mm", 3, True)
    llm, names = adaptor.llm, []
    for stop in stops:
        for name, module in model.named_modules():
            if module is stop.module:
                names.append(name.rpartition("llm.")[2].rpartition("mm.")[2])
    layers = [f"layers.{i}" for i in range(3)]
    assert names == ["embedding", "clip", "projector", *layers, "norm",
                     "norm", *layers[::-1], "projector", "embedding"]
    assert stops[0].unit is stops[turn].unit is stops[-1].unit
    assert {*llm.embedding.parameters(), *llm.norm.parameters()} == set(stops[0].unit.weights)
    assert [stop.reduce for stop in stops[turn:]] == [False, True, True, True, True, True]
    assert [stop.gather for stop in stops[turn:]] == [True, True, True, True, True, False]
    unused = [unit for unit in units if unit not in [stop.unit for stop in stops]]
    assert {w for unit in unused for w in unit.weights} == set(model.llama.parameters())


def held(ranks: Ranks, kind: str, zero: int, cuts: int, dtype: str) -> dict:
    """Bytes by kind, from live tensors, when a step's gradients are complete; the most gathered."""
    stage = StageConfig("s", ["x"], steps=STEPS, zero=zero, micro_batch=1)
    adaptor, state, optimizer = open_state(kind, stage, ranks, dtype)
    found, most, gather = {}, [0], Unit.gather_if_freed

    def watched(unit: Unit) -> None:
        gather(unit)
        filled = sum(u.flat.untyped_storage().nbytes() for u in state.units)
        most[0] = max(most[0], filled)

    def measure(*_) -> None:
        masters = list(state.masters.values())
        trained = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes()
                   for w in adaptor.parameters()}
        gradients = [w.grad for w in [*masters, *adaptor.parameters()] if w.grad is not None]
        gradients = {g.data_ptr(): g.nbytes for g in gradients}
        frozen = sum(u.shard.nbytes for u in state.units if not u.trained) if zero else 0
        found.update({
            "trained weights": sum(trained.values()) if zero else 0,
            "fp32 masters": sum(m.nbytes for m in masters),
            "gradients": sum(gradients.values()), "frozen weights": frozen})

    def reduce(unit: Unit, dtype: torch.dtype) -> tuple:
        waiting = [u.gradient.nbytes for u in state.units if u.gradient is not None]
        found["waiting"] = max(found.get("waiting", 0), sum(waiting))
        return reduce_unit(unit, dtype)

    reduce_unit = Unit.start_reduce_scatter
    if zero:
        Unit.gather_if_freed, Unit.start_reduce_scatter = watched, reduce
    optimizer.register_step_pre_hook(measure)
    for step in range(2):
        train_step(state, cut(step, 48, cuts, ranks), optimizer, stage, step, ranks)
    moments = [v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    return {**found, "moments": sum(moments), "most": most[0]}


@pytest.mark.parametrize("kind, zero, world, dtype", [
    ("c", 0, 2, "fp32"), ("c", 1, 2, "bf16"), ("a", 2, 2, "fp32"), ("tied", 3, 3, "fp32")])
def test_bytes_held_are_the_formula(kind, zero, world, dtype):
    """State counted from live tensors equals `bytes_held`; of the units stage 3 gathers two."""
    model, _ = tiny(kind)
    units, stops, _ = timetable(model, "mm", zero, True)
    expected = bytes_held(units, zero, world, 2, DTYPES[dtype].itemsize)
    if zero == 0:  # DDP's buckets are not seen from here
        expected["gradients"] //= 2
    largest = max(4 * unit.padded(world) for unit in units if unit.trained)
    for one in on_ranks(world, held, kind, zero, 2 * world, dtype):
        most, waiting = one.pop("most"), one.pop("waiting", 0)
        if zero == 1:  # whole gradients, in fp32, until they are reduced with the last micro-batch
            one["gradients"] = max(one["gradients"], waiting)
        else:
            assert waiting <= largest
        assert one == expected
        gathered = [4 * stop.unit.padded(world) for stop in stops if stop.gather]
        assert zero != 3 or most == max(a + b for a, b in pairwise(gathered))
    if zero == 3:  # all of it 1 / N, but for padding
        size = sum(w.numel() for w in tiny(kind)[0].parameters())
        trained = sum(w.numel() for unit in units if unit.trained for w in unit.weights)
        assert sum(expected.values()) < (16 * trained + 4 * (size - trained)) / world * 1.05


@pytest.mark.parametrize("zero, cuts, times, shard_frozen", [
    (1, 8, 2, False), (2, 2, 2, False), (2, 8, 5, False), (3, 2, 3, False), (3, 2, 3, True)])
def test_bytes_sent_are_the_formula(zero, cuts, times, shard_frozen):
    """Counted at every collective: 2 a weight (times its size) at stage 1 and 2, 3 at stage 3.

    At stage 2, one more for each further micro-batch; at 3, 2 a frozen weight if it is in shards.
    """
    model, adaptor = tiny("c")
    units, stops, _ = timetable(model, "mm", zero, shard_frozen)
    size = 4 * sum(w.numel() for w in adaptor.parameters()) / 2  # (N - 1) / N of fp32
    frozen = 4 * sum(u.padded(1) for u in units if not u.trained) / 2
    found = on_ranks(2, work, "c", zero, 16, cuts, steps=1, shard_frozen=shard_frozen)
    for one in found:
        assert one["sent"] == bytes_sent(units, stops, zero, 2, cuts // 2, 4, 4)
        assert one["sent"] <= (times * size + 2 * frozen) * 1.01  # padding


def ddp_sent(ranks: Ranks) -> int:
    """Bytes of a step's buckets, each all-reduced."""
    stage = StageConfig("s", ["x"], steps=STEPS, zero=0, micro_batch=1)
    _, state, optimizer = open_state("c", stage, ranks)
    buckets = []

    def count(group, bucket):
        buckets.append(bucket.buffer().nbytes)
        return allreduce_hook(group, bucket)

    state.run.register_comm_hook(None, count)
    train_step(state, cut(0, 16, 4, ranks), optimizer, stage, 0, ranks)
    return sum(buckets)


def test_bytes_sent_by_ddp():
    """Stage 0: every gradient is in one all-reduce, which sends 2 (N - 1) / N of its bytes."""
    units, stops, _ = timetable(tiny("c")[0], "mm", 0, False)
    expected = bytes_sent(units, stops, 0, 2, 2, 4, 4)
    assert [2 * sent // 2 for sent in on_ranks(2, ddp_sent)] == [expected, expected]


def resumed(ranks: Ranks, folder: str, zero: int, first: int, last: int) -> dict:
    """Go on from the newest checkpoint in the folder, train to step `last`, save another."""
    stage = StageConfig("s", ["x"], steps=STEPS, lr=1e-2, batch=16, zero=zero, micro_batch=4,
                        warmup=0.1)
    adaptor, state, optimizer = open_state("c", stage, ranks)
    assert resume_state(Path(folder), ranks, state, optimizer, asdict(stage)) == first
    losses = [train_step(state, cut(step, 16, 4, ranks), optimizer, stage, step, ranks)[:2]
              for step in range(first, last)]
    save_state(Path(folder), ranks, state, optimizer, asdict(stage), last)
    return {"losses": losses, "weights": whole_weights(state, adaptor)}


def test_resume_on_other_ranks_and_stages(alone, tmp_path):
    """2 ranks at stage 3, then 4 at stage 2, then 1: the losses and weights of an unbroken run."""
    found = []
    for world, zero, first, last in ((2, 3, 0, 3), (4, 2, 3, 6), (3, 1, 6, 8)):
        found.append(on_ranks(world, resumed, str(tmp_path), zero, first, last)[0])
    found.append(resumed(Ranks(60), str(tmp_path), 3, 8, STEPS))
    whole = {**alone("c", 16), "losses": [pair for one in found for pair in one["losses"]],
             "weights": found[-1]["weights"]}
    assert error(whole, alone("c", 16)) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000008", "step-000010"]


def test_sets_without_a_manifest_are_ignored(tmp_path):
    """What a killed save left is neither resumed from nor in the way of the next save."""
    resumed(Ranks(60), str(tmp_path), 0, 0, 2)
    left = tmp_path / "step-000004"
    left.mkdir()
    (left / "rank-0-of-2.safetensors").write_bytes(b"cut short")
    (tmp_path / ".adaptor.123.tmp").mkdir()
    (tmp_path / ".log.0123.tmp.jsonl").touch()  # of a file that was being written
    resumed(Ranks(60), str(tmp_path), 0, 2, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000004"]
    (tmp_path / "step-000004" / "rank-0-of-1.safetensors").unlink()
    with pytest.raises(ValueError, match="rank-0-of-1.safetensors: missing or broken"):
        resumed(Ranks(60), str(tmp_path), 0, 4, 5)


def poisoned(ranks: Ranks, zero: int) -> list:
    """Steps of which the second has a NaN on the last rank only, in its last micro-batch."""
    stage = StageConfig("s", ["x"], steps=STEPS, zero=zero, micro_batch=1)
    adaptor, state, optimizer = open_state("c", stage, ranks)
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


@pytest.mark.parametrize("zero", [0, 3])
def test_a_step_that_is_not_finite_is_skipped_by_all(zero):
    """NaN on one rank: no rank updates, the weights stay finite, the next step is done."""
    assert on_ranks(2, poisoned, zero) == [[True, False, True, True]] * 2
