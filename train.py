"""Train IAA: the stages of a TOML file in order, each from the result of the one before (Table 1).

    python train.py --config configs/demo.toml [--stage NAME] [--set key=value ...]
    torchrun --nproc_per_node N train.py --config ...      the same on N processes (torch's DDP)

- Everything random is a function of the seed and the step, so the step is the data cursor and the
  RNG state in one. A run killed and started again ends with the same bits as an unbroken one.
- Trained weights are fp32 and their own master copy: layers cast them to the frozen model's dtype.
- The loss is the sum over the global batch divided by its number of scored tokens, however the
  batch is split over micro-batches and ranks.
- `out/` holds `config.json`, `iaa.json` (what `sample.py` opens) and, for each stage, `log.jsonl`,
  checkpoints `step-000100/` while it runs and `adaptor/` once it is finished. Folders appear whole
  or not at all.

Letters: as in iaa.py.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chat import Tokenizer
from clip import preprocess
from config import DTYPES, Config, StageConfig, read_config
from data import Batch, JsonlDataset, Sampler, loader
from files import lock, new_folder, read_json, replace_text, write_json, writing
from iaa import IAA, Adaptor, AdaptorConfig, load_base, save_adaptor, spread
from llama import DecoderLayer

MAX_BAD_STEPS = 10  # in a row, then the run stops


def lr_at(step: int, stage: StageConfig) -> float:
    """Share of the peak rate at `step` (from 0): linear warm-up, then cosine to zero (Table 1)."""
    warmup = math.ceil(stage.warmup * stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, stage.steps - warmup)))


@dataclass
class Run:
    """What all stages share: frozen models, tokenizer, this process's place among the ranks."""

    config: Config
    model: IAA
    base: dict[str, str]
    tokenizer: Tokenizer
    device: torch.device
    rank: int
    world: int

    def say(self, text: str) -> None:
        """Print once for all ranks."""
        if self.rank == 0:
            print(text, flush=True)


def open_run(config: Config) -> Run:
    """Join the process group where there is one, load the frozen models."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if config.threads:
        torch.set_num_threads(config.threads)
    llama, llama_sha = load_base(config.llm, DTYPES[config.dtype], str(device))
    clip, clip_sha = load_base(config.vision, DTYPES[config.dtype], str(device))
    tokenizer = Tokenizer.load(config.llm)
    model = IAA(llama, clip, tokenizer.image_id)
    base = {"llama": llama_sha, "clip": clip_sha}
    return Run(config, model, base, tokenizer, device, rank, world)


def adaptor_config(config: Config, stage: StageConfig, layers: int) -> AdaptorConfig:
    """The stage's adaptor: a bare projector in the first stage, the whole adaptor later."""
    if stage.trains == "projector":
        return AdaptorConfig((), own_embedding=False, own_head=False)
    places = config.insertion
    places = spread(places, layers) if isinstance(places, int) else places
    return AdaptorConfig(places, config.structure, config.own_embedding, config.own_head,
                         config.own_llm)


def start_adaptor(run: Run, stage: StageConfig) -> Adaptor:
    """The adaptor as the stage begins, in fp32: frozen copies, then all that was trained before."""
    torch.manual_seed(run.config.seed)  # for the projector, the one part that starts random
    llama = run.model.llama
    settings = adaptor_config(run.config, stage, llama.config.layers)
    adaptor = Adaptor(settings, llama.config, run.model.clip.config.width)
    adaptor.copy_frozen(llama)
    names = [s.name for s in run.config.stage]
    before = names.index(stage.name) - 1
    source = stage.start or (names[before] if before >= 0 else "none")
    if source != "none":
        folder = adaptor_folder(run.config, source)
        if not folder.is_dir():
            raise ValueError(f"stage {stage.name} starts from stage {source!r}, "
                             f"which is not finished in {run.config.out}")
        result = adaptor.load_state_dict(load_file(folder / "adaptor.safetensors"), strict=False)
        if result.unexpected_keys:
            raise ValueError(f"{folder} has {result.unexpected_keys[0]}, "
                             f"which stage {stage.name} has no place for")
    return adaptor.to(run.device)


