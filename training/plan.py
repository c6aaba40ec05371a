"""What a run holds, sends and computes, known before anything is rented or downloaded.

    python -m training.plan --config F [--set KEY=VALUE] [--world 8] [--memory-gb 80] [--tflops 100]

The model is built on the meta device: weights have shapes and no values. Sizes come from the
folders in the configuration or, where they are not there yet, from the name of a size at the end of
their paths (`--set llm=3-8B`). `dtype = "auto"` is planned as bf16. GB are 10^9 bytes.

What stays from step to step and what is sent is exact. Activations are a formula, within 15 % of
what was measured. Bytes that autograd keeps of a decoder layer, for each token of a micro-batch:

    two norms, in fp32     8D
    attention              3c(H + K)E     q, k, v as a view of all three, output
    feed-forward           3cF            gate and up, silu(gate)
    where it is trained    4cD + cF more  inputs of its weights
    with `recompute`       cD instead     its input; and once the larger of a layer's above, logits

At ZeRO-0 a trained layer also keeps a copy of its weights in the compute dtype. Of int8 weights one
matrix at a time is dequantised. "in all" adds up everything. With one micro-batch per step a rank
holds less: gradients grow while activations are freed.

Letters: as in llama.py; c bytes per number in the compute dtype, r per gradient that is sent.
"""

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import clip
import llama
from clip import ClipConfig
from common.files import one_line, read_frozen
from iaa import IAA, LOSS_ROWS
from llama import DecoderLayer, LlamaConfig
from training.config import Config, StageConfig, read_config
from training.log import Row, average_row, count, meta_model, step_flops
from training.zero import model_parts, timetable

MASTER = 4  # bytes of an fp32 number
LOGIT = 3 * MASTER  # bytes per logit in the backward pass: logit, log-probability, gradient
SPARE = 0.1  # share of the memory that a plan must leave: the context of a GPU, fragmentation
VARIANTS = ((0, True), (1, True), (2, True), (3, True), (3, False))  # ZeRO stage, shard_frozen


def frozen_config(folder: str, kind: str) -> LlamaConfig | ClipConfig:
    """The sizes of the frozen model ("llama" or "clip") in `folder`, or those its name ends with.

    Case does not count, "/" in a size's name may be "-". Raises ValueError that lists the sizes.
    """
    module, config = (llama, LlamaConfig) if kind == "llama" else (clip, ClipConfig)
    if Path(folder).is_dir():
        return read_frozen(config, folder)[0]
    path = folder.lower().replace("/", "-")
    for name, sizes in module.SIZES.items():
        if path.endswith(name.lower().replace("/", "-")):
            return sizes
    key = "llm" if kind == "llama" else "vision"
    raise ValueError(f"{folder}: no such folder; without it, {key} may be a size: "
                     f"{', '.join(module.SIZES)}")


def activations(model: IAA, config: Config, stage: StageConfig, zero: int, row: Row) -> int:
    """Bytes that come and go with a micro-batch: what autograd keeps, and the logits."""
    sizes, c, micro = model.llama.config, model.llama.dtype.itemsize, stage.micro_batch
    width, tokens, layers, rest = sizes.width, micro * row.tokens, [], 0  # layers: bytes of each
    for part in model_parts(model, stage.adaptor):
        cast = part.trained and part.read_in_backward and zero == 0 and c < MASTER
        copy = c * count(part.weights) if cast else 0  # of the masters, in the compute dtype
        if isinstance(part.module, DecoderLayer):
            attention = (sizes.heads + sizes.kv_heads) * sizes.head_size
            per_token = 8 * width + 3 * c * (attention + sizes.ffn)
            per_token += c * (4 * width + sizes.ffn) if part.trained else 0
            layers.append(tokens * per_token + copy)
        else:
            rest += copy
    logits = LOGIT * min(micro * row.scored, LOSS_ROWS) * sizes.vocab_size
    kept = sum(layers) + logits
    if config.recompute:  # a layer is computed again once the logits are gone
        kept = c * width * tokens * len(layers) + max(*layers, logits)
    dequantised = c * max((b.numel() for b in model.llama.buffers()), default=0)  # of int8 weights
    projector = c * micro * model.clip.config.patches * (model.clip.config.width + 2 * width)
    return kept + rest + dequantised + projector


