"""ZeRO by hand: the training state sharded over ranks, with plain collectives.

Training in mixed precision holds far more than the weights: an fp32 master copy of each trained
weight, AdamW's two moments, a gradient. Data-parallel ranks each hold all of it. With ZeRO (arXiv
1910.02054) each of N ranks keeps one N-th, its *shard*. Stages 1 and 2 gather the whole weights
after each update, stage 3 before each use. Weights that are gathered together are a *unit*: a
decoder layer, an embedding, a head, the vision tower.

Bytes on a rank, for P trained and F frozen weights of c bytes each in the compute dtype:

    stage                     weights   master   moments   gradients        frozen
    0  all whole                   -        4P        8P   4P               cF
    1  optimizer in shards        cP      4P/N      8P/N   4P/N (or 4P)     cF
    2  gradients too              cP      4P/N      8P/N   4P/N             cF
    3  weights too                 -      4P/N      8P/N   4P/N             cF/N (or cF)

"or 4P": with several micro-batches in a step. "or cF": with `shard_frozen = false`.
docs/distributed.md explains the table, has another for what is sent, and draws the timetable.

**Why no rank waits forever.** A collective hangs where ranks disagree on which one comes next, and
what a rank runs depends on its rows: without a picture it runs no projector. So a fixed list, the
timetable, says when collectives run. It depends on model and settings alone. An entry is a stop:
one part (a layer, the head, ...) in its forward or backward pass. Collectives run at the beginning
and the end of a stop. Hooks on the modules call `advance_to(n)`, which runs all collectives up to
stop n, also for parts that this rank does not use.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iaa import IAA

# Torch warns of hooks on modules whose input needs no gradient, as an embedding's.
warnings.filterwarnings("ignore", "Full backward hook is firing")


class DataParallel:
    """Stage 0: every rank holds everything; gradients are summed over the ranks."""

    zero = 0

    def __init__(
        self, loss: Callable[[Any], Tensor], masters: dict[str, nn.Parameter], world: int
    ):
        self.loss, self.masters, self.world = loss, masters, world

    def forward_backward(self, batch, scored: float, last: bool) -> Tensor:
        """Return a micro-batch's loss, and add its gradient, divided by `scored`, to the step's.

        batch: None where this rank has no rows left. last: whether it is the step's last one.
        Then every rank all_reduces every weight's gradient, used or not: so none waits for ever.
        """
        loss = torch.zeros(()) if batch is None else self.loss(batch)
        if loss.requires_grad:
            (loss / scored).backward()
        for weight in self.masters.values() if last else ():
            if weight.grad is None:  # this rank did not use it; AdamW would skip it
                weight.grad = torch.zeros_like(weight)
            if self.world > 1:
                dist.all_reduce(weight.grad)
        return loss.detach()

    @torch.no_grad()
    def forward(self, batch) -> Tensor:
        """The loss of a batch, without gradients."""
        return self.loss(batch)

    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their norm is at most `limit`. Returns the norm before."""
        return nn.utils.clip_grad_norm_(self.masters.values(), limit)

    def all_gather_weights(self) -> None:
        """Nothing: all ranks have made the same update."""

    def gathered(self) -> nullcontext:
        """Nothing: all ranks have all weights."""
        return nullcontext()

    def owned_slices(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """As `ZeroSharded.owned_slices`, but every weight is whole and its own master."""
        for name, weight in self.masters.items():
            yield name, weight, slice(0, weight.numel()), slice(0, weight.numel())


@dataclass(frozen=True)
class Part:
    """A part of the model: `weights` are needed when `module` is called."""

    module: nn.Module
    weights: list[nn.Parameter]
    trained: bool  # all trained, or all frozen
    read_in_backward: bool  # by the backward pass; False for embeddings and the tower


def model_parts(model: IAA, workflow: str) -> list[Part]:
    """The parts in the order in which `IAA.loss` calls them; a test compares the two."""

    def part(*modules: nn.Module, read_in_backward: bool = True) -> Part:
        weights = list(dict.fromkeys(w for module in modules for w in module.parameters()))
        return Part(modules[0], weights, weights[0].requires_grad, read_in_backward)

    adaptor = model.adaptors[workflow]
    llama, insertion = model.llm(adaptor), adaptor.config.insertion
    parts = [part(adaptor.embedding or llama.embedding, read_in_backward=False),
             part(model.clip, read_in_backward=False), part(adaptor.projector)]
    for i, layer in enumerate(llama.layers):
        parts.append(part(layer))
        if i in insertion:
            n = insertion.index(i)
            parts += map(part, [adaptor.layers[n], *adaptor.gates[n : n + 1]])
    if adaptor.head is not None:
        return [*parts, part(adaptor.norm, adaptor.head)]
    return [*parts, part(llama.norm, llama.head or llama.embedding)]  # tied: the embedding again


class Unit:
    """Weights that are gathered together, side by side in one flat buffer.

    The buffer has N equal slices. Rank k keeps slice k, its shard. That of a trained unit is fp32:
    the master that AdamW updates.
    """

    def __init__(self, weights: list[nn.Parameter], trained: bool):
        self.weights, self.trained = weights, trained
        self.pending_gather = self.gradient = None

    def padded(self, world: int) -> int:
        """Elements of the buffer: those of all weights, rounded up to a multiple of `world`."""
        return -(-sum(w.numel() for w in self.weights) // world) * world

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Copy the weights into one buffer of `dtype`, make them views of it, keep the shard."""
        world, sizes = dist.get_world_size(), [w.numel() for w in self.weights]
        self.sizes = [*sizes, -sum(sizes) % world]  # the last one is padding
        padding = self.weights[0].new_zeros(self.sizes[-1])
        flat = torch.cat([*(w.detach().flatten() for w in self.weights), padding])
        self.size = len(flat) // world
        self.start = dist.get_rank() * self.size
        shard = flat[self.start : self.start + self.size].to(device, copy=True)
        self.shard = shard.requires_grad_(self.trained)
        self.flat = flat.to(device, dtype)
        # strict=False: the last view is the padding.
        for weight, view in zip(self.weights, self.flat.split(self.sizes), strict=False):
            weight.data = view.view(weight.shape)

    def start_all_gather(self) -> None:
        """Start to fill the buffer with all ranks' shards."""
        source = self.shard.detach().to(self.flat.dtype)
        work = dist.all_gather_single(self.flat, source, async_op=True)
        self.pending_gather = work, source  # the source has to live until it is sent

    def gather_if_freed(self) -> None:
        """Start an all_gather, unless the buffer is full or being filled."""
        storage = self.flat.untyped_storage()
        if storage.size() == 0:
            storage.resize_(self.flat.nbytes)
            self.start_all_gather()

    def wait_gathered(self) -> None:
        """Wait until the buffer is full."""
        if self.pending_gather is not None:
            self.pending_gather[0].wait()
            self.pending_gather = None

    def free(self) -> None:
        """Free the buffer's memory. Weights and autograd's saved tensors stay views of it."""
        self.flat.untyped_storage().resize_(0)

    def flatten_gradients(self, dtype: torch.dtype) -> None:
        """Move the weights' gradients into a flat gradient of `dtype`, or add them to it."""
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.flat, dtype=dtype)
        for weight, view in zip(self.weights, self.gradient.split(self.sizes), strict=False):
            if weight.grad is not None:
                view += weight.grad.flatten()
                weight.grad = None

    def start_reduce_scatter(self, dtype: torch.dtype) -> tuple[dist.Work, Tensor]:
        """Start to sum all ranks' flat gradients in `dtype`. Returns the work and its output."""
        gradient, self.gradient = self.gradient.to(dtype), None
        received = gradient.new_empty(self.size)  # the sum, of this rank's shard only
        return dist.reduce_scatter_single(received, gradient, async_op=True), received


@dataclass
class Stop:
    """A stop of the timetable: a part runs, forward or backward."""

    unit: Unit
    module: nn.Module  # of the part
    gather: bool  # stage 3: gather the unit's weights before
    reduce: bool = False  # its gradients are complete afterwards: reduce_scatter them


def timetable(
    model: IAA, workflow: str, zero: int, shard_frozen: bool
) -> tuple[list[Unit], list[Stop], int]:
    """All units, the stops of a micro-batch, and the number of its first backward stop.

    Frozen weights are in units at stage 3 with `shard_frozen`; unused ones are never gathered.
    """
    frozen_too, unit_of, stops, backward = zero == 3 and shard_frozen, {}, [], []
    for part in model_parts(model, workflow):
        if not (part.trained or frozen_too):
            continue
        # Parts that share a weight, as a tied head and the embedding, are one unit.
        shared = [unit_of[w] for w in part.weights if w in unit_of]
        unit = shared[0] if shared else Unit([], part.trained)
        unit.weights += [w for w in part.weights if w not in unit_of]
        unit_of |= dict.fromkeys(part.weights, unit)
        stops.append(Stop(unit, part.module, gather=zero == 3))
        if part.trained or part.read_in_backward:
            complete = part.trained and not shared  # shared: its first part comes last in backward
            backward.append(Stop(unit, part.module, zero == 3 and part.read_in_backward, complete))
    if frozen_too:  # frozen weights of no part: kept in shards, never gathered
        unit_of |= {w: Unit([w], False) for w in model.parameters() if w not in unit_of}
    return list(dict.fromkeys(unit_of.values())), stops + backward[::-1], len(stops)


class ZeroSharded:
    """Stages 1 to 3: the workflow's trained weights in shards, at stage 3 also the frozen ones.

    Weights in units go to `device`. Trained ones, fp32 before, become copies in the compute dtype.
    """

    def __init__(
        self, loss: Callable[[Any], Tensor], model: IAA, workflow: str, zero: int,
        device: torch.device, shard_frozen: bool, reduce_fp32: bool
    ):
        dtype = model.llama.dtype
        self.loss, self.zero, self.device = loss, zero, device
        self.names = {w: name for name, w in model.adaptors[workflow].named_parameters()}
        self.reduce_dtype = torch.float32 if reduce_fp32 else dtype
        self.units, self.stops, self.first_backward_stop = timetable(
            model, workflow, zero, shard_frozen)
        for unit in self.units:
            unit.allocate(dtype, device)
            if zero == 3:
                unit.free()
        self.trained = [unit for unit in self.units if unit.trained]
        self.masters = {self.names[unit.weights[0]]: unit.shard for unit in self.trained}
        self.adaptor = [unit for unit in self.units if unit.weights[0] in self.names]
        self.position = -1  # number of the stop that runs; -1 between micro-batches
        self.pending_reduce = None  # (unit, work, received) of a running reduce_scatter
        for number, stop in enumerate(self.stops):
            # A backward hook is called with the gradient of the module's output. Autograd visits
            # modules in reverse, so the backward passes of all later modules are done by then.
            register = (stop.module.register_forward_pre_hook if number < self.first_backward_stop
                        else stop.module.register_full_backward_pre_hook)
            register(lambda *_, n=number: self.advance_to(n))

    def advance_to(self, number: int) -> None:
        """Go on through the timetable up to that stop. RuntimeError where it has been passed."""
        if self.position > number:
            raise RuntimeError(f"stop {number} after stop {self.position}: the model runs its "
                               "parts in another order than `model_parts` lists them")
        while self.position < number:
            if self.position >= 0:
                self.end_stop()
            self.position += 1
            if self.position < len(self.stops):
                self.begin_stop()

    def begin_stop(self) -> None:
        """Gather this stop's weights, and prefetch the next stop's."""
        for stop in self.stops[self.position : self.position + 2]:
            if stop.gather:
                stop.unit.gather_if_freed()
        self.stops[self.position].unit.wait_gathered()

    def end_stop(self) -> None:
        """Free the stop's weights, unless the next stop reads them. Send complete gradients."""
        stop, following = self.stops[self.position], self.stops[self.position + 1 :][:1]
        if stop.gather and not any(s.gather and s.unit is stop.unit for s in following):
            stop.unit.free()  # first: the flat gradient needs as much memory
        if stop.reduce:
            self.finish_reduce()  # one reduce_scatter at a time
            keep = self.zero == 1 and not self.last  # sum until the last micro-batch
            stop.unit.flatten_gradients(torch.float32 if keep else self.reduce_dtype)
            if not keep:
                self.pending_reduce = stop.unit, *stop.unit.start_reduce_scatter(self.reduce_dtype)

    def finish_reduce(self) -> None:
        """Wait for the running reduce_scatter, if there is one; add its result in fp32."""
        if self.pending_reduce is not None:
            unit, work, received = self.pending_reduce
            work.wait()
            if unit.shard.grad is None:
                unit.shard.grad = torch.zeros_like(unit.shard)
            unit.shard.grad += received
            self.pending_reduce = None

    def forward_backward(self, batch, scored: float, last: bool) -> Tensor:
        """As `DataParallel.forward_backward`. Every rank must call it, with or without rows."""
        self.last = last
        loss = torch.zeros((), device=self.device) if batch is None else self.loss(batch)
        self.advance_to(self.first_backward_stop)
        if loss.requires_grad:
            (loss / scored).backward()
        self.advance_to(len(self.stops))
        self.finish_reduce()
        self.position = -1
        return loss.detach()

    @torch.no_grad()
    def forward(self, batch) -> Tensor:
        """The loss of a batch, without gradients. Every rank must call it; batches may differ."""
        loss = self.loss(batch)
        self.advance_to(self.first_backward_stop - 1)
        if self.zero == 3:
            self.stops[self.position].unit.free()
        self.position = -1
        return loss

    def clip(self, limit: float) -> Tensor:
        """Scale all gradients so that their norm is at most `limit`. Returns the norm before."""
        shards = [master.grad for master in self.masters.values()]
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.masters.values(), limit, norm)
        return norm

    def all_gather_weights(self) -> None:
        """After an update of the masters, update all copies. Stage 3 keeps none."""
        if self.zero < 3:
            for unit in self.units:
                unit.start_all_gather()
            for unit in self.units:
                unit.wait_gathered()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A context in which every rank has all weights of the adaptor."""
        for unit in self.adaptor:
            unit.gather_if_freed()
            unit.wait_gathered()
        yield
        for unit in self.adaptor if self.zero == 3 else []:
            unit.free()

    def owned_slices(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """(name, master, slice of the flat weight, slice of the master) of this rank's shard."""
        for unit in self.trained:
            offset = -unit.start  # where the weight begins, counted from the shard's beginning
            for weight in unit.weights:
                low, high = max(offset, 0), min(offset + weight.numel(), unit.size)
                if low < high:
                    in_weight, in_shard = slice(low - offset, high - offset), slice(low, high)
                    yield self.names[weight], unit.shard, in_weight, in_shard
                offset += weight.numel()


def build_state(
    loss: Callable[[Any], Tensor], model: IAA, workflow: str, zero: int, world: int,
    device: torch.device, shard_frozen: bool = True, reduce_fp32: bool = False
) -> DataParallel | ZeroSharded:
    """The training state of a workflow at a ZeRO stage; on one rank every stage is stage 0.

    loss: takes a batch, returns a scalar. shard_frozen: at stage 3, the frozen weights too.
    reduce_fp32: gradients are sent in fp32, not in the model's dtype.
    """
    if world > 1 and zero > 0:
        return ZeroSharded(loss, model, workflow, zero, device, shard_frozen, reduce_fp32)
    adaptor = model.adaptors[workflow].to(device)
    trained = {name: w for name, w in adaptor.named_parameters() if w.requires_grad}
    return DataParallel(loss, trained, world)