def make_optimizer(adaptor: Adaptor, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over every trained parameter once; the projector may have a rate of its own."""
    projector = list(adaptor.projector.parameters())
    rest = [p for name, p in adaptor.named_parameters() if not name.startswith("projector.")]
    groups = [{"params": projector, "peak": stage.lr_projector or stage.lr}]
    groups += [{"params": rest, "peak": stage.lr}] if rest else []
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(stage.beta1, stage.beta2), eps=stage.eps,
                             weight_decay=stage.weight_decay, fused=True)


class Loss(nn.Module):
    """The workflow's loss as a module for DDP to wrap. Sees the frozen models, owns the adaptor."""

    def __init__(self, model: IAA, workflow: str):
        super().__init__()
        self.adaptor = model.adaptors[workflow]
        self.model, self.workflow = (model,), workflow  # a tuple: its frozen parts are not ours

    def forward(self, b: Batch) -> Tensor:
        """Sum of the cross-entropy over the batch's scored tokens."""
        inputs = (b.tokens, b.targets, self.workflow, b.images, b.positions, b.segments)
        return self.model[0].loss(*inputs)


def global_sum(value: float, run: Run) -> float:
    """Sum of a number over all ranks."""
    if run.world == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=run.device)
    dist.all_reduce(total)
    return total.item()


def train_step(
    loss: nn.Module, batches: list[Batch], optimizer, stage: StageConfig, step: int, run: Run
) -> tuple[float, float, bool]:
    """One update, unless not finite. Returns (mean loss, gradient norm, whether it was done)."""
    scored = global_sum(sum(b.scored for b in batches), run)
    total = torch.zeros((), device=run.device)
    for i, batch in enumerate(batches):
        if isinstance(loss, DistributedDataParallel):
            loss.require_backward_grad_sync = i == len(batches) - 1
        part = loss(batch.to(run.device))
        (part * (run.world / scored)).backward()  # DDP divides by the number of ranks
        total += part.detach()
    norm = nn.utils.clip_grad_norm_(loss.parameters(), stage.clip_norm).item()
    mean = global_sum(total.item(), run) / scored
    done = math.isfinite(norm) and math.isfinite(mean)
    if done:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, stage)
        optimizer.step()
    optimizer.zero_grad()
    return mean, norm, done


@torch.no_grad()
def held_out_loss(loss: Loss, batches: list[Batch], run: Run) -> float:
    """Mean loss over the scored tokens of the held-out batches; every rank computes the same."""
    total = sum(loss(batch.to(run.device)).item() for batch in batches)
    return total / sum(batch.scored for batch in batches)


def micro_batches(stage: StageConfig, sampler: Sampler, run: Run, first: int):
    """Rows of this rank's micro-batches from step `first` on: each `world`-th, from `rank` on."""
    for step in range(first, stage.steps):
        rows = sampler.rows(step)
        cuts = [rows[i : i + stage.micro_batch] for i in range(0, stage.batch, stage.micro_batch)]
        yield from cuts[run.rank :: run.world]


def open_data(run: Run, stage: StageConfig, files: list[str]) -> JsonlDataset:
    """The rows of `files`, encoded for this stage."""
    config, clip = run.config, run.model.clip.config
    return JsonlDataset(
        files, config.images, run.tokenizer, clip.patches, lambda image: preprocess(image, clip),
        stage.template or None, config.system, config.max_tokens, clip.aspect == "pad")


def step_flops(run: Run, adaptor: Adaptor, batch: Batch) -> float:
    """FLOPs that forward and backward of a batch need, counted from the matrix products.

    2 per weight and token forward, 2 more for the gradient of the activations, 2 more where the
    weight is trained; attention 2 * 2 * T * T * H * E a layer forward (full, as computed here),
    twice that backward.
    """
    llama = run.model.llama if adaptor.llm is None else adaptor.llm
    matrices = sum(p.numel() for layer in llama.layers for p in layer.parameters())
    inserted = sum(p.numel() for part in (adaptor.layers, adaptor.gates) for p in part.parameters())
    trained = inserted if adaptor.llm is None else matrices
    head_trained = adaptor.head is not None or adaptor.llm is not None
    tokens, config = batch.tokens.numel(), llama.config
    layers = tokens * (4 * (matrices + inserted) + 2 * trained)
    head = batch.scored * llama.embedding.weight.numel() * (6 if head_trained else 4)
    attention = 12 * tokens * batch.tokens.shape[1] * config.heads * config.head_size
    attention *= config.layers + len(adaptor.layers)
    return layers + head + attention


