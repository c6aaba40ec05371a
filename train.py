"""Train IAA: the stages of a TOML file in order, each from the result of the one before (Table 1).

    python train.py --config configs/demo.toml [--stage NAME] [--set key=value ...]
    torchrun --nproc_per_node N train.py --config ...      the same on N processes (zero.py)

- Everything random is a function of the seed and the step, so the step is the data cursor and the
  RNG state in one. A run killed and started again ends with the same bits as an unbroken one.
- Trained weights are fp32 and their own master copy: layers cast them to the frozen model's dtype.
  ZeRO stages 1 to 3 keep the masters in shards and compute with copies in that dtype.
- The loss is the sum over the global batch divided by its number of scored tokens, however the
  batch is split over micro-batches and ranks; they need not divide evenly.
- `out/` holds `config.json`, `iaa.json` (what `sample.py` opens) and, for each stage, `log.jsonl`,
  checkpoints `step-000100/` while it runs (checkpoint.py) and `adaptor/` once it is finished.

Letters: as in iaa.py.
"""

import argparse
import gc
import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.budget import Machine, step_flops
from training.checkpoint import resume_state, save_state
from clip import open_image, preprocess
from training.config import Config, StageConfig, adaptor_config, longest_row, read_config
from data import Batch, JsonlDataset, Sampler, loader
from features import Features
from common.files import new_folder, one_line, replace_text, write_json, writing
from iaa import DTYPES, IAA, Adaptor
from lean import set_memory_use
from llama import set_recompute
from training.parts import parts
from training.plan import plan
from training.ranks import Ranks
from training.stages import (
    adaptor_folder,
    after_stage,
    check_ahead,
    is_finished,
    settings_of,
    source_folder,
)
from storage import load_base, load_tensors, read_meta, save_adaptor
from tokenization.tokenizer import Tokenizer
from training.zero import Replicated, Sharded

MAX_BAD_STEPS = 10  # in a row, then the run stops


def lr_at(step: int, stage: StageConfig) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to zero (Table 1)."""
    warmup = math.ceil(stage.warmup * stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))


@dataclass
class Run:
    """What a stage works with: frozen models, tokenizer, this process's place among the ranks."""

    config: Config
    ranks: Ranks
    model: IAA
    base: dict[str, str]
    tokenizer: Tokenizer
    features: Features | None = None


def open_run(config: Config, ranks: Ranks, stage: StageConfig) -> Run:
    """Load the frozen models for a stage, as each may share them out in another way."""
    in_shards = ranks.world > 1 and stage.zero == 3 and config.shard_frozen
    device = "cpu" if in_shards else str(ranks.device)  # `Sharded` moves its shard there
    llama, llama_sha = load_base(config.llm, DTYPES[config.dtype], device)
    clip, clip_sha = load_base(config.vision, DTYPES[config.dtype], device)
    tokenizer = Tokenizer.load(config.llm)
    base = {"llama": llama_sha, "clip": clip_sha}
    features = None
    if config.features:
        features = Features(config.features, f"{clip_sha} {clip.config} {config.dtype}")
        clip.register_forward_hook(lambda _, inputs, made: features.keep(*inputs, made))
    return Run(config, ranks, IAA(llama, clip, tokenizer.image_id), base, tokenizer, features)


def start_adaptor(run: Run, stage: StageConfig) -> Adaptor:
    """The adaptor as the stage begins, in fp32: frozen copies, then all that was trained before."""
    torch.manual_seed(run.config.seed)  # for the projector, the one part that starts random
    llama = run.model.llama
    settings = adaptor_config(run.config, stage, llama.config.layers)
    adaptor = Adaptor(settings, llama.config, run.model.clip.config.width)
    adaptor.copy_frozen(llama)
    folder = source_folder(run.config, stage)
    if folder is not None:
        was = read_meta(folder, run.base)["adaptor"]
        if was.insertion and (was.insertion, was.structure) != (
                settings.insertion, settings.structure):
            raise ValueError(f"{folder} has structure {was.structure} after layers "
                             f"{list(was.insertion)}, stage {stage.name} another")
        load_tensors(adaptor, [folder / "adaptor.safetensors"], torch.float32, "cpu", partly=True)
    return adaptor


