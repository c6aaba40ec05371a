"""Train IAA: the stages of a TOML file in order, each from the result of one before (Table 1).

    python train.py --config configs/demo.toml [--stage NAME] [--set key=value ...]
    torchrun --nproc_per_node N train.py --config ...    the same on N processes (training/zero.py)

- Everything random is a function of the seed and the step, so the step number is all that a
  checkpoint must keep of the data and of the random state. On CPUs, a run that was killed and
  resumed on as many ranks, with the same `zero`, ends with the same bits as one that was never
  killed. (On GPUs, torch's attention sums a gradient in an order that varies.)
- Trained weights are kept in fp32. Layers cast them to the dtype of the frozen model to compute.
  ZeRO stages 1 to 3 keep shards of them and compute with copies in that dtype.
- The loss is a sum over the global batch, divided by the number of scored tokens in the global
  batch. So the same rows give the same update, up to rounding, however they are split over ranks
  and micro-batches.
- `out/` holds `config.json`, `iaa.json` (what sample.py opens) and a folder for each stage: its
  `log.jsonl`, its checkpoints `step-000100/` while it runs, and `adaptor/` once it is finished.

Letters: as in iaa.py.
"""

import argparse
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clip import Clip, open_image, preprocess
from common import files
from common.device import DTYPES, Ranks, choose_dtype
from data import Batch, JsonlDataset, Sampler, loader
from iaa import IAA, Adaptor, Index, load_tensors, read_adaptor_config
from llama import Llama, set_recompute
from tokenization.tokenizer import Tokenizer
from training import checkpoint
from training.checkpoint import adaptor_folder, settings_of, source_folder
from training.config import Config, StageConfig, adaptor_config, read_config
from training.log import Log, count, stage_flops
from training.zero import DataParallel, ZeroSharded, build_state

SIGTERM = threading.Event()  # set by that signal: finish the step, save, leave
MAX_BAD_STEPS = 10  # steps in a row that are not finite; then the run stops


def lr_at(step: int, stage: StageConfig) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to zero (Table 1)."""
    warmup = math.ceil(stage.warmup * stage.steps)
    if step < warmup:  # AdamW's first steps are noisy
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))


def make_optimizer(masters: dict[str, Tensor], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over all trained weights. The projector may have a rate of its own.

    The projector starts random, all other weights as copies of frozen ones.
    """
    projector = [m for name, m in masters.items() if name.startswith("projector.")]
    rest = [m for name, m in masters.items() if not name.startswith("projector.")]
    groups = [{"params": projector, "peak": stage.lr_projector or stage.lr}]
    groups += [{"params": rest, "peak": stage.lr}] if rest else []
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(stage.beta1, stage.beta2), eps=stage.eps,
                             weight_decay=stage.weight_decay, fused=True)


def batch_loss(model: IAA, workflow: str, device: torch.device, batch: Batch) -> Tensor:
    """The sum of the cross-entropy over the batch's scored tokens, computed on `device`."""
    b = batch.to(device)
    return model.loss(b.tokens, b.targets, workflow, b.images, b.positions, b.segments)


def train_step(
    state: DataParallel | ZeroSharded,
    batches: list[Batch | None],  # equally many on every rank, filled up with None
    optimizer: torch.optim.AdamW,
    stage: StageConfig,
    step: int,
    ranks: Ranks,
) -> tuple[float, float, bool]:
    """One update. Returns the mean loss, the gradient's norm, and whether both were finite.

    Where they were not finite, nothing is updated, and a line says so.
    """
    scored = ranks.sum(sum(b.scored for b in batches if b is not None))  # in the global batch
    total = sum(state.forward_backward(batch, scored, last=number == len(batches))
                for number, batch in enumerate(batches, 1))  # a sum of tensors: no wait for a GPU
    norm = state.clip(stage.clip_norm)  # one bad batch cannot throw the weights far off
    mean, norm = ranks.sum(total.item()) / scored, norm.item()
    finite = math.isfinite(norm) and math.isfinite(mean)  # global values, so all ranks agree
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, stage)
        optimizer.step()  # at ZeRO 1 to 3, only this rank's shards
        state.all_gather_weights()
    else:
        ranks.print0(f"step {step + 1}: loss {mean}, gradient norm {norm}: skipped")
    optimizer.zero_grad()  # to None, which frees their memory
    return mean, norm, finite


def held_out_loss(state: DataParallel | ZeroSharded, batches: list[Batch]) -> float:
    """The mean loss over the scored tokens of held-out batches. Every rank computes the same."""
    total = sum(state.forward(batch).item() for batch in batches)
    return total / sum(batch.scored for batch in batches)