def save_state(run: Run, stage: StageConfig, adaptor: Adaptor, optimizer, step: int) -> None:
    """A checkpoint from which the stage goes on at `step`; the newest two are kept."""
    folder = Path(run.config.out, stage.name)
    named = {p: name for name, p in adaptor.named_parameters()}
    weights = {name: p.detach().contiguous() for name, p in adaptor.state_dict().items()}
    moments = {f"{key}.{named[p]}": value
               for p, values in optimizer.state.items() for key, value in values.items()}
    state = {"step": step, "stage": asdict(stage), "base": run.base}
    with new_folder(folder / f"step-{step:06d}") as new:
        save_file(weights, new / "adaptor.safetensors")
        save_file(moments, new / "optimizer.safetensors")
        (new / "state.json").write_text(json.dumps(state))
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def resume_state(run: Run, stage: StageConfig, adaptor: Adaptor, optimizer) -> int:
    """Fill adaptor and optimizer from the newest checkpoint, return its step; 0 without one."""
    found = sorted(Path(run.config.out, stage.name).glob("step-*"))
    if not found:
        return 0
    state = read_json(found[-1] / "state.json")
    was, now = state["stage"], json.loads(json.dumps(asdict(stage)))
    free = ("save_every", "eval_every", "eval_rows")
    changed = [key for key in now if was.get(key) != now[key] and key not in free]
    if changed or state["base"] != run.base:
        raise ValueError(f"{found[-1]} was made with another {', '.join(changed) or 'base model'}: "
                         "restore it, or remove the folder to start the stage again")
    adaptor.load_state_dict(load_file(found[-1] / "adaptor.safetensors"))
    tensors = load_file(found[-1] / "optimizer.safetensors")
    for name, p in adaptor.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in keys}
    return state["step"]


class Log:
    """A line a step on the screen and in `log.jsonl`; lines of steps to run again are cut."""

    def __init__(self, run: Run, stage: StageConfig, first: int):
        self.run, self.stage, self.clock = run, stage, time.perf_counter()
        self.path = Path(run.config.out, stage.name, "log.jsonl")
        self.tokens, self.padded, self.skipped = 0, 0, 0
        if run.rank == 0 and self.path.is_file():
            lines = [x for x in self.path.read_text().splitlines() if x.endswith("}")]
            kept = [line + "\n" for line in lines if json.loads(line)["step"] < first]
            replace_text(self.path, "".join(kept))

    def step(
        self, step: int, values: dict, batches: list[Batch], adaptor: Adaptor, wait_s: float
    ) -> None:
        """Write a step's line; tokens and FLOPs are of all ranks, taken as equal to this one's."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        run, tokens = self.run, sum(int(b.lengths.sum()) for b in batches)
        flops = sum(step_flops(run, adaptor, b) for b in batches)
        self.tokens += tokens
        self.padded += sum(b.tokens.numel() for b in batches)
        memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if run.device.type == "cuda":
            memory_gb = torch.cuda.max_memory_allocated() / 2**30
        row = {
            "step": step, **values, "tokens_per_s": run.world * tokens / seconds,
            "tflops": run.world * flops / seconds / 1e12, "data_wait": wait_s / seconds,
            "padding": 1 - self.tokens / self.padded, "seconds": seconds, "memory_gb": memory_gb,
        }
        for name in [name for b in batches for name in b.skipped]:
            self.skipped += 1
            print(f"skipped {name} ({self.skipped} so far)", file=sys.stderr)
        if run.rank == 0:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        left = (self.stage.steps - step - 1) * seconds
        held_out = f"  held-out {row['held_out']:.4f}" if "held_out" in row else ""
        run.say(f"{self.stage.name} {step + 1}/{self.stage.steps}  loss {row['loss']:.4f}  "
                f"lr {row['lr']:.2e}  norm {row['grad_norm']:.2f}  "
                f"{row['tokens_per_s']:.0f} tok/s  {row['tflops']:.3f} TFLOP/s  "
                f"padding {row['padding']:.1%}  wait {row['data_wait']:.1%}  "
                f"{memory_gb:.1f} GB  {left / 60:.1f} min left{held_out}")


def run_stage(run: Run, stage: StageConfig) -> None:
    """Train one stage to its end and save its adaptor."""
    per_step = stage.batch // stage.micro_batch
    if per_step % run.world:
        raise ValueError(f"stage {stage.name}: {per_step} micro-batches a step "
                         f"do not divide among {run.world} ranks")
    folder = Path(run.config.out, stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    adaptor = start_adaptor(run, stage)
    run.model.adaptors[stage.adaptor] = adaptor
    for layer in (m for m in run.model.modules() if isinstance(m, DecoderLayer)):
        layer.recompute = run.config.recompute
    optimizer = make_optimizer(adaptor, stage)
    first = resume_state(run, stage, adaptor, optimizer)
    size = sum(p.numel() for p in adaptor.parameters())
    run.say(f"stage {stage.name}: {size:,} parameters, from step {first}")
    loss = own_loss = Loss(run.model, stage.adaptor)
    if run.world > 1:
        loss = DistributedDataParallel(own_loss, find_unused_parameters=True)
    dataset = open_data(run, stage, stage.data)
    sampler = Sampler(dataset.lengths, stage.batch, run.config.seed)
    stream = loader(dataset, micro_batches(stage, sampler, run, first), run.config.workers)
    held_out = held_out_batches(run, stage)
    log, bad = Log(run, stage, first), 0
    for step in range(first, stage.steps):
        asked = time.perf_counter()
        batches = [next(stream) for _ in range(per_step // run.world)]
        wait = time.perf_counter() - asked
        mean, norm, done = train_step(loss, batches, optimizer, stage, step, run)
        bad = 0 if done else bad + 1
        if bad:
            run.say(f"step {step + 1}: loss {mean}, gradient norm {norm}: skipped ({bad} in a row)")
        if bad >= MAX_BAD_STEPS:
            raise ValueError(f"{bad} steps in a row were not finite; "
                             f"the last checkpoint in {folder} is intact")
        values = {"loss": mean, "lr": stage.lr * lr_at(step, stage), "grad_norm": norm}
        if held_out and ((step + 1) % stage.eval_every == 0 or step + 1 == stage.steps):
            values["held_out"] = held_out_loss(own_loss, held_out, run)
        log.step(step, values, batches, adaptor, wait)
        if run.rank == 0 and (step + 1) % stage.save_every == 0 and step + 1 < stage.steps:
            save_state(run, stage, adaptor, optimizer, step + 1)
    finish_stage(run, stage, adaptor)


def held_out_batches(run: Run, stage: StageConfig) -> list[Batch]:
    """The first `eval_rows` rows of the held-out files, as batches; none where no file is given."""
    if not stage.held_out:
        return []
    dataset = open_data(run, stage, stage.held_out)
    rows = list(range(min(stage.eval_rows, len(dataset))))
    cuts = [rows[i : i + stage.micro_batch] for i in range(0, len(rows), stage.micro_batch)]
    return list(loader(dataset, cuts))


def finish_stage(run: Run, stage: StageConfig, adaptor: Adaptor) -> None:
    """Save the adaptor in the frozen model's dtype, note it in `iaa.json`, drop the checkpoints."""
    if run.rank == 0:
        out = Path(run.config.out)
        template = run.tokenizer.template if stage.template in ("", "plain") else stage.template
        prompt = {"template": template, "system": run.config.system}
        extra = {"prompt": prompt, "stage": asdict(stage)}
        with new_folder(adaptor_folder(run.config, stage.name)) as new:
            save_adaptor(adaptor, new, run.base, extra, run.model.llama.dtype)
        finished = [s for s in run.config.stage if is_finished(run.config, s)]
        index = {
            "llm": os.path.relpath(run.config.llm, out),
            "vision": os.path.relpath(run.config.vision, out),
            "image_token": run.tokenizer.image_id,
            "adaptors": {s.adaptor: f"{s.name}/adaptor" for s in finished},  # a name's last stage
        }
        write_json(out / "iaa.json", index)
        for old in (out / stage.name).glob("step-*"):
            shutil.rmtree(old)
    if run.world > 1:
        dist.barrier()


