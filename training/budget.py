"""What a step holds, sends and computes on each rank, by arithmetic over the model's timetable.

What ZeRO holds and sends is `zero.py`'s own arithmetic. What autograd keeps for backward, in bytes
for each token of a micro-batch; a frozen layer needs no input of a product, only what its nonlinear
steps must remember:

    two norms, in fp32       8D + 8              and 4cD where trained: input and output of weights
    attention, by GPU kernel c(3H + 3K)E + 4H    q, k; v, as a view of all three; output; logsumexp
                                                 (of causal rows; a mask repeats k and v to H heads)
    attention, on a CPU      c(H + 2K)E          q, k, v (cHE more where trained); one layer at a
                                                 time 3cHT more, in its backward pass: not counted
    feed-forward             2cF                 gate and up; cF more where trained
    with `recompute`         cD instead          its input; one layer at a time holds all of this

At stage 0 trained layers add the copies of their weights in `dtype`, and the head 4V + 4D for each
scored token, which grows to 12V while the loss's gradient is made; of 1024 tokens at most.

A pass is fullest at the end of its forward half or at some stop of its backward half, when some
gradients are there and some activations still are: `fullest` looks at every stop.

Letters: as in llama.py; c bytes of `dtype`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from training.config import DTYPES, Config, StageConfig
from iaa import IAA, LOSS_ROWS
from lean import spans
from llama import DecoderLayer, LlamaConfig
from training.parts import Part, parts
from training.zero import MASTER, Unit, bytes_held, bytes_sent, timetable

LOSS = 3 * MASTER  # bytes of a logit: log-probability, its gradient, the logit's gradient


@dataclass(frozen=True)
class Machine:
    """What is to be rented."""

    world: int = 8
    memory_gb: float = 80.0
    tflops: float = 312.0  # peak of a rank in `dtype`; 312: A100 and A800
    utilisation: float = 0.4  # share of it that training reaches
    gpu: bool = True  # fused attention, NCCL

    def __post_init__(self):
        if self.world < 1 or min(self.memory_gb, self.tflops) <= 0 or not 0 < self.utilisation <= 1:
            raise ValueError("--world 1 or more, --memory-gb and --tflops above 0, "
                             "--utilisation above 0, at most 1")


@dataclass(frozen=True)
class Rows:
    """An average row: its tokens, image included, and how many of them are scored."""

    tokens: int
    scored: int
    source: str = "assumed"


def count(weights) -> int:
    """Elements of all weights, each once."""
    return sum(w.numel() for w in set(weights))


def step_flops(model: IAA, workflow: str, rows: int, tokens: int, scored: int,
               recompute: bool = False) -> float:
    """FLOPs that forward and backward of `rows` of `tokens` each need, from the matrix products.

    scored: tokens in all. 2 per weight and token forward, 2 more for the gradient of the
    activations, 2 more where the weight is trained; attention 2 * 2 * H * E a layer forward for
    each pair of tokens that a CPU scores (lean.py), two and a half times that backward (scores once
    more, as by fused kernels too). recompute: each layer's forward pass once more, but for its
    last product. The vision tower and the projector are left out.
    """
    adaptor = model.adaptors[workflow]
    llm = model.llm(adaptor)
    sizes, number = llm.config, llm.config.layers + len(adaptor.layers)
    inserted = count([*adaptor.layers.parameters(), *adaptor.gates.parameters()])
    matrices = count(llm.layers.parameters()) + inserted
    trained = inserted if adaptor.llm is None else matrices
    head_trained = adaptor.head is not None or adaptor.llm is not None
    again = matrices - number * sizes.ffn * sizes.width if recompute else 0
    layers = rows * tokens * (4 * matrices + 2 * trained + 2 * again)
    head = scored * llm.embedding.weight.numel() * (6 if head_trained else 4)
    pairs = sum((end - first) * end for first, end in spans(tokens))
    attention = rows * pairs * number * sizes.heads * sizes.head_size
    return layers + head + (18 if recompute else 14) * attention


def layer_saved(sizes: LlamaConfig, tokens: int, trained: bool, c: int, gpu: bool) -> int:
    """Bytes that autograd keeps of a decoder layer's pass over `tokens`."""
    width, heads, size = sizes.width, sizes.heads, sizes.head_size
    each = 8 * width + 8 + 2 * c * sizes.ffn
    if gpu:
        each += c * 3 * (heads + sizes.kv_heads) * size + 4 * heads
    else:
        each += c * (heads + 2 * sizes.kv_heads) * size
    if trained:
        each += c * (4 * width + sizes.ffn + (0 if gpu else heads * size))
    return tokens * each