def memory_and_traffic(
    model: IAA, config: Config, stage: StageConfig, row: Row, world: int
) -> tuple[dict[str, int], int]:
    """Bytes on a rank, by kind, and bytes that it sends in a step, as in docs/distributed.md.

    The gradient's norm and the number of tokens, a number each, are not in what is sent.
    """
    zero, c = stage.zero if world > 1 else 0, model.llama.dtype.itemsize
    r = MASTER if config.reduce_fp32 else c
    accumulation = math.ceil(stage.batch / stage.micro_batch / world)  # micro-batches of a rank
    units, stops, _ = timetable(model, stage.adaptor, zero, config.shard_frozen)
    size = {unit: unit.padded(world if zero else 1) for unit in units}  # stage 0 does not pad
    trained = sum(size[unit] for unit in units if unit.trained)
    in_shards = sum(size[unit] for unit in units if not unit.trained)
    frozen = in_shards // world or count(w for w in model.parameters() if not w.requires_grad)
    int8 = sum(buffer.nbytes for buffer in model.llama.buffers())  # never in shards
    shard = trained // world
    before = [None, *(stop.unit for stop in stops)]  # what a stop finds gathered already
    gathers = [size[stop.unit] if stop.gather and stop.unit is not unit else 0
               for stop, unit in zip(stops, before, strict=False)]
    copies, masters, gradients, sent = {
        0: (0, trained, trained, 2 * MASTER * trained),
        1: (trained, shard, trained if accumulation > 1 else shard, r * trained + c * trained),
        2: (trained, shard, shard, accumulation * r * trained + c * trained),
        3: (0, shard, shard, accumulation * (r * trained + c * sum(gathers))),
    }[zero]
    # Of gradients, one unit is sent while another is filled.
    reducing = 2 * r * max(size[unit] for unit in units if unit.trained) if zero else 0
    held = {
        "frozen weights": c * frozen + int8, "trained weights": c * copies,
        "fp32 masters": MASTER * masters, "moments": 2 * MASTER * masters,
        "gradients": MASTER * gradients,
        "activations": activations(model, config, stage, zero, row),
        "units in transit": c * max(a + b for a, b in pairwise([0, *gathers])) + reducing}
    return held, sent * (world - 1) // world


def table(
    model: IAA, config: Config, stage: StageConfig, row: Row, world: int, memory_gb: float
) -> list[str]:
    """Memory and traffic of a rank at each ZeRO stage, * the configuration's own, as lines."""
    longest = min(config.max_tokens, model.llama.config.context)
    long = Row(longest, math.ceil(longest * row.scored / row.tokens))
    columns = []
    for zero, shard in VARIANTS if world > 1 else VARIANTS[:1]:
        if zero == 3 and shard and config.frozen_dtype:
            continue  # `Config` refuses it
        own = zero == stage.zero and (zero < 3 or shard == config.shard_frozen) or world == 1
        run = replace(config, shard_frozen=shard) if zero == 3 else config
        at = model, run, replace(stage, zero=zero)
        held, sent = memory_and_traffic(*at, row, world)
        most = sum(memory_and_traffic(*at, long, world)[0].values())
        figures = {**held, "in all": sum(held.values()), f"in all, rows of {longest}": most,
                   "sent in a step": sent}
        columns.append({
            "GB on a rank": (f"ZeRO-{zero}" if shard else "3, frozen whole") + "*" * own,
            **{name: f"{value / 1e9:,.2f}" for name, value in figures.items()},
            f"fits {memory_gb:g} GB": "yes" if most <= (1 - SPARE) * memory_gb * 1e9 else "no"})
    return [f"  {name:25}" + "".join(f"{column[name]:>18}" for column in columns)
            for name in columns[0]]


def plan(config: Config, world: int, memory_gb: float, tflops: float) -> str:
    """The plan of every stage. tflops: TFLOP/s that a rank reaches."""
    lines, hours = [], 0.0
    for stage in config.stage:
        sizes = frozen_config(config.llm, "llama"), frozen_config(config.vision, "clip")
        model = meta_model(config, stage, *sizes)
        row = average_row(config, stage, model)
        frozen_llm, tower = (count(part.parameters()) for part in (model.llama, model.clip))
        trained = count(w for w in model.adaptors[stage.adaptor].parameters() if w.requires_grad)
        flops = step_flops(model, stage.adaptor, stage.batch, row.tokens, stage.batch * row.scored)
        if config.frozen_dtype == "int8":
            from speed.packing import pack

            pack(model.llama, int8=True)
        most = math.ceil(stage.batch / stage.micro_batch / world)  # micro-batches of a rank
        share = most * stage.micro_batch / stage.batch  # of the rank that has most: all wait for it
        took = stage.steps * share * flops / (tflops * 1e12) / 3600
        hours += took
        lines += [
            f"stage {stage.name}: trains {trained:,} weights; frozen LLM {frozen_llm:,}, "
            f"frozen vision tower {tower:,}",
            f"  {stage.steps} steps of {stage.batch} rows: {world} ranks x {most} micro-batches of "
            f"{stage.micro_batch}; rows of {row.tokens} tokens, {row.scored} scored "
            f"({row.source})", *table(model, config, stage, row, world, memory_gb),
            f"  {flops / 1e12:,.1f} TFLOP in a step; {took:,.1f} hours", ""]
    return "\n".join([*lines, f"{hours:,.1f} hours at {world} x {tflops:g} TFLOP/s; "
                              "sending is not counted"])


@one_line("training.plan")
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, such as configs/iaa8.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key, as for train.py")
    parser.add_argument("--world", type=int, default=8, help="ranks [%(default)s]")
    parser.add_argument("--memory-gb", type=float, default=80, help="of a rank [%(default)s]")
    parser.add_argument("--tflops", type=float, default=100, help="TFLOP/s of a rank: those in "
                        "log.jsonl, which are of all ranks, divided by their number [%(default)s: "
                        "a third of an A100's peak in bf16]")
    args = parser.parse_args(argv)
    if min(args.world, args.memory_gb, args.tflops) <= 0:
        parser.error("--world, --memory-gb, --tflops: above 0")
    print(plan(read_config(args.config, args.set), args.world, args.memory_gb, args.tflops))


if __name__ == "__main__":
    main()