@dataclass
class Run:
    """What a stage works with: the frozen models, the tokenizer, the place among the ranks."""

    config: Config
    ranks: Ranks
    model: IAA
    tokenizer: Tokenizer


def open_run(config: Config, ranks: Ranks, stage: StageConfig) -> Run:
    """Load the frozen models. With ZeRO-3 they go to the CPU first: a rank keeps only its shard."""
    ranks.progress = f"the start of stage {stage.name}"
    in_shards = ranks.world > 1 and stage.zero == 3 and config.shard_frozen  # a GPU gets its shard
    device = "cpu" if in_shards else ranks.device
    dtype = DTYPES[config.dtype]
    llama = files.load_frozen(Llama, config.llm, dtype, device)
    clip = files.load_frozen(Clip, config.vision, dtype, device)
    tokenizer = Tokenizer.load(config.llm)
    return Run(config, ranks, IAA(llama, clip, tokenizer.image_id), tokenizer)


def start_adaptor(run: Run, stage: StageConfig) -> Adaptor:
    """Add the stage's adaptor to the model, its trained weights in fp32.

    It starts as copies of frozen weights, which the source stage's weights replace. With
    `frozen_dtype = "int8"` the frozen LLM is int8 afterwards.
    """
    torch.manual_seed(run.config.seed)  # for the projector, the only part that starts random
    llama = run.model.llama
    settings = adaptor_config(run.config, stage, llama.config.layers)
    adaptor = Adaptor(settings, llama.config, run.model.clip.config.width)
    adaptor.init_from_frozen(llama)
    folder = source_folder(run.config, stage)
    if folder is not None:
        was = read_adaptor_config(folder, run.model.base)["adaptor"]
        for key in ("insertion", "structure"):  # shapes do not tell the place of a layer
            if was.insertion and getattr(was, key) != getattr(settings, key):
                raise ValueError(f"{folder} has {key} = {getattr(was, key)!r}, stage {stage.name} "
                                 f"has {getattr(settings, key)!r}")
        # A source with a projector alone replaces only that: the layers stay copies.
        load_tensors(adaptor, folder, torch.float32, "cpu", strict=False)
    # "plain" has no question in it. Such an adaptor is asked in the LLM's own template.
    template = run.tokenizer.template if stage.template in ("", "plain") else stage.template
    adaptor.prompt = {"template": template, "system": run.config.system}
    if stage.trains == "layers":
        adaptor.freeze_embedding_and_head(llama.dtype, llama.device)
    run.model.adaptors[stage.adaptor] = adaptor
    if run.config.frozen_dtype == "int8":  # now that insertion layers are exact copies
        from speed.packing import pack  # no other setting needs it

        pack(llama, int8=True)
    return adaptor


def open_data(run: Run, stage: StageConfig, paths: list[str]) -> JsonlDataset:
    """The rows of the files, encoded for this stage."""
    config, clip = run.config, run.model.clip.config
    longest = min(config.max_tokens, run.model.llama.config.context)
    return JsonlDataset(paths, config.images, run.tokenizer, clip.patches,
                        lambda path, size: preprocess(open_image(path, size), clip),
                        stage.template or None, config.system, longest)


def micro_batches(
    stage: StageConfig, sampler: Sampler, ranks: Ranks, first: int
) -> Iterator[list[int]]:
    """The rows of this rank's micro-batches from step `first` on: dealt to the ranks in turn."""
    for step in range(first, stage.steps):
        rows = sampler.rows(step)
        cuts = [rows[i : i + stage.micro_batch] for i in range(0, stage.batch, stage.micro_batch)]
        yield from cuts[ranks.rank :: ranks.world]  # rows of similar length, on different ranks


def held_out_batches(run: Run, stage: StageConfig) -> list[Batch]:
    """The first `eval_rows` rows of the held-out files as batches, none where no file is given."""
    if not stage.held_out:
        return []
    dataset = open_data(run, stage, stage.held_out)
    rows = list(range(min(stage.eval_rows, len(dataset))))  # the same in every evaluation
    cuts = [rows[i : i + stage.micro_batch] for i in range(0, len(rows), stage.micro_batch)]
    batches = list(loader(dataset, cuts))  # kept in memory: they are read again and again
    for reason in [reason for batch in batches for reason in batch.skipped]:
        run.ranks.print0(f"held out: skipped {reason}")
    return batches


