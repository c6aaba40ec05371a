"""What a run holds, sends and computes, known before anything is rented or downloaded.

    python -m training.plan --config F [--set KEY=VALUE] [--world 8] [--memory-gb 80] [--tflops 312]

The model is built on the meta device: weights have shapes and no values. Sizes come from the
folders in the configuration or, where they are not there yet, from the name of a size at the end of
their paths (`--set llm=3-8B`). `dtype = "auto"` is planned as bf16. GB are 10^9 bytes.

What stays from step to step and what is sent is exact. Activations are a formula, within 15 % of
what was measured. Bytes that autograd keeps of a decoder layer, for each token of a micro-batch:

    two norms, in fp32     8D
    attention              3c(H + K)E     q, k, v as a view of all three, output
    feed-forward           3cF            gate and up, silu(gate)
    where it is trained    4cD + cF more  inputs of its weights
    with `recompute`       cD instead     its input; one layer at a time has all of the above

"in all" adds up everything. With one micro-batch a step a rank holds less: its gradients come while
its activations go.

Letters: as in llama.py; c bytes of a weight that computes, r of a gradient that is sent.
"""

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import clip
import llama
from clip import ClipConfig
from common.files import one_line
from iaa import IAA, LOSS_ROWS
from llama import DecoderLayer, LlamaConfig
from training.config import Config, StageConfig, longest_row, read_config
from training.log import Row, average_row, count, meta_model, step_flops
from training.zero import Stop, Unit, model_parts, timetable

MASTER = 4  # bytes of an fp32 number
LOGIT = 3 * MASTER  # bytes of a logit when its gradient is made: itself, its log-probability, that
VARIANTS = ((0, True), (1, True), (2, True), (3, True), (3, False))  # ZeRO stage, shard_frozen


def frozen_config(folder: str, kind: str) -> LlamaConfig | ClipConfig:
    """The sizes of the frozen model ("llama" or "clip") in `folder`, or those its name ends with.

    Case does not count, "/" in a size's name may be "-". Raises ValueError that lists the sizes.
    """
    module, config = (llama, LlamaConfig) if kind == "llama" else (clip, ClipConfig)
    if Path(folder).is_dir():
        return config.read(folder)[0]
    path = folder.lower().replace("/", "-")
    fitting = [name for name in module.SIZES if path.endswith(name.lower().replace("/", "-"))]
    if not fitting:
        key = "llm" if kind == "llama" else "vision"
        raise ValueError(f"{folder}: no such folder; to plan without it, name a size: "
                         f"--set {key}=NAME, one of {', '.join(module.SIZES)}")
    return module.SIZES[max(fitting, key=len)]


def bytes_held(
    units: list[Unit], stage: int, world: int, accumulation: int, c: int
) -> dict[str, int]:
    """What a rank holds from step to step by zero.py's table, by kind; frozen: those in shards.

    units: of `timetable`. accumulation: micro-batches of a rank in a step.
    """
    numel = count(w for unit in units if unit.trained for w in unit.weights)
    padded = sum(unit.padded(world) for unit in units if unit.trained)
    frozen = sum(unit.padded(world) for unit in units if not unit.trained)
    if stage == 0:
        buckets = MASTER * numel if world > 1 else 0
        return {"frozen weights": 0, "trained weights": 0, "fp32 masters": MASTER * numel,
                "moments": 2 * MASTER * numel, "gradients": MASTER * numel + buckets}
    whole = stage == 1 and accumulation > 1  # until the last micro-batch
    shard = MASTER * padded // world
    return {"frozen weights": c * frozen // world,
            "trained weights": c * padded if stage < 3 else 0, "fp32 masters": shard,
            "moments": 2 * shard, "gradients": MASTER * padded if whole else shard}


def bytes_sent(
    units: list[Unit], stops: list[Stop], stage: int, world: int, accumulation: int, c: int, r: int
) -> int:
    """What a rank sends in a step by zero.py's table, but for the norm and the number of tokens."""
    trained = [unit for unit in units if unit.trained]
    if stage == 0:
        return 2 * MASTER * count(w for u in trained for w in u.weights) * (world - 1) // world
    size = sum(unit.padded(world) for unit in trained)
    total = r * size * (1 if stage == 1 else accumulation) + (c * size if stage < 3 else 0)
    for before, stop in pairwise([None, *stops]):
        if stop.gather and (before is None or before.unit is not stop.unit):
            total += accumulation * c * stop.unit.padded(world)
    return total * (world - 1) // world


def layer_activations(sizes: LlamaConfig, c: int, trained: bool) -> int:
    """Bytes that autograd keeps of a decoder layer for each token."""
    attention = (sizes.heads + sizes.kv_heads) * sizes.head_size
    kept = 8 * sizes.width + 3 * c * (attention + sizes.ffn)
    return kept + (c * (4 * sizes.width + sizes.ffn) if trained else 0)


def activations(model: IAA, config: Config, stage: StageConfig, zero: int, row: Row) -> int:
    """Bytes that come and go with a micro-batch: what autograd keeps, and the logits."""
    sizes, c, micro = model.llama.config, model.llama.dtype.itemsize, stage.micro_batch
    width, patches = sizes.width, model.clip.config.patches
    total = copies = largest = 0
    for part in model_parts(model, stage.adaptor):
        if part.trained and part.read_in_backward and zero == 0 and c < MASTER:
            copies += c * count(part.weights)  # of the masters, in the compute dtype
        if isinstance(part.module, DecoderLayer):
            kept = layer_activations(sizes, c, part.trained)
            largest = max(largest, kept)
            total += micro * row.tokens * (c * width if config.recompute else kept)
    total += micro * row.tokens * largest if config.recompute else 0
    total += c * micro * patches * (model.clip.config.width + 2 * width)  # the projector's
    return total + copies + LOGIT * min(micro * row.scored, LOSS_ROWS) * sizes.vocab_size


