"""What a training step costs, a stage's log, and the time that is left."""

import contextlib
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from clip import Clip, ClipConfig
from common.device import DTYPES, Ranks
from common.files import read_frozen, write_text, writing
from data import UNSCORED, Batch, JsonlDataset, RowError, encode_row
from iaa import IAA, Adaptor
from llama import Llama, LlamaConfig
from tokenization.tokenizer import Tokenizer
from training.config import Config, StageConfig, adaptor_config

PRINT_S = 15  # seconds between two lines of progress where they cannot be rewritten
SAMPLED = 64  # rows of the data that an average row is taken from
TEXT_TOKENS = 100  # of an average row, half of them scored, where its data is not at hand
LOGGED = ("step", "loss", "lr", "flops")  # what is read from a log again


def count(weights) -> int:
    """Elements of all weights, each weight once."""
    return sum(w.numel() for w in set(weights))


def step_flops(model: IAA, workflow: str, rows: int, tokens: int, scored: int) -> int:
    """FLOPs of the forward and backward pass over `rows` rows of `tokens` tokens each.

    The one definition, for log and plan. A weight of the decoder layers and gates takes 2 FLOPs per
    token forward and 2 for the activations' gradient, a trained one 2 more for its own. The LM head
    takes the same for each of the `scored` positions of all rows. Attention takes 4 H E forward and
    10 H E backward (it scores again) per layer and pair of tokens of a row, masked pairs too. The
    vision tower, the projector, the loss and layers that `recompute` runs once more are left out.
    """
    adaptor = model.adaptors[workflow]
    llm = model.llm(adaptor)
    sizes, layers = llm.config, len(llm.layers) + len(adaptor.layers)
    attention = sizes.heads * sizes.head_size
    # By the sizes, not by counting: int8 weights are no parameters.
    layer = sizes.width * (2 * attention + 2 * sizes.kv_heads * sizes.head_size + 3 * sizes.ffn + 2)
    inserted = layer * len(adaptor.layers) + count(adaptor.gates.parameters())
    matrices = layer * len(llm.layers) + inserted
    trained = inserted if adaptor.llm is None else matrices
    own_head = adaptor.head or adaptor.llm  # None: the frozen LLM's
    head_trained = own_head is not None and next(own_head.parameters()).requires_grad
    head = scored * sizes.vocab_size * sizes.width * (6 if head_trained else 4)
    return (rows * tokens * (4 * matrices + 2 * trained) + head
            + 14 * attention * rows * tokens**2 * layers)


def stage_flops(config: Config, stage: StageConfig) -> int:
    """FLOPs of all steps of a stage, by the average row of its data."""
    model = meta_model(config, stage, read_frozen(LlamaConfig, config.llm)[0],
                       read_frozen(ClipConfig, config.vision)[0])
    row = average_row(config, stage, model)
    return stage.steps * step_flops(model, stage.adaptor, stage.batch, row.tokens,
                                    stage.batch * row.scored)


def meta_model(config: Config, stage: StageConfig, sizes: LlamaConfig, vision: ClipConfig) -> IAA:
    """The stage's model on the meta device, its trained weights in fp32."""
    dtype = DTYPES["bf16" if config.dtype == "auto" else config.dtype]
    with torch.device("meta"):
        model = IAA(Llama(sizes).to(dtype), Clip(vision).to(dtype), 0)
        adaptor = Adaptor(adaptor_config(config, stage, sizes.layers), sizes, vision.width)
        if stage.trains == "layers":
            adaptor.freeze_embedding_and_head(dtype, "meta")
        model.adaptors[stage.adaptor] = adaptor
    return model


@dataclass(frozen=True)
class Row:
    """An average row: its tokens, those of its picture included, and how many are scored."""

    tokens: int
    scored: int
    source: str = "assumed"


