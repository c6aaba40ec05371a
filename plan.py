"""What a run will hold, send and compute, known before anything is rented or downloaded.

    python train.py --plan --config F [--world 8] [--memory-gb 80] [--tflops 312] ...

The model is built on the meta device, where weights have shapes and no values, from the folders of
the config or, where they are not there yet, from the size that their path ends with (`--set
llm=3-8B`). What ZeRO holds and sends is `zero.py`'s own arithmetic over the model's real timetable.

What autograd keeps for backward, in bytes for each token of a micro-batch; a frozen layer needs no
input of a product, only what its nonlinear steps must remember:

    two norms, in fp32       8D + 8              and 4cD where trained: input and output of weights
    attention, by GPU kernel c(3H + 3K)E + 4H    q, k; v, as a view of all three; output; logsumexp
                                                 (of causal rows; a mask repeats k and v to H heads)
    attention, on a CPU      c(H + 2K)E + cHT    q, k, v; T probabilities of each head
                                                 (cHE more where trained)
    feed-forward             3cF                 gate and up, silu(gate); cF more where trained
    with `recompute`         cD instead          its input; one layer at a time holds all of this

At stage 0 trained layers add the copies of their weights in `dtype`, and the head 4V + 4D for each
scored token, which grows to 12V while the loss's gradient is made; of 1024 tokens at most.

A pass is fullest at the end of its forward half or at some stop of its backward half, when some
gradients are there and some activations still are: `fullest` looks at every stop.

Letters: as in llama.py; c bytes of `dtype`. GB are 10^9 bytes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch

import clip
import llama
from clip import Clip, ClipConfig
from config import DTYPES, Config, StageConfig, adaptor_config
from data import UNSCORED, JsonlDataset, RowError, encode_row
from iaa import IAA, LOSS_ROWS, Adaptor
from llama import DecoderLayer, Llama, LlamaConfig
from parts import Part, parts
from storage import read_base
from tokenizer import Tokenizer
from zero import MASTER, Unit, bytes_held, bytes_sent, timetable

TEXT_TOKENS = 100  # of a row, half of them scored, where no data is at hand
SAMPLE = 64  # rows that are looked at where there is
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


def frozen_config(folder: str, kind: str) -> LlamaConfig | ClipConfig:
    """Sizes of the frozen model in `folder`, or, where there is none, that the path ends with.

    kind: "llama" or "clip". Case does not count, "/" in a size's name may be "-". Raises ValueError
    that lists the sizes.
    """
    module, config = (llama, LlamaConfig) if kind == "llama" else (clip, ClipConfig)
    if Path(folder).is_dir():
        found, _ = read_base(folder)
        if not isinstance(found, config):
            raise ValueError(f"{folder} is of a {type(found).__name__}, not a {config.__name__}")
        return found
    path = folder.lower().replace("/", "-")
    fitting = [name for name in module.SIZES if path.endswith(name.lower().replace("/", "-"))]
    if not fitting:
        key = "llm" if kind == "llama" else "vision"
        raise ValueError(f"{folder}: no such folder; to plan without it, name a size: "
                         f"--set {key}=NAME, one of {', '.join(module.SIZES)}")
    return module.SIZES[max(fitting, key=len)]


def build(config: Config, stage: StageConfig) -> IAA:
    """The stage's model on the meta device, its trained weights in fp32."""
    sizes = frozen_config(config.llm, "llama")
    vision = frozen_config(config.vision, "clip")
    with torch.device("meta"):
        dtype = DTYPES[config.dtype]
        model = IAA(Llama(sizes).to(dtype), Clip(vision).to(dtype), 0)
        settings = adaptor_config(config, stage, sizes.layers)
        model.adaptors[stage.adaptor] = Adaptor(settings, sizes, vision.width)
    return model


def count(weights) -> int:
    """Elements of all weights, each once."""
    return sum(w.numel() for w in set(weights))


