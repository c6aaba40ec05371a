"""ZeRO by hand: training state shared out over the ranks, on plain collectives and flat buffers.

Training a weight in mixed precision takes far more than the weight: an fp32 master copy, AdamW's
two moments, a gradient. Data-parallel ranks that all hold all of it hold N copies of the same
numbers. ZeRO (arXiv 1910.02054) keeps one, in N pieces, and moves pieces when they are needed.

What a rank holds, in bytes, for P trained and F frozen weights, N ranks; a weight that computes
takes c bytes (2 in bf16, 4 in fp32), a gradient on its way r (c, or 4 with `reduce_fp32`):

    stage                      computes   master   moments   gradients        frozen
    0  torch's DDP                 -         4P        8P    4P + 4P buckets    cF
    1  optimizer shared out       cP       4P/N      8P/N    4P/N (or 4P*)      cF
    2  gradients too              cP       4P/N      8P/N    4P/N               cF
    3  weights too                 -       4P/N      8P/N    4P/N               cF/N (or cF)

At stage 0 the fp32 weights are their own masters. (*) with gradient accumulation: at every stage
micro-batches are added up in fp32, at this one before anything is sent. While a pass runs, stages
2 and 3 also hold the gradients of two units, r bytes a weight (one on its way, one being filled),
and stage 3 the weights of two units, c bytes each (one in use, the next on its way). A *unit* is
what is gathered together: a decoder layer, an embedding, a head with its norm.

What a rank sends in a step, with A micro-batches, each term times (N - 1)/N:

    0   8P                 an all-reduce is a reduce-scatter and an all-gather
    1   rP + cP            reduce-scatter of gradients, all-gather of updated weights
    2   A rP + cP          the same, but only a shard of the gradients is kept
    3   A (rP + 2cP)       weights are gathered for forward and for backward, gradients reduced
        + 2 A cF           the frozen ones likewise; nothing with `shard_frozen` off
                           (less: the last unit stays for backward, where weights that are only
                           looked up, and those below `no_grad`, are not read again)

`bytes_held` and `bytes_sent` say it exactly, with padding: a shard has ceil(n / N) elements.

**Why it cannot hang.** A collective hangs when ranks disagree on which comes next, and what a rank
computes depends on its rows: no picture, no projector; no rows, nothing at all. So no collective
is started because a module ran. All of them stand in a *timetable*, one list of stops computed
from the model alone: each unit in forward order, then each in backward order. A module that is
about to run calls `walk(its stop)`, which goes through the list up to there, joining the
collectives on the way, also those of units that this rank does not use. The end of the forward
pass walks to the turn of the list, the end of the backward pass to its end. All ranks walk the
same list, some stops with nobody getting on.

**The hooks**, all in `Sharded.watch`: before a part runs, walk to its forward stop; when the
gradient of its output is there, walk to its backward stop. Autograd runs nodes in the reverse of
the order in which they were made, so that by then all units after this one have their gradients.

**Freed and filled again.** Weights are views into their unit's flat buffer. Freeing it is resizing
its storage to zero: tensors that autograd saved for backward keep pointing there, and find the
weights again once the unit is gathered. Recomputation (`recompute`) happens between the same stops.

A weight without a gradient in a step has a gradient of zero, at every stage and on one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MASTER = 4  # bytes of an fp32 number


class Unit:
    """Weights that are gathered together, side by side in one flat buffer.

    Each of the N ranks keeps its `shard`, the rank-th N-th of the buffer: fp32 masters of trained
    weights, a piece of frozen ones as they are.
    """

    def __init__(self, weights: list[nn.Parameter]):
        if len({(w.requires_grad, w.dtype) for w in weights}) > 1:
            raise ValueError("a unit's weights must be of one dtype, and all trained or all frozen")
        self.weights = weights
        self.trained = weights[0].requires_grad
        self.numel = sum(w.numel() for w in weights)

    def padded(self, world: int) -> int:
        """Elements of the flat buffer: a multiple of the ranks."""
        return -(-self.numel // world) * world

    def open(self, dtype: torch.dtype, device: torch.device, whole: bool) -> None:
        """Allocate, fill the shard, make the weights views; `whole`: the buffer stays filled."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.size = self.padded(world) // world
        self.first = rank * self.size
        master = torch.float32 if self.trained else dtype
        self.shard = torch.zeros(self.size, dtype=master, device=device)
        for weight, there, here in self.overlaps():
            self.shard[here] = weight.detach().flatten()[there]
        self.shard.requires_grad_(self.trained)
        self.flat = torch.zeros(self.size * world, dtype=dtype, device=device)
        for weight, start in zip(self.weights, self.starts(), strict=True):
            view = self.flat[start : start + weight.numel()].view(weight.shape)
            if whole:
                view.copy_(weight.detach())
            weight.data = view
        self.work, self.gradient = None, None
        if not whole:
            self.free()

    def starts(self) -> list[int]:
        """Where each weight begins in the flat buffer."""
        return list(accumulate((w.numel() for w in self.weights), initial=0))[:-1]

    def overlaps(self) -> Iterator[tuple[nn.Parameter, slice, slice]]:
        """What this rank's shard holds: each weight, which of its elements, where in the shard."""
        for weight, start in zip(self.weights, self.starts(), strict=True):
            low = max(start, self.first)
            high = min(start + weight.numel(), self.first + self.size)
            if low < high:
                yield (weight, slice(low - start, high - start),
                       slice(low - self.first, high - self.first))

    def send(self) -> None:
        """Start filling the buffer from all ranks' shards."""
        self.source = self.shard.detach().to(self.flat.dtype)  # kept until it has arrived
        self.work = dist.all_gather_single(self.flat, self.source, async_op=True)

    def gather(self) -> None:
        """`send`, unless the buffer is filled or on its way."""
        storage = self.flat.untyped_storage()
        if not storage.size():
            storage.resize_(self.flat.numel() * self.flat.element_size())
            self.send()

    def wait(self) -> None:
        """Until the buffer is filled."""
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None

    def free(self) -> None:
        """Give the buffer's memory back."""
        self.flat.untyped_storage().resize_(0)

    def collect(self, dtype: torch.dtype) -> None:
        """Add the weights' gradients to the flat one, made in dtype where there is none; drop them.
        """
        if self.gradient is None:
            self.gradient = torch.zeros(len(self.flat), dtype=dtype, device=self.flat.device)
        for weight, start in zip(self.weights, self.starts(), strict=True):
            if weight.grad is not None:
                self.gradient[start : start + weight.numel()] += weight.grad.flatten()
                weight.grad = None

    def reduce(self, dtype: torch.dtype) -> tuple[list[dist.Work], list[Tensor]]:
        """Start the sum of all ranks' flat gradients, sent in dtype; each rank receives its shard.

        Returns the works, and the pieces that make the shard once they are added up. gloo has no
        reduce-scatter of its own (it sends the whole sum to all, twice the bytes): there each rank
        receives its piece from every other and adds them up, in fp32.
        """
        gradient, self.gradient = self.gradient.to(dtype), None
        if dist.get_backend() != "gloo":
            received = gradient.new_empty(self.size)
            return [dist.reduce_scatter_single(received, gradient, async_op=True)], [received]
        pieces, works = list(gradient.view(-1, self.size)), []
        for other in range(len(pieces)):
            if other != dist.get_rank():
                works.append(dist.isend(pieces[other], other))
                pieces[other] = torch.empty_like(pieces[other])
                works.append(dist.irecv(pieces[other], other))
        return works, pieces

    def add(self, pieces: list[Tensor]) -> None:
        """Add what `reduce` received to the shard's gradient, in fp32."""
        first, *others = pieces  # one by one: a sum with a cast took 1.5 times as long
        if self.shard.grad is None:
            self.shard.grad = first.to(torch.float32, copy=True)
        else:
            self.shard.grad.add_(first)
        for piece in others:
            self.shard.grad.add_(piece)