def make_optimizer(masters: dict[str, Tensor], stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over every trained parameter once; the projector may have a rate of its own."""
    projector = [m for name, m in masters.items() if name.startswith("projector.")]
    rest = [m for name, m in masters.items() if not name.startswith("projector.")]
    groups = [{"params": projector, "peak": stage.lr_projector or stage.lr}]
    groups += [{"params": rest, "peak": stage.lr}] if rest else []
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(stage.beta1, stage.beta2), eps=stage.eps,
                             weight_decay=stage.weight_decay, fused=True)


class Loss(nn.Module):
    """The workflow's loss as a module for DDP to wrap. Sees the frozen models, owns the adaptor."""

    def __init__(self, model: IAA, workflow: str, device: torch.device):
        super().__init__()
        self.device = device
        self.adaptor = model.adaptors[workflow]
        self.model, self.workflow = (model,), workflow  # a tuple: its frozen parts are not ours

    def forward(self, b: Batch) -> Tensor:
        """Sum of the cross-entropy over the batch's scored tokens."""
        b = b.to(self.device)
        inputs = (b.tokens, b.targets, self.workflow, b.images, b.positions, b.segments)
        return self.model[0].loss(*inputs)


def share_out(run: Run, stage: StageConfig, adaptor: Adaptor) -> Replicated | Sharded:
    """The stage's training state, held as its ZeRO stage says."""
    config, ranks, model = run.config, run.ranks, run.model
    loss = Loss(model, stage.adaptor, ranks.device)
    if ranks.world == 1 or stage.zero == 0:
        adaptor.to(ranks.device)
        return Replicated(loss, dict(adaptor.named_parameters()), ranks.world)
    order = parts(model, stage.adaptor)
    used = {w for part in order for w in part.weights}
    unused = [w for w in model.parameters() if w not in used]
    names = {w: name for name, w in adaptor.named_parameters()}
    return Sharded(loss, order, unused, names, stage.zero, model.llama.dtype, ranks.device,
                   config.shard_frozen, config.reduce_fp32)


def train_step(
    state: Replicated | Sharded, batches: list[Batch | None], optimizer, stage: StageConfig,
    step: int, ranks: Ranks
) -> tuple[float, float, bool]:
    """One update, unless not finite. Returns (mean loss, gradient norm, whether it was done).

    batches: as many on every rank; None where this one has no rows left.
    """
    scored = ranks.sum(sum(b.scored for b in batches if b is not None))
    total = torch.zeros((), device=ranks.device)
    for i, batch in enumerate(batches):
        total += state.forward_backward(batch, scored, last=i == len(batches) - 1)
    total, norm = torch.stack([total, state.clip(stage.clip_norm)]).tolist()  # waits for a GPU
    mean = ranks.sum(total) / scored
    done = math.isfinite(norm) and math.isfinite(mean)
    if done:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, stage)
        optimizer.step()
        state.publish()
    optimizer.zero_grad()
    return mean, norm, done


def held_out_loss(state: Replicated | Sharded, batches: list[Batch]) -> float:
    """Mean loss over the scored tokens of the held-out batches; every rank computes the same."""
    total = sum(state.forward(batch).item() for batch in batches)
    return total / sum(batch.scored for batch in batches)


def micro_batches(stage: StageConfig, sampler: Sampler, ranks: Ranks, first: int):
    """Rows of this rank's micro-batches from step `first` on: each `world`-th, from `rank` on."""
    for step in range(first, stage.steps):
        rows = sampler.rows(step)
        cuts = [rows[i : i + stage.micro_batch] for i in range(0, stage.batch, stage.micro_batch)]
        yield from cuts[ranks.rank :: ranks.world]


def open_data(run: Run, stage: StageConfig, files: list[str]) -> JsonlDataset:
    """The rows of `files`, encoded for this stage."""
    config, clip = run.config, run.model.clip.config
    longest = longest_row(config, run.model.llama.config.context)

    def pixels(path: Path) -> Tensor:
        return preprocess(open_image(path), clip)

    return JsonlDataset(
        files, config.images, run.tokenizer, clip.patches, pixels, stage.template or None,
        config.system, longest, clip.aspect == "pad",
        None if run.features is None else run.features.read)