def adaptor_folder(config: Config, stage: str) -> Path:
    """Where the finished adaptor of the stage of that name lies."""
    return Path(config.out, stage, "adaptor")


def is_finished(config: Config, stage: StageConfig) -> bool:
    """Whether the stage has been trained to its end in this run."""
    return (adaptor_folder(config, stage.name) / "config.json").is_file()


def train(config: Config, only: str | None) -> None:
    """Run the named stage, or all stages that are not finished."""
    if only is not None and only not in [s.name for s in config.stage]:
        raise ValueError(f"no stage {only!r}; there are: {', '.join(s.name for s in config.stage)}")
    rank = int(os.environ.get("RANK", 0))
    with lock(Path(config.out)) if rank == 0 else contextlib.nullcontext():
        run = open_run(config)
        if rank == 0:
            write_json(Path(config.out, "config.json"), asdict(config))
        for stage in config.stage:
            if only not in (None, stage.name):
                continue
            if is_finished(config, stage):
                folder = Path(config.out, stage.name)
                run.say(f"stage {stage.name}: finished before (remove {folder} to train it again)")
                continue
            began = time.perf_counter()
            run_stage(run, stage)
            run.say(f"stage {stage.name}: done in {(time.perf_counter() - began) / 60:.1f} min")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Train IAA: the stages of a TOML file in order.", allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, such as configs/demo.toml")
    parser.add_argument("--stage", help="train this stage only")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override a key, STAGE.key, or stage.key for every stage")
    args = parser.parse_args()
    try:
        train(read_config(args.config, args.set), args.stage)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