@dataclass
class Stop:
    """A stop of the timetable: a unit, and what happens to it here."""

    unit: Unit
    part: object  # which part of the model runs here
    gather: bool  # weights are needed from here to the next stop
    reduce: bool = False  # gradients are complete once the next stop is reached


def timetable(parts: list, stage: int, shard_frozen: bool) -> tuple[list[Unit], list[Stop], int]:
    """Units, all stops of a micro-batch, and the number of the first stop of the backward pass.

    parts: in forward order, each with `first`, `last` (modules), `weights`, `again` (as in
    parts.py). Works without a process group and on the meta device.
    """
    forward, groups, group_of = [], [], {}
    for part in parts:
        if not part.weights[0].requires_grad and not (stage == 3 and shard_frozen):
            continue
        shared = [group_of[w] for w in part.weights if w in group_of]  # with an earlier part:
        group = shared[0] if shared else []  # both are one unit, which is gathered twice
        if not shared:
            groups.append(group)
        for w in part.weights:
            if w not in group_of:
                group.append(w)
                group_of[w] = group
        forward.append((part, group))
    units = [Unit(group) for group in groups]
    unit_of = {w: unit for unit in units for w in unit.weights}
    stops, seen, backward = [], set(), []
    for part, group in forward:
        unit = unit_of[group[0]]
        stops.append(Stop(unit, part, gather=stage == 3))
        if unit.trained or part.again:
            complete = unit.trained and unit not in seen  # nothing earlier adds to its gradients
            backward.append(Stop(unit, part, stage == 3 and part.again, complete))
        seen.add(unit)
    turn = len(stops)
    stops += reversed(backward)  # autograd's order
    if stops[turn].unit is not stops[turn - 1].unit:
        raise ValueError("the last part of the forward pass must be the first of the backward pass")
    return units, stops, turn