def next_batches(run: Run, stream: Iterator[Batch], number: int) -> list[Batch]:
    """The next micro-batches. ChildProcessError where a loader died, or gave none in time."""
    # No limit without workers: an alarm while decoding would be taken for a bad picture.
    limit_s = run.config.timeout_s if run.config.workers else 0

    def give_up(*_) -> None:
        raise RuntimeError(f"the data loader gave no batch in {limit_s} s")

    signal.signal(signal.SIGALRM, give_up)
    # A limit of torch's own would not cover a worker that freezes while it hands over a batch.
    signal.alarm(limit_s)  # 0: none
    try:  # copies: each tensor of a worker holds an open file, and a system allows some 1000
        return [next(stream).to("cpu", copy=True) for _ in range(number)]
    except RuntimeError as error:
        raise ChildProcessError(f"{run.ranks.where_stopped}: {error}") from None
    finally:
        signal.alarm(0)
        # Torch's own handler would raise at any line. `next` notices a dead worker as well.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def run_stage(run: Run, stage: StageConfig, later: float) -> None:
    """Train one stage to its end and save its adaptor. later: FLOPs of later stages."""
    ranks, config, began = run.ranks, run.config, time.perf_counter()
    folder = Path(config.out, stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    adaptor = start_adaptor(run, stage)
    set_recompute(run.model, config.recompute)  # activation checkpointing
    state = build_state(partial(batch_loss, run.model, stage.adaptor, ranks.device), run.model,
                        stage.adaptor, stage.zero, ranks.world, ranks.device, config.shard_frozen,
                        config.reduce_fp32)
    optimizer = make_optimizer(state.masters, stage)
    settings = settings_of(config, stage)
    first = checkpoint.resume_state(folder, ranks, state, optimizer, settings)
    if ranks.rank == 0:  # only now: refused settings must not replace the old ones
        files.write_json(Path(config.out, "config.json"), asdict(config))
    size = count(weight for weight in adaptor.parameters() if weight.requires_grad)
    ranks.print0(f"stage {stage.name}: trains {size:,} weights, from step {first}")
    dataset = open_data(run, stage, stage.data)
    sampler = Sampler(dataset.lengths, stage.batch, config.seed)
    stream = loader(dataset, micro_batches(stage, sampler, ranks, first), config.workers)
    per_step = stage.batch // stage.micro_batch
    mine = len(range(ranks.rank, per_step, ranks.world))  # this rank's micro-batches of a step
    missing = [None] * (math.ceil(per_step / ranks.world) - mine)  # as many on each rank
    held_out = held_out_batches(run, stage)
    log = Log(run.model, config, stage, ranks, first, later)
    bad_in_a_row = 0
    for step in range(first, stage.steps):
        ranks.progress = f"stage {stage.name}, step {step + 1}"
        asked = time.perf_counter()
        batches = next_batches(run, stream, mine)
        wait = time.perf_counter() - asked  # where it is long, raise `workers`
        mean, norm, finite = train_step(state, batches + missing, optimizer, stage, step, ranks)
        bad_in_a_row = 0 if finite else bad_in_a_row + 1
        if bad_in_a_row >= min(MAX_BAD_STEPS, stage.steps):
            raise ValueError(f"{ranks.progress}: {bad_in_a_row} steps in a row were not finite; "
                             f"they changed nothing, what is saved in {folder} is intact")
        values = {"loss": mean, "grad_norm": norm,
                  "lr": optimizer.param_groups[-1]["peak"] * lr_at(step, stage)}
        last = step + 1 == stage.steps
        if held_out and (last or (step + 1) % stage.eval_every == 0):
            values["held_out"] = held_out_loss(state, held_out)
        log.step(step, values, batches, wait)
        if last:
            break
        if not finite:  # not saved: such checkpoints would push out the last two good ones
            continue
        leave = ranks.sum(SIGTERM.is_set()) > 0  # all ranks in the same step
        if leave or (step + 1) % stage.save_every == 0:
            checkpoint.save_state(folder, ranks, state, optimizer, settings, step + 1)
        if leave:
            ranks.print0(f"SIGTERM: {ranks.progress} is done; the same command goes on")
            sys.exit(128 + signal.SIGTERM)
    with state.gathered():  # a collective: all ranks enter, one writes
        if ranks.rank == 0:
            with files.new_folder(adaptor_folder(config, stage.name)) as new:
                adaptor.save(new, run.model.base, settings, run.model.llama.stored_dtype)
    ranks.barrier()  # the next stage reads what rank 0 has written
    ranks.print0(f"stage {stage.name}: done in {(time.perf_counter() - began) / 60:.1f} min, "
                 f"{log.flops / 1e15:.4f} PFLOP in all")


def check_run(config: Config, stages: list[StageConfig]) -> dict[str, int]:
    """FLOPs of each unfinished stage. Raises where a stage will not find what it needs.

    A finished stage must have the same settings and data. Its data files may be gone by now.
    """
    flops, ready = {}, []
    if Path(config.out, "iaa.json").is_file():
        Index.read(config.out)  # `write_index` reads it again: a damaged one is named now
    for stage in stages:
        folder, source = adaptor_folder(config, stage.name), source_folder(config, stage)
        ready.append(folder)
        if folder.is_dir():
            was = checkpoint.finished_settings(folder)
            checkpoint.check_settings(folder.parent, was, settings_of(config, stage))
            continue
        if not Path(config.images).is_dir():
            raise FileNotFoundError(f"images = {config.images!r}: no such folder")
        for path in (*stage.data, *stage.held_out):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such data file")
        if source not in (None, *ready) and not source.is_dir():
            raise ValueError(f"stage {stage.name} starts from stage {source.parent.name!r}, "
                             f"which is not finished in {config.out}")
        flops[stage.name] = stage_flops(config, stage)  # raises if layers or templates do not fit
    return flops


def with_dtype(config: Config, ranks: Ranks) -> Config:
    """The configuration with "auto" resolved: to the run's dtype so far, else the faster one."""
    name, why = choose_dtype(config.dtype, ranks.device)
    path = Path(config.out, "config.json")
    begun = files.read_json(path).get("dtype") if path.is_file() else None
    if config.dtype == "auto" and begun in [*DTYPES] and begun != name:
        ranks.print0(f"warning: {config.out} was begun in {begun} and goes on in it, though {name} "
                     f"is faster here ({why})")
        name, why = begun, "the run was begun in it"  # another dtype would end with other bits
    name = ranks.agree_on_dtype(name)
    ranks.print0(f"computing in {name} on {ranks.device.type}: {why}")
    return replace(config, dtype=name)


def write_index(config: Config) -> None:
    """Write `iaa.json`: for each workflow, the adaptor of the last finished stage that trains it.

    Adaptors that an earlier `iaa.json` names stay, unless they are gone or replaced.
    """
    out = Path(config.out).resolve()  # links in it must not mislead the relative paths
    before = Index.read(out).adaptors if (out / "iaa.json").is_file() else {}
    stages = [(s.adaptor, f"{s.name}/adaptor") for s in config.stage]
    adaptors = {name: path for name, path in (*before.items(), *stages) if (out / path).is_dir()}
    llm, vision = (os.path.relpath(Path(folder).resolve(), out)  # all can be moved together
                   for folder in (config.llm, config.vision))
    index = Index(llm, vision, Tokenizer.load(config.llm).image_id, adaptors)
    files.write_json(out / "iaa.json", asdict(index))


def train(config: Config, only: str | None) -> None:
    """Run the named stage, or all stages that are not finished."""
    stages = [stage for stage in config.stage if only in (None, stage.name)]
    if not stages:
        raise ValueError(f"no stage {only!r}; there are: {', '.join(s.name for s in config.stage)}")
    with Ranks(config.timeout_s) as ranks:
        if ranks.rank == 0:
            held = checkpoint.lock(Path(config.out))  # noqa: F841  (kept until the run ends)
        config = with_dtype(config, ranks)
        flops = check_run(config, stages)
        ranks.progress = "the check of the frozen models"
        if ranks.rank == 0:
            for kind, folder in ((Llama, config.llm), (Clip, config.vision)):
                files.check_frozen(kind, folder)
        ranks.barrier()  # all have read `out` in check_run: now rank 0 may write there
        for stage in stages:
            if ranks.sum(SIGTERM.is_set()):  # since the last check: begin no other stage
                ranks.print0("SIGTERM: the same command goes on")
                sys.exit(128 + signal.SIGTERM)
            folder = Path(config.out, stage.name)
            if stage.name in flops:
                del flops[stage.name]
                run_stage(open_run(config, ranks, stage), stage, sum(flops.values()))
                gc.collect()  # frees the model: its hooks form a cycle with it
            else:
                ranks.print0(f"stage {stage.name}: finished before (remove {folder} to redo it)")
            if ranks.rank == 0:  # for a finished stage too: a kill may have prevented this
                write_index(config)
                # Checkpoints are far larger than the adaptor, and no longer needed.
                checkpoint.remove_checkpoints(checkpoint.list_checkpoints(folder))


@files.one_line("train.py", "the same command goes on from the last checkpoint")
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, such as configs/demo.toml")
    parser.add_argument("--stage", help="train this stage only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key, STAGE.key, or stage.key for every stage")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: SIGTERM.set())
    train(read_config(args.config, args.set), args.stage)


if __name__ == "__main__":
    main()