class Log:
    """A line a step on the screen and in `log.jsonl`; lines of steps to run again are cut."""

    def __init__(self, run: Run, stage: StageConfig, first: int):
        self.run, self.stage, self.clock = run, stage, time.perf_counter()
        self.path = Path(run.config.out, stage.name, "log.jsonl")
        self.tokens, self.padded, self.skipped, self.cut = 0, 0, 0, 0
        if run.ranks.rank == 0 and self.path.is_file():
            lines = [x for x in self.path.read_text().splitlines() if x.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] < first]
            replace_text(self.path, "".join(kept))

    def step(
        self, step: int, values: dict, batches: list[Batch], wait_s: float
    ) -> None:
        """Write a step's line; tokens and FLOPs of all ranks are reckoned from this one's share.

        Rows cut at `max_tokens` are counted of this rank, since its start.
        """
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        run, tokens = self.run, sum(int(b.lengths.sum()) for b in batches)
        flops = sum(step_flops(run.model, self.stage.adaptor, *b.tokens.shape, b.scored)
                    for b in batches)
        self.tokens += tokens
        self.padded += sum(b.tokens.numel() for b in batches)
        self.cut += sum(b.cut for b in batches)
        per_second = self.stage.batch // self.stage.micro_batch / max(1, len(batches)) / seconds
        memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if run.ranks.device.type == "cuda":
            memory_gb = torch.cuda.max_memory_allocated() / 1e9
        row = {
            "step": step, **values, "tokens_per_s": tokens * per_second,
            "tflops": flops * per_second / 1e12, "data_wait": wait_s / seconds,
            "padding": 1 - self.tokens / max(1, self.padded), "seconds": seconds,
            "memory_gb": memory_gb, "cut": self.cut,
        }
        for name in [name for b in batches for name in b.skipped]:
            self.skipped += 1
            print(f"skipped {name} ({self.skipped} so far)", file=sys.stderr)
        if run.ranks.rank == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        left = (self.stage.steps - step - 1) * seconds
        more = f"  held-out {row['held_out']:.4f}" if "held_out" in row else ""
        more += f"  {self.cut} rows cut" if self.cut else ""
        run.ranks.say(f"{self.stage.name} {step + 1}/{self.stage.steps}  loss {row['loss']:.4f}  "
                f"lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
                f"{row['tokens_per_s']:.0f} tok/s  {row['tflops']:.3f} TFLOP/s  "
                f"padding {row['padding']:.1%}  wait {row['data_wait']:.1%}  "
                f"{memory_gb:.1f} GB  {left / 60:.1f} min left{more}")