class Sharded:
    """Stages 1 to 3: the trained weights of `loss`, and at stage 3 the frozen ones, in shards.

    loss: a module that takes a batch and returns a scalar. parts: as for `timetable`. unused:
    frozen weights that no part needs; at stage 3 they are in shards too, and never gathered.
    names: of the trained weights. Trained weights (fp32) become copies in `dtype`.
    """

    def __init__(
        self,
        loss: nn.Module,
        parts: list,
        unused: list[nn.Parameter],
        names: dict[nn.Parameter, str],
        stage: int,
        dtype: torch.dtype,
        device: torch.device,
        shard_frozen: bool = True,
        reduce_fp32: bool = False,
    ):
        self.loss, self.names, self.stage, self.device = loss, names, stage, device
        self.reduce_dtype = torch.float32 if reduce_fp32 else dtype
        self.units, self.stops, self.turn = timetable(parts, stage, shard_frozen)
        if stage == 3 and shard_frozen:
            self.units += [Unit([weight]) for weight in unused]  # opened one by one: never whole
        for unit in self.units:
            unit.open(dtype if unit.trained else unit.weights[0].dtype, device, whole=stage < 3)
        trained = [unit for unit in self.units if unit.trained]
        self.masters = {names[unit.weights[0]]: unit.shard for unit in trained}
        self.position, self.coming = -1, None
        self.watch()

    def watch(self) -> None:
        """Install the hooks: each walks to a stop."""
        for number, stop in enumerate(self.stops):
            if number < self.turn:
                stop.part.first.register_forward_pre_hook(lambda *_, n=number: self.walk(n))
            elif number > self.turn:  # the first is walked to when the forward pass ends

                def hook(module: nn.Module, inputs, output: Tensor, n: int = number) -> None:
                    if output.requires_grad:
                        output.register_hook(lambda gradient: self.walk(n))

                stop.part.last.register_forward_hook(hook)

    def walk(self, number: int) -> None:
        """Go on to that stop, with everything on the way. Raises RuntimeError if it lies behind."""
        if self.position > number:
            raise RuntimeError(f"stop {number} was called after stop {self.position}: the model "
                               "runs its parts in another order than they were listed in")
        while self.position < number:
            if self.position >= 0:
                self.leave()
            self.position += 1
            if self.position < len(self.stops):
                self.enter()

    def enter(self) -> None:
        """Have the stop's weights, and send for the next one's."""
        for stop in self.stops[self.position : self.position + 2]:
            if stop.gather:
                stop.unit.gather()
        self.stops[self.position].unit.wait()

    def leave(self) -> None:
        """Send the gradients if they are complete, free the weights unless the next stop is theirs.
        """
        stop, after = self.stops[self.position], self.stops[self.position + 1 :][:1]
        if stop.gather and not (after and after[0].gather and after[0].unit is stop.unit):
            stop.unit.free()
        if stop.reduce:  # memory is given back first: `collect` takes as much again
            self.arrive()
            more = self.stage == 1 and not self.last  # micro-batches will add to it
            stop.unit.collect(torch.float32 if more else self.reduce_dtype)
            if not more:
                self.coming = (stop.unit, *stop.unit.reduce(self.reduce_dtype))

    def arrive(self) -> None:
        """Wait for the gradients that are on their way, if any."""
        if self.coming is not None:
            unit, works, pieces = self.coming
            for work in works:
                work.wait()
            unit.add(pieces)
            self.coming = None

    def forward_backward(self, batch, scored: float, last: bool) -> Tensor:
        """The loss of a micro-batch, its gradient (over `scored`) added to the shards'.

        batch: None where this rank has no rows left. last: of the step.
        """
        self.last = last
        loss = torch.zeros((), device=self.device) if batch is None else self.loss(batch)
        self.walk(self.turn)
        if loss.requires_grad:
            (loss / scored).backward()
        self.walk(len(self.stops))
        self.arrive()
        self.position = -1
        return loss.detach()

    @torch.no_grad()
    def forward(self, batch) -> Tensor:
        """The loss of a batch, without gradients. Every rank must call it, with any batch."""
        loss = self.loss(batch)
        self.walk(self.turn - 1)
        last = self.stops[self.turn - 1]
        if last.gather:
            last.unit.free()
        self.position = -1
        return loss

    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their norm, over all ranks, is at most `limit`; the norm."""
        gradients = [shard.grad for shard in self.masters.values()]
        norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
        square = norms.double().square().sum()
        dist.all_reduce(square)
        norm = square.sqrt().float()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1))
        return norm

    def publish(self) -> None:
        """After an update of the masters: everybody's copies (stage 3 has none)."""
        if self.stage < 3:
            for unit in self.units:
                unit.send()
            for unit in self.units:
                unit.wait()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, every rank has all trained weights whole."""
        trained = [unit for unit in self.units if unit.trained]
        for unit in trained:
            unit.gather()
            unit.wait()
        yield
        for unit in trained if self.stage == 3 else []:
            unit.free()

    def pieces(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """What this rank keeps: name of a weight, master, which elements of the weight, where."""
        for unit in self.units:
            for weight, there, here in unit.overlaps() if unit.trained else ():
                yield self.names[weight], unit.shard, there, here


class Reaching(nn.Module):
    """`loss` for DDP, which waits for every weight's gradient, or the word that it is unused.

    Where a rank has no rows, or none that reach a trained weight, it gives all a gradient of zero.
    """

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, batch) -> Tensor:
        """The loss of the batch, or of none."""
        loss = 0.0 if batch is None else self.loss(batch)
        if isinstance(loss, Tensor) and loss.requires_grad:
            return loss
        return loss + 0.0 * sum(weight.flatten()[0] for weight in self.parameters())


class Replicated:
    """Stage 0, with the methods of `Sharded`: one process, or torch's DDP."""

    stage = 0

    def __init__(self, loss: nn.Module, masters: dict[str, nn.Parameter], world: int):
        self.loss, self.masters, self.world = loss, masters, world
        self.run = Reaching(loss)
        if world > 1:
            self.run = DistributedDataParallel(self.run, find_unused_parameters=True)

    def forward_backward(self, batch, scored: float, last: bool) -> Tensor:
        """As `Sharded.forward_backward`; DDP sends with the last micro-batch."""
        if self.world > 1:
            self.run.require_backward_grad_sync = last
        loss = self.run(batch)
        (loss * (self.world / scored)).backward()  # DDP divides by the number of ranks
        return loss.detach()

    @torch.no_grad()
    def forward(self, batch) -> Tensor:
        """The loss of a batch, without gradients."""
        return self.loss(batch)

    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their norm is at most `limit`; the norm."""
        for weight in self.masters.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return nn.utils.clip_grad_norm_(self.masters.values(), limit)

    def publish(self) -> None:
        """Nothing to do: all ranks have made the same update."""

    def whole(self) -> nullcontext:
        """All weights are whole."""
        return nullcontext()

    def pieces(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """Every weight, whole, as its own master."""
        for name, weight in self.masters.items():
            everything = slice(0, weight.numel())
            yield name, weight, everything, everything


def bytes_held(
    units: list[Unit], stage: int, world: int, accumulation: int, c: int = 2
) -> dict[str, int]:
    """What a rank holds from step to step (the head's table), by kind, in bytes.

    units: from `timetable`, trained ones and, at stage 3, frozen ones that are in shards.
    """
    trained = sum(unit.numel for unit in units if unit.trained)
    padded = sum(unit.padded(world) for unit in units if unit.trained)
    frozen = sum(u.padded(world) * u.weights[0].element_size() for u in units if not u.trained)
    if stage == 0:
        buckets = MASTER * trained if world > 1 else 0
        return {"computes": 0, "master": MASTER * trained, "moments": 2 * MASTER * trained,
                "gradients": MASTER * trained + buckets, "frozen": 0}
    shard = MASTER * padded // world
    whole = MASTER * padded if stage == 1 and accumulation > 1 else 0  # until the last micro-batch
    return {"computes": c * padded if stage < 3 else 0, "master": shard, "moments": 2 * shard,
            "gradients": max(whole, shard), "frozen": frozen // world}


def bytes_sent(
    units: list[Unit], stops: list[Stop], stage: int, world: int, accumulation: int,
    c: int = 2, r: int = 2
) -> int:
    """What a rank sends in a step, in bytes, norms and counts left out; stops: `timetable`'s."""
    trained = [unit for unit in units if unit.trained]
    if stage == 0:
        return 2 * MASTER * sum(u.numel for u in trained) * (world - 1) // world
    size = sum(unit.padded(world) for unit in trained)
    total = r * size * (1 if stage == 1 else accumulation) + (c * size if stage < 3 else 0)
    pairs = zip([None, *stops], stops, strict=False)
    gathers = [stop.unit for before, stop in pairs
               if stop.gather and (before is None or before.unit is not stop.unit)]
    for unit in gathers:
        bytes_each = c if unit.trained else unit.weights[0].element_size()
        total += accumulation * bytes_each * unit.padded(world)
    return total * (world - 1) // world