def weights_of(model: IAA, workflow: str) -> dict[str, int]:
    """Weights by part."""
    adaptor = model.adaptors[workflow]
    head = [part for part in (adaptor.norm, adaptor.head) if part is not None]
    found = {"frozen LLM": [model.llama], "frozen vision tower": [model.clip],
             "projector": [adaptor.projector], "embedding": [adaptor.embedding],
             "insertion layers": [adaptor.layers, adaptor.gates], "norm and head": head,
             "trained LLM": [adaptor.llm]}
    return {name: count(w for m in modules if m is not None for w in m.parameters())
            for name, modules in found.items()}


def step_flops(model: IAA, workflow: str, rows: int, tokens: int, scored: int,
               recompute: bool = False) -> float:
    """FLOPs that forward and backward of `rows` of `tokens` each need, from the matrix products.

    scored: tokens in all. 2 per weight and token forward, 2 more for the gradient of the
    activations, 2 more where the weight is trained; attention 2 * 2 * T * T * H * E a layer forward
    (full, as computed here), twice that backward. recompute: each layer's forward pass once more,
    but for its last product. The vision tower and the projector are left out.
    """
    adaptor = model.adaptors[workflow]
    llm = model.llama if adaptor.llm is None else adaptor.llm
    sizes, number = llm.config, llm.config.layers + len(adaptor.layers)
    inserted = count([*adaptor.layers.parameters(), *adaptor.gates.parameters()])
    matrices = count(llm.layers.parameters()) + inserted
    trained = inserted if adaptor.llm is None else matrices
    head_trained = adaptor.head is not None or adaptor.llm is not None
    again = matrices - number * sizes.ffn * sizes.width if recompute else 0
    layers = rows * tokens * (4 * matrices + 2 * trained + 2 * again)
    head = scored * llm.embedding.weight.numel() * (6 if head_trained else 4)
    attention = rows * tokens**2 * number * sizes.heads * sizes.head_size
    return layers + head + (16 if recompute else 12) * attention


def layer_saved(sizes: LlamaConfig, tokens: int, row: int, trained: bool, c: int, gpu: bool) -> int:
    """Bytes that autograd keeps of a decoder layer's pass over `tokens`, in rows of `row`."""
    width, heads, size = sizes.width, sizes.heads, sizes.head_size
    each = 8 * width + 8 + 3 * c * sizes.ffn
    if gpu:
        each += c * 3 * (heads + sizes.kv_heads) * size + 4 * heads
    else:
        each += c * ((heads + 2 * sizes.kv_heads) * size + heads * row)
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
                kept = layer_saved(sizes, micro * row, row, trained, c, self.machine.gpu) + copies
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
        found = bytes_held(units, self.stage.zero, self.machine.world, self.rounds, self.c, self.r)
        used = {w for part in self.parts for w in part.weights}
        frozen = {w for m in (self.model.llama, self.model.clip) for w in m.parameters()}
        if not shared:
            found["frozen"] = self.c * count(frozen)
        elif frozen - used:
            unused = Unit(list(frozen - used)).padded(self.machine.world)
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
                copy = 0 if zero == 1 and not growing else flat
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