def run_stage(run: Run, stage: StageConfig) -> None:
    """Train one stage to its end and save its adaptor."""
    ranks, per_step = run.ranks, stage.batch // stage.micro_batch
    folder = Path(run.config.out, stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    adaptor = start_adaptor(run, stage)
    run.model.adaptors[stage.adaptor] = adaptor
    set_recompute(run.model, run.config.recompute)
    state = share_out(run, stage, adaptor)
    optimizer = make_optimizer(state.masters, stage)
    settings = settings_of(run.config, stage)
    first = resume_state(folder, ranks, state, optimizer, settings)
    size = sum(p.numel() for p in adaptor.parameters())
    ranks.say(f"stage {stage.name}: {size:,} parameters, from step {first}")
    dataset = open_data(run, stage, stage.data)
    sampler = Sampler(dataset.lengths, stage.batch, run.config.seed)
    stream = loader(dataset, micro_batches(stage, sampler, ranks, first), run.config.workers)
    mine = len(range(ranks.rank, per_step, ranks.world))  # micro-batches; some ranks may have one
    none = [None] * (math.ceil(per_step / ranks.world) - mine)  # less than others: they join in
    held_out = held_out_batches(run, stage)
    log, bad = Log(run, stage, first), 0
    for step in range(first, stage.steps):
        ranks.begin(f"stage {stage.name}, step {step + 1}")
        asked = time.perf_counter()
        batches = [next(stream) for _ in range(mine)]
        wait = time.perf_counter() - asked
        mean, norm, done = train_step(state, batches + none, optimizer, stage, step, ranks)
        bad = 0 if done else bad + 1
        if bad:
            ranks.say(f"step {step + 1}: loss {mean}, gradient norm {norm}: "
                      f"skipped ({bad} in a row)")
        if bad >= MAX_BAD_STEPS:
            raise ValueError(f"stage {stage.name}, step {step + 1}: {bad} steps in a row were not "
                             f"finite; they changed nothing, what is saved in {folder} is intact")
        values = {"loss": mean, "lr": stage.lr * lr_at(step, stage), "grad_norm": norm}
        if held_out and ((step + 1) % stage.eval_every == 0 or step + 1 == stage.steps):
            values["held_out"] = held_out_loss(state, held_out)
        log.step(step, values, batches, wait)
        if (step + 1) % stage.save_every == 0 and step + 1 < stage.steps:
            save_state(folder, ranks, state, optimizer, settings, step + 1)
    finish_stage(run, stage, adaptor, state, settings)


def held_out_batches(run: Run, stage: StageConfig) -> list[Batch]:
    """The first `eval_rows` rows of the held-out files, as batches; none where no file is given."""
    if not stage.held_out:
        return []
    dataset = open_data(run, stage, stage.held_out)
    rows = list(range(min(stage.eval_rows, len(dataset))))
    cuts = [rows[i : i + stage.micro_batch] for i in range(0, len(rows), stage.micro_batch)]
    batches = list(loader(dataset, cuts))
    for name in [name for batch in batches for name in batch.skipped]:
        run.ranks.say(f"held out: skipped {name}")
    return batches


def finish_stage(
    run: Run, stage: StageConfig, adaptor: Adaptor, state: Replicated | Sharded, settings: dict
) -> None:
    """Save the adaptor in the frozen model's dtype."""
    template = run.tokenizer.template if stage.template in ("", "plain") else stage.template
    prompt = {"template": template, "system": run.config.system}
    extra = {"prompt": prompt, "settings": settings}
    with state.whole():
        if run.ranks.rank == 0:
            with new_folder(adaptor_folder(run.config, stage.name)) as new:
                save_adaptor(adaptor, new, run.base, extra, run.model.llama.dtype)
    run.ranks.barrier()


def train(config: Config, only: str | None) -> None:
    """Run the named stage, or all stages that are not finished."""
    if only is not None and only not in [s.name for s in config.stage]:
        raise ValueError(f"no stage {only!r}; there are: {', '.join(s.name for s in config.stage)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    ranks = Ranks(config.timeout_s)
    stages = [stage for stage in config.stage if only in (None, stage.name)]
    with ranks, ranks.alone(Path(config.out)):
        check_ahead(config, stages)
        if ranks.rank == 0:
            write_json(Path(config.out, "config.json"), asdict(config))
        for stage in stages:
            began, finished = time.perf_counter(), is_finished(config, stage)
            ranks.barrier()  # all have looked
            if not finished:
                run_stage(open_run(config, ranks, stage), stage)
                gc.collect()  # zero.py's hooks and the model refer to each other: free both now
            if ranks.rank == 0:  # for a finished one too: it may have been killed before this
                after_stage(config, stage)
            folder = Path(config.out, stage.name)
            ranks.say(f"stage {stage.name}: " + (
                f"finished before (remove {folder} to train it again)" if finished
                else f"done in {(time.perf_counter() - began) / 60:.1f} min"))


@one_line("train.py")
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Train IAA: the stages of a TOML file in order.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, such as configs/demo.toml")
    parser.add_argument("--stage", help="train this stage only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key, STAGE.key, or stage.key for every stage")
    parser.add_argument("--plan", action="store_true",
                        help="print what the run will hold, send and compute; loads no weights")
    planned = parser.add_argument_group("for --plan")
    planned.add_argument("--world", type=int, default=8, help="ranks [%(default)s]")
    planned.add_argument("--memory-gb", type=float, default=80, help="of a rank [%(default)s]")
    planned.add_argument("--tflops", type=float, default=312,
                         help="peak of a rank in TFLOP/s [%(default)s: an A100 in bf16]")
    planned.add_argument("--utilisation", type=float, default=0.4,
                         help="share of that peak that is reached [%(default)s]")
    planned.add_argument("--text-tokens", type=int,
                         help="of a row, beside its image, half of them scored [the data's mean; "
                              "100 where it is not there]")
    args = parser.parse_args()
    if args.plan:
        if args.text_tokens is not None and args.text_tokens < 2:
            raise ValueError(f"--text-tokens {args.text_tokens}: 2 or more, one of them scored")
        machine = Machine(args.world, args.memory_gb, args.tflops, args.utilisation)
        print(plan(read_config(args.config, args.set), machine, args.text_tokens))
        return
    with one_line("train.py", "the same command goes on from the last checkpoint"):
        train(read_config(args.config, args.set), args.stage)


if __name__ == "__main__":
    set_memory_use()
    main()