@dataclass(frozen=True)
class Step:
    """A step of a stage on one of the machine's ranks."""

    model: IAA
    config: Config
    stage: StageConfig
    rows: Rows
    machine: Machine

    @property
    def c(self) -> int:
        """Bytes of a weight that computes."""
        return DTYPES[self.config.dtype].itemsize

    @property
    def r(self) -> int:
        """Bytes of a gradient on its way."""
        return MASTER if self.config.reduce_fp32 else self.c

    @property
    def rounds(self) -> int:
        """Micro-batches of the rank that has most."""
        return math.ceil(self.stage.batch / self.stage.micro_batch / self.machine.world)

    @property
    def scored(self) -> int:
        """Scored positions of a micro-batch."""
        return self.stage.micro_batch * self.rows.scored

    @property
    def in_pieces(self) -> bool:
        """Whether logits come in pieces, each made again in the backward pass."""
        return self.scored > LOSS_ROWS

    @cached_property
    def parts(self) -> list[Part]:
        """In the order of the forward pass."""
        return parts(self.model, self.stage.adaptor)

    @cached_property
    def timetable(self) -> tuple:
        """zero.py's: units, stops, the first stop of the backward pass."""
        return timetable(self.parts, self.stage.zero, self.config.shard_frozen)

    def saved(self) -> tuple[list[int], int]:
        """Bytes that autograd keeps of each part, and while a recomputed layer runs backward."""
        adaptor, sizes = self.model.adaptors[self.stage.adaptor], self.model.llama.config
        vision = self.model.clip.config
        micro, row, c = self.stage.micro_batch, self.rows.tokens, self.c
        stream, again, found = c * micro * row * sizes.width, 0, []
        for part in self.parts:
            trained, kept = part.weights[0].requires_grad, 0
            cast = trained and self.stage.zero == 0 and c < MASTER and part.again
            copies = c * count(part.weights) if cast else 0
            if isinstance(part.first, DecoderLayer):
                kept = layer_saved(sizes, micro * row, trained, c, self.machine.gpu) + copies
                if self.config.recompute:
                    kept, again = stream, max(again, kept)
                kept += stream if part.last is not part.first else 0  # a gate's input
            elif part.first is adaptor.projector:
                pixels = (1 + vision.patches) * vision.width
                kept = c * micro * (pixels + 2 * vision.patches * sizes.width) + copies
            elif part is self.parts[-1]:
                kept = self.scored * (MASTER * (sizes.width + 1) + trained * 2 * c * sizes.width)
                kept += 0 if self.in_pieces else MASTER * self.scored * sizes.vocab_size
                kept += copies
            found.append(kept)
        return found, again

    def held(self) -> dict[str, int]:
        """What stays from step to step, in bytes by kind."""
        units, _, _ = self.timetable
        shared = self.stage.zero == 3 and self.config.shard_frozen
        found = bytes_held(units, self.stage.zero, self.machine.world, self.rounds, self.c)
        used = {w for part in self.parts for w in part.weights}
        frozen = {w for m in (self.model.llama, self.model.clip) for w in m.parameters()}
        if not shared:
            found["frozen"] = self.c * count(frozen)
        else:
            unused = sum(Unit([w]).padded(self.machine.world) for w in frozen - used)
            found["frozen"] += self.c * unused // self.machine.world
        return found

    def passing(self) -> Iterator[dict[str, int]]:
        """What comes and goes, by kind: at the loss's gradient and at each backward stop."""
        units, stops, turn = self.timetable
        zero, world, c = self.stage.zero, self.machine.world, self.c
        kept, again = self.saved()
        until = list(accumulate(kept, initial=0))  # of the parts before each
        place = {id(part.first): i for i, part in enumerate(self.parts)}
        growing = self.rounds == 1  # else the micro-batches before have left their gradients
        final = {u: MASTER * (u.numel if zero == 0 else u.padded(world) // world)
                 for u in units if u.trained}
        gradients = self.held()["gradients"] - (sum(final.values()) if growing else 0)
        flying = 0  # sent and received, at the last stop that reduced
        logits = min(self.scored, LOSS_ROWS) * self.model.llama.config.vocab_size
        logits *= LOSS if self.in_pieces else LOSS - MASTER
        for number, stop in enumerate(stops[turn:], turn):
            unit, i = stop.unit, place[id(stop.part.first)]
            near = dict.fromkeys(s.unit for s in stops[number : number + 2] if s.gather)
            gathered = c * sum(u.padded(world) for u in near)
            if len(near) > 1 and not self.machine.gpu:  # gloo receives into a buffer of its own
                gathered += c * list(near)[1].padded(world)
            if number == turn:
                yield {"activations": until[-1] + logits, "gathered": gathered,
                       "gradients": gradients}
            own = (MASTER if zero == 0 else c) * unit.numel if unit.trained else 0
            layer = again if isinstance(stop.part.first, DecoderLayer) else 0
            yield {"activations": until[i + 1] + layer, "gathered": gathered,
                   "gradients": gradients + flying + own}
            if stop.reduce and zero > 0:
                flat = self.r * unit.padded(world)
                summed = zero == 1 and not growing  # in fp32 by now: sent as it is, or a copy
                copy = 0 if summed and self.r == MASTER else flat
                freed = 0 if not stop.gather else c * unit.padded(world)
                yield {"activations": until[i], "gathered": gathered - freed,
                       "gradients": gradients + own + copy}
                shard = flat // world  # received: its sum (NCCL), or the others' pieces (gloo)
                flying = flat + (shard if self.machine.gpu else flat - shard)
            if stop.reduce and growing:
                gradients += final[unit]

    def fullest(self) -> dict[str, int]:
        """What a rank holds at the fullest moment, in bytes by kind."""
        return self.held() | max(self.passing(), key=lambda moment: sum(moment.values()))

    def sent(self) -> int:
        """Bytes that the rank sends in a step."""
        units, stops, _ = self.timetable
        return bytes_sent(units, stops, self.stage.zero, self.machine.world, self.rounds,
                          self.c, self.r)

    def cost(self) -> tuple[float, float]:
        """FLOPs of a step on all ranks, and the hours of the whole stage."""
        stage, machine = self.stage, self.machine
        flops = step_flops(self.model, stage.adaptor, stage.batch, self.rows.tokens,
                           stage.batch * self.rows.scored, self.config.recompute)
        share = self.rounds * stage.micro_batch / stage.batch  # of the rank that has most
        rate = machine.tflops * 1e12 * machine.utilisation
        return flops, stage.steps * share * flops / rate / 3600