def sample_rows(config: Config, stage: StageConfig, patches: int, text: int | None) -> Rows:
    """Tokens of an average row: `text` and an image, or a mean over the data where it is there."""
    there = all(Path(path).is_file() for path in [config.llm + "/config.json", *stage.data])
    if text is not None or not there:
        text = TEXT_TOKENS if text is None else text
        return Rows(patches + text, text // 2)
    tokenizer = Tokenizer.load(config.llm)
    dataset = JsonlDataset(stage.data, config.images)
    examples = []
    for index in range(0, len(dataset), -(-len(dataset) // SAMPLE)):
        with contextlib.suppress(RowError):
            examples.append(encode_row(dataset.row(index), tokenizer, patches,
                                       stage.template or None, config.system, config.max_tokens))
    if not examples:
        raise ValueError(f"{stage.data[0]}: none of {SAMPLE} rows can be used")
    tokens = sum(len(e.tokens) for e in examples) / len(examples)
    scored = sum(int((e.targets != UNSCORED).sum()) for e in examples) / len(examples)
    return Rows(math.ceil(tokens), math.ceil(scored), f"mean of {len(examples)} rows of the data")


KINDS = {"frozen": "frozen weights", "computes": "trained weights", "master": "fp32 master",
         "moments": "moments", "gradients": "gradients", "activations": "activations",
         "gathered": "gathered layers"}
VARIANTS = ((0, True), (1, True), (2, True), (3, True), (3, False))  # ZeRO stage, shard_frozen


def variants(step: Step) -> Iterator[tuple[str, Step]]:
    """The step at each ZeRO stage, with its name; * the config's own."""
    single = step.machine.world == 1  # nothing to share out
    own = (0 if single else step.stage.zero, step.config.shard_frozen)
    for zero, shard in VARIANTS[:1] if single else VARIANTS:
        name = f"ZeRO-{zero}" if shard else "3, frozen whole"
        mark = "*" if zero == own[0] and (zero < 3 or shard == own[1]) else ""
        config = replace(step.config, shard_frozen=shard)
        yield name + mark, replace(step, config=config, stage=replace(step.stage, zero=zero))


def table(step: Step) -> list[str]:
    """Memory of a rank and bytes sent at each ZeRO stage; also for rows of `max_tokens`."""
    limit = step.machine.memory_gb
    longest = min(step.config.max_tokens, step.model.llama.config.context)
    scored = math.ceil(longest * step.rows.scored / step.rows.tokens)
    columns = [["GB on a rank", *KINDS.values(), "in all", f"in all, rows of {longest}",
                "sent in a step", f"fits {limit:g} GB"]]
    for name, at in variants(step):
        held = at.fullest()
        size = sum(held.values())
        most = sum(replace(at, rows=Rows(longest, scored)).fullest().values())
        figures = [*(held[kind] for kind in KINDS), size, most, at.sent()]
        fits = "yes" if max(size, most) <= limit * 1e9 else (
            "not long rows" if size <= limit * 1e9 else "no")
        columns.append([name, *(f"{figure / 1e9:,.2f}" for figure in figures), fits])
    widths = [max(map(len, column)) for column in columns]
    return ["  " + first.ljust(widths[0]) + "".join(
        "  " + text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        for first, *rest in zip(*columns, strict=True)]


def plan_stage(step: Step) -> list[str]:
    """The plan of one stage."""
    model, stage, rows = step.model, step.stage, step.rows
    flops, hours = step.cost()
    parts_ = {name: size for name, size in weights_of(model, stage.adaptor).items() if size}
    trained = sum(size for name, size in parts_.items() if not name.startswith("frozen"))
    return [f"stage {stage.name}: trains {trained:,} of {sum(parts_.values()):,} weights",
            "  " + ", ".join(f"{name} {size:,}" for name, size in parts_.items()),
            f"  {stage.steps} steps of {stage.batch} rows: {step.machine.world} ranks x "
            f"{step.rounds} micro-batches of {stage.micro_batch}; "
            f"rows of {rows.tokens} tokens, {rows.scored} scored ({rows.source})",
            *table(step),
            f"  {flops / 1e12:,.1f} TFLOP in a step; {hours:,.1f} hours", ""]


def plan(config: Config, machine: Machine, text: int | None) -> str:
    """The plan of every stage; text: tokens of a row beside its image, None: by the data."""
    lines, hours = [], 0.0
    for stage in config.stage:
        model = build(config, stage)
        rows = sample_rows(config, stage, model.clip.config.patches, text)
        step = Step(model, config, stage, rows, machine)
        lines += plan_stage(step)
        hours += step.cost()[1]
    lines.append(f"{hours:,.1f} hours at {machine.world} x {machine.tflops:g} TFLOP/s, "
                 f"{machine.utilisation:.0%} of it reached; sending is not counted")
    return "\n".join(lines)
