"""What a run will hold, send and compute, known before anything is rented or downloaded.

    python train.py --plan --config F [--world 8] [--memory-gb 80] [--tflops 312] ...

The model is built on the meta device, where weights have shapes and no values, from the folders of
the config or, where they are not there yet, from the size that their path ends with (`--set
llm=3-8B`). The arithmetic is in budget.py. GB are 10^9 bytes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

import clip
import llama
from training.budget import Machine, Rows, Step, count
from clip import Clip, ClipConfig
from training.config import DTYPES, Config, StageConfig, adaptor_config, longest_row
from data import UNSCORED, JsonlDataset, RowError, encode_row
from iaa import IAA, Adaptor
from llama import Llama, LlamaConfig
from storage import read_base
from tokenization.tokenizer import Tokenizer

TEXT_TOKENS = 100  # of a row, half of them scored, where no data is at hand
SAMPLE = 64  # rows that are looked at where there is


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


def meta_model(config: Config, stage: StageConfig) -> IAA:
    """The stage's model on the meta device, its trained weights in fp32."""
    sizes = frozen_config(config.llm, "llama")
    vision = frozen_config(config.vision, "clip")
    with torch.device("meta"):
        dtype = DTYPES[config.dtype]
        model = IAA(Llama(sizes).to(dtype), Clip(vision).to(dtype), 0)
        settings = adaptor_config(config, stage, sizes.layers)
        model.adaptors[stage.adaptor] = Adaptor(settings, sizes, vision.width)
    return model


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


def sample_rows(
    config: Config, stage: StageConfig, patches: int, context: int, text: int | None
) -> Rows:
    """Tokens of an average row: `text` and an image, or a mean over the data where it is there.

    patches, context: tokens of an image, and those that the LLM takes.
    """
    there = all(Path(path).is_file() for path in [config.llm + "/config.json", *stage.data])
    if text is not None or not there:
        text = TEXT_TOKENS if text is None else text
        return Rows(patches + text, text // 2)
    tokenizer = Tokenizer.load(config.llm)
    dataset = JsonlDataset(stage.data, config.images)
    template, longest, examples = stage.template or None, longest_row(config, context), []
    for index in range(0, len(dataset), -(-len(dataset) // SAMPLE)):
        with contextlib.suppress(RowError):
            examples.append(encode_row(dataset.row(index), tokenizer, patches, template,
                                       config.system, longest))
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
    longest = longest_row(step.config, step.model.llama.config.context)
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
        model = meta_model(config, stage)
        patches, context = model.clip.config.patches, model.llama.config.context
        rows = sample_rows(config, stage, patches, context, text)
        step = Step(model, config, stage, rows, machine)
        lines += plan_stage(step)
        hours += step.cost()[1]
    lines.append(f"{hours:,.1f} hours at {machine.world} x {machine.tflops:g} TFLOP/s, "
                 f"{machine.utilisation:.0%} of it reached; sending is not counted")
    return "\n".join(lines)