def memory_and_traffic(
    model: IAA, config: Config, stage: StageConfig, row: Row, world: int
) -> tuple[dict[str, int], int]:
    """Bytes on a rank, by kind, and bytes that it sends in a step."""
    zero, c = stage.zero if world > 1 else 0, model.llama.dtype.itemsize
    r = MASTER if config.reduce_fp32 else c
    accumulation = math.ceil(stage.batch / stage.micro_batch / world)
    units, stops, _ = timetable(model, stage.adaptor, zero, config.shard_frozen)
    held = bytes_held(units, zero, world, accumulation, c)
    if zero < 3 or not config.shard_frozen:
        held["frozen weights"] = c * count([*model.llama.parameters(), *model.clip.parameters()])
    held["activations"] = activations(model, config, stage, zero, row)
    gathered = [c * stop.unit.padded(world) if stop.gather else 0 for stop in stops]
    sent = max(r * unit.padded(world) for unit in units if unit.trained) if zero else 0
    held["units in transit"] = max(a + b for a, b in pairwise([0, *gathered])) + 2 * sent
    return held, bytes_sent(units, stops, zero, world, accumulation, c, r)


def table(
    model: IAA, config: Config, stage: StageConfig, row: Row, world: int, memory_gb: float
) -> list[str]:
    """Memory and traffic of a rank at each ZeRO stage, * the configuration's own, as lines."""
    longest = longest_row(config, model.llama.config.context)
    long = Row(longest, math.ceil(longest * row.scored / row.tokens))
    columns = []
    for zero, shard in VARIANTS if world > 1 else VARIANTS[:1]:
        own = zero == stage.zero and (zero < 3 or shard == config.shard_frozen) or world == 1
        at = model, replace(config, shard_frozen=shard), replace(stage, zero=zero)
        held, sent = memory_and_traffic(*at, row, world)
        size, most = sum(held.values()), sum(memory_and_traffic(*at, long, world)[0].values())
        figures = {**held, "in all": size, f"in all, rows of {longest}": most,
                   "sent in a step": sent}
        limit = memory_gb * 1e9
        fits = "no" if size > limit else "not long rows" if most > limit else "yes"
        if not columns:
            columns.append(["GB on a rank", *figures, f"fits {memory_gb:g} GB"])
        name = (f"ZeRO-{zero}" if shard else "3, frozen whole") + "*" * own
        columns.append([name, *(f"{value / 1e9:,.2f}" for value in figures.values()), fits])
    widths = [max(map(len, column)) for column in columns]
    return ["  " + first.ljust(widths[0]) + "".join(
        "  " + text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        for first, *rest in zip(*columns, strict=True)]


def plan(
    config: Config, world: int, memory_gb: float, tflops: float, utilisation: float,
    text: int | None
) -> str:
    """The plan of every stage. tflops: a rank's peak. text: tokens of a row, None: by the data."""
    lines, hours = [], 0.0
    for stage in config.stage:
        sizes = frozen_config(config.llm, "llama"), frozen_config(config.vision, "clip")
        model = meta_model(config, stage, *sizes)
        row = average_row(config, stage, model, text)
        frozen_llm, tower, trained = (count(part.parameters()) for part in (
            model.llama, model.clip, model.adaptors[stage.adaptor]))
        flops = step_flops(model, stage.adaptor, stage.batch, row.tokens,
                           stage.batch * row.scored, config.recompute)
        most = math.ceil(stage.batch / stage.micro_batch / world)  # micro-batches of a rank
        share = most * stage.micro_batch / stage.batch
        took = stage.steps * share * flops / (tflops * 1e12 * utilisation) / 3600
        hours += took
        lines += [
            f"stage {stage.name}: trains {trained:,} weights; frozen LLM {frozen_llm:,}, "
            f"frozen vision tower {tower:,}",
            f"  {stage.steps} steps of {stage.batch} rows: {world} ranks x {most} micro-batches of "
            f"{stage.micro_batch}; rows of {row.tokens} tokens, {row.scored} scored "
            f"({row.source})", *table(model, config, stage, row, world, memory_gb),
            f"  {flops / 1e12:,.1f} TFLOP in a step; {took:,.1f} hours", ""]
    return "\n".join([*lines, f"{hours:,.1f} hours at {world} x {tflops:g} TFLOP/s, "
                              f"{utilisation:.0%} of it reached; sending is not counted"])


@one_line("training.plan")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, such as configs/iaa8.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key, as for train.py")
    parser.add_argument("--world", type=int, default=8, help="ranks [%(default)s]")
    parser.add_argument("--memory-gb", type=float, default=80, help="of a rank [%(default)s]")
    parser.add_argument("--tflops", type=float, default=312,
                        help="peak of a rank in TFLOP/s [%(default)s: an A100 in bf16]")
    parser.add_argument("--utilisation", type=float, default=0.4,
                        help="share of that peak that is reached [%(default)s]")
    parser.add_argument("--text-tokens", type=int,
                        help="of a row beside its picture, half of them scored [the data's mean]")
    args = parser.parse_args(argv)
    if min(args.world, args.memory_gb, args.tflops, args.utilisation) <= 0:
        parser.error("--world, --memory-gb, --tflops, --utilisation: above 0")
    if args.text_tokens is not None and args.text_tokens < 2:
        parser.error("--text-tokens: 2 or more, one of them scored")
    print(plan(read_config(args.config, args.set), args.world, args.memory_gb, args.tflops,
               args.utilisation, args.text_tokens))


if __name__ == "__main__":
    main()