def average_row(config: Config, stage: StageConfig, model: IAA) -> Row:
    """The mean of some rows of the data; where it is not there, a picture and TEXT_TOKENS."""
    patches, examples = model.clip.config.patches, []
    if all(Path(path).is_file() for path in (config.llm + "/config.json", *stage.data)):
        tokenizer, dataset = Tokenizer.load(config.llm), JsonlDataset(stage.data, config.images)
        longest = min(config.max_tokens, model.llama.config.context)
        for index in range(0, len(dataset), -(-len(dataset) // SAMPLED)):
            with contextlib.suppress(RowError):
                examples.append(encode_row(dataset.row(index), tokenizer, patches,
                                           stage.template or None, config.system, longest))
    if not examples:
        return Row(patches + TEXT_TOKENS, TEXT_TOKENS // 2)
    tokens = sum(len(e.tokens) for e in examples) / len(examples)
    scored = sum(int((e.targets != UNSCORED).sum()) for e in examples) / len(examples)
    return Row(math.ceil(tokens), math.ceil(scored), f"mean of {len(examples)} rows of the data")


def read_log(path: Path) -> list[dict]:
    """The rows of a log.jsonl, but for a last line that a running or killed run has not finished.

    Raises ValueError naming a line that is damaged.
    """
    rows = []
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            sum(rows[-1][key] for key in LOGGED)  # all there, and numbers
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{path}:{number}: a damaged line; repair it or remove it") from None
    return rows


class Log:
    """A stage's `log.jsonl`, a line per step, and its progress on the screen.

    later: FLOPs of the stages after this one. Of a resumed stage, lines of steps that run again are
    cut from the file. With a `tracker`, events for TensorBoard stand beside it.
    """

    def __init__(
        self, model: IAA, config: Config, stage: StageConfig, ranks: Ranks, first: int, later: float
    ):
        self.model, self.stage, self.ranks, self.later = model, stage, ranks, later
        self.path = Path(config.out, stage.name, "log.jsonl")
        self.first, self.printed = first, 0.0
        kept = [row for row in read_log(self.path) if row["step"] < first]
        self.flops = sum(row["flops"] for row in kept)
        # Rows of all ranks that were cut at max_tokens, and those that could not be used.
        self.cut, self.skipped = (kept[-1].get(key, 0) if kept else 0 for key in ("cut", "skipped"))
        if ranks.rank == 0:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # else an earlier stage's peak would be shown
        self.events = None
        if config.tracker == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter  # optional: all ranks stop without it

            if ranks.rank == 0:
                # purge_step: events of steps that run again are not shown.
                self.events = SummaryWriter(self.path.parent, purge_step=first)
        self.clock = time.perf_counter()
        self.began = self.clock, self.flops, first  # the rate is that since then

    def step(self, step: int, values: dict, batches: list[Batch], wait_s: float) -> None:
        """Log a step. Tokens and FLOPs of all ranks are estimated from this rank's share."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        share = self.stage.batch / max(1, sum(len(b.tokens) for b in batches))
        flops = share * sum(step_flops(self.model, self.stage.adaptor, *b.tokens.shape, b.scored)
                            for b in batches)
        tokens = sum(int(b.lengths.sum()) for b in batches)
        padded = sum(b.tokens.numel() for b in batches)
        self.flops += flops
        self.cut += int(self.ranks.sum(sum(b.cut for b in batches)))
        reasons = [reason for b in batches for reason in b.skipped]
        self.skipped += int(self.ranks.sum(len(reasons)))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.ranks.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        row = {"step": step, **values, "tokens_per_s": share * tokens / seconds, "flops": flops,
               "tflops": flops / seconds / 1e12, "data_wait": wait_s / seconds,
               "padding": 1 - tokens / max(1, padded), "seconds": seconds,
               "memory_gb": memory / 1e9, "cut": self.cut, "skipped": self.skipped}
        for reason in reasons:
            print(f"skipped {reason}", file=sys.stderr)
        if self.ranks.rank == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.events is not None:
                with writing(self.path.parent):
                    for key in row.keys() - {"step"}:
                        self.events.add_scalar(key, row[key], step)
                    self.events.flush()  # a kill then loses no step that is behind a checkpoint
            self.show(step, row)
        if step == self.first and step + 1 < self.stage.steps:
            # The first step is a slow one: the time that is left goes by the others.
            self.began = self.clock, self.flops, step + 1

    def show(self, step: int, row: dict) -> None:
        """The progress line: rewritten on a terminal, elsewhere printed every PRINT_S seconds."""
        clock, flops, first = self.began
        seconds, flops = self.clock - clock, self.flops - flops
        stage_s = (self.stage.steps - step - 1) * seconds / (step + 1 - first)
        run_s = stage_s + self.later * seconds / flops  # later stages have steps of other sizes
        held_out = f"  held-out {row['held_out']:.4f}" if "held_out" in row else ""
        cut = "".join(f"  {row[key]} rows {key}" for key in ("cut", "skipped") if row[key])
        line = (f"{self.stage.name} {step + 1}/{self.stage.steps}  loss {row['loss']:.4f}"
                f"{held_out}  {row['tokens_per_s']:,.0f} tokens/s  {flops / seconds / 1e12:.3f} "
                f"TFLOP/s{cut}  {stage_s / 60:.1f} min left, {run_s / 60:.1f} of the run")
        last = step + 1 == self.stage.steps
        if sys.stdout.isatty():
            # Without wrapping: "\r" goes back to the beginning of the last row only.
            print(f"\r\x1b[?7l{line}\x1b[K\x1b[?7h", end="\n" if last or held_out else "",
                  flush=True)
        elif held_out or last or time.perf_counter() - self.printed > PRINT_S:
            self.printed = time.perf_counter()
            print(line, flush=True)
