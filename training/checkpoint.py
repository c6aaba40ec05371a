"""Who saves what when, and how a run resumes.

While a stage runs, every `save_every` steps and at SIGTERM, its ranks save a checkpoint:

    step-000100/rank-0-of-2.safetensors    "weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": slices
    step-000100/rank-1-of-2.safetensors    of flattened tensors; rank 1's follow rank 0's
    step-000100/state.json                 the manifest: step, updates, settings, checksums

Each rank writes the shard that it owns: fp32 masters and AdamW's moments. Rank 0 then writes the
manifest, which makes the checkpoint complete. The newest two are kept. Nothing is saved of the data
and of random states: both follow from the seed and the step. At the stage's end rank 0 writes the
finished `adaptor/` (train.py), and the checkpoints go.

The same command resumes. A stage takes its newest checkpoint whose checksums (CRC-32) are right,
and compares its settings with the present ones before it loads a weight. A rank reads the slices
that it needs from all shards, so the number of ranks and the ZeRO stage may change in between. A
folder without a manifest was left by a killed run, and is removed. For its checksum, each shard
is read by one rank only, when it is saved and when the run resumes.
"""

import fcntl
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import TextIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clip import ClipConfig
from common.device import Ranks
from common.files import flush, read_frozen, read_json, write_json, writing
from data import fingerprint
from llama import LlamaConfig
from training.config import Config, StageConfig, adaptor_config
from training.zero import DataParallel, ZeroSharded

MANIFEST = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# Settings of the run that a stage depends on.
SHARED = ("seed", "system", "max_tokens", "dtype", "frozen_dtype")
DATA_FILE = "data file "  # beginning of the settings that hold a data file's fingerprint
# Settings that may change when a stage is resumed: the result is the same, up to rounding.
FREE = ("save_every", "eval_every", "eval_rows", "held_out", "micro_batch", "zero")


def lock(out: Path) -> TextIO:
    """Lock a run's folder as long as the result lives. ValueError where another run has it.

    Else a second run would remove the first one's unfinished checkpoint, as if a kill had left it.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = open(out / ".lock", "w")  # noqa: SIM115  (closing it would end the lock)
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, also a killed one
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{out}: another train.py is at work in this folder") from None
    except OSError as error:
        print(f"{out}: no file locks on this disk: do not start a second train.py ({error})")
    return held


def list_checkpoints(folder: Path) -> list[Path]:
    """The stage's checkpoints, oldest first, also those that are not complete."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]))  # a long run's have more digits


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Remove folders, each one's manifest first: a kill then leaves what looks unfinished."""
    for folder in folders:
        (folder / MANIFEST).unlink(missing_ok=True)
        rmtree(folder)


def shard_paths(folder: Path, count: int) -> list[Path]:
    """The files of a checkpoint's shards."""
    return [folder / f"rank-{rank}-of-{count}.safetensors" for rank in range(count)]


def checksums(shards: list[Path], ranks: Ranks) -> list[int]:
    """The CRC-32 of each shard, 0 of one that is missing or empty. A rank reads only its share."""
    mine = [zlib.crc32(np.memmap(path, mode="r"))
            if number % ranks.world == ranks.rank and path.is_file() and path.stat().st_size else 0
            for number, path in enumerate(shards)]
    return [int(ranks.sum(crc)) for crc in mine]


def weight_and_moments(master: Tensor, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """A master weight and its two moments, which AdamW has after its first update."""
    return {"weight": master.detach(), **{key: optimizer.state[master][key] for key in MOMENTS}}


def save_state(
    folder: Path, ranks: Ranks, state: DataParallel | ZeroSharded, optimizer: torch.optim.AdamW,
    settings: dict, step: int
) -> None:
    """Write a checkpoint from which the stage resumes at `step`. The newest two are kept.

    settings: JSON values that `resume_state` compares, except those named in `FREE`.
    """
    new = folder / f"step-{step:06d}"
    if ranks.rank == 0:
        new.mkdir()
    ranks.barrier()
    shards = shard_paths(new, ranks.world if state.zero else 1)  # at stage 0 all hold the same
    if ranks.rank < len(shards):
        tensors = {}
        for name, master, _, here in state.owned_slices():
            for key, tensor in weight_and_moments(master, optimizer).items():
                tensors[f"{key}.{name}"] = tensor.flatten()[here].contiguous()
        path = shards[ranks.rank]
        with writing(path):
            save_file(tensors, path)
            flush(path)
    written = checksums(shards, ranks)  # returns when all shards are on the disk
    if ranks.rank == 0:
        flush(new)
        updates = max(int(values["step"]) for values in optimizer.state.values())
        manifest = {"step": step, "updates": updates, "shards": written, "settings": settings}
        # After `read_json`, `json.dumps` of the manifest gives these same bytes.
        manifest["crc32"] = zlib.crc32(json.dumps(manifest).encode())
        write_json(new / MANIFEST, manifest)
        remove_checkpoints(list_checkpoints(folder)[:-2])


def adaptor_folder(config: Config, stage: str) -> Path:
    """Where the adaptor of a stage is, once it is finished."""
    return Path(config.out, stage, "adaptor")


def source_folder(config: Config, stage: StageConfig) -> Path | None:
    """The adaptor that the stage starts from; None: the frozen model."""
    names = ["none", *(s.name for s in config.stage)]
    source = stage.start or names[names.index(stage.name) - 1]
    return None if source == "none" else adaptor_folder(config, source)


def finished_settings(folder: Path) -> dict:
    """The `settings_of` with which the adaptor in `folder` was trained."""
    return read_json(folder / "config.json", settings=dict)["settings"]


def settings_of(config: Config, stage: StageConfig) -> dict:
    """What the stage's result depends on. "beginning" holds the settings of its source stage."""
    sizes, llama = read_frozen(LlamaConfig, config.llm)
    data = fingerprint(path for path in stage.data if Path(path).is_file())
    words = fingerprint(sorted(Path(config.llm).glob("tokenizer.*")))
    data |= {Path(path).name: how for path, how in words.items()}  # the folder may have moved
    found = {**asdict(stage), **{key: getattr(config, key) for key in SHARED},
             **{DATA_FILE + path: how for path, how in data.items()},
             "adaptor's configuration": asdict(adaptor_config(config, stage, sizes.layers)),
             "base model": {"llama": llama, "clip": read_frozen(ClipConfig, config.vision)[1]}}
    source = source_folder(config, stage)
    before = [s for s in config.stage if adaptor_folder(config, s.name) == source]
    if source is not None and source.is_dir():  # as it was trained, whatever is configured now
        found["beginning"] = finished_settings(source)
    elif before:
        found["beginning"] = settings_of(config, before[0])  # that stage is still to run
    return found


def check_settings(folder: Path, was: dict, now: dict) -> None:
    """Raise ValueError naming the settings, `FREE` aside, that differ from those of `folder`.

    was: read from JSON.
    """

    def differing(was, now) -> list[str]:
        # A finished stage's data file may be gone. Older folders store no fingerprints.
        one_sided = {key for key in {*was} ^ {*now} if key.startswith(DATA_FILE)}
        keys = sorted({*was, *now} - {*FREE} - one_sided)
        pairs = {key: (was.get(key), now.get(key)) for key in keys}
        return [key for key, (a, b) in pairs.items()
                if (differing(a, b) if isinstance(a, dict) and isinstance(b, dict) else a != b)]

    changed = differing(was, json.loads(json.dumps(now)))  # tuples become lists
    if changed:
        raise ValueError(f"{folder} was made with another {', '.join(changed)}: restore it, "
                         "or remove that folder to train the stage again")


def read_manifest(folder: Path, ranks: Ranks) -> dict:
    """A checkpoint's manifest. Raises ValueError, on all ranks, where a byte is not as written."""
    path = folder / MANIFEST
    manifest = read_json(path, settings=dict, step=int, updates=int, shards=list[int], crc32=int)
    crc32 = manifest.pop("crc32")
    if crc32 != zlib.crc32(json.dumps(manifest).encode()) or manifest["step"] != int(
            folder.name[5:]):
        raise ValueError(f"{path} is not as it was written")
    shards = shard_paths(folder, len(manifest["shards"]))
    pairs = zip(shards, manifest["shards"], checksums(shards, ranks), strict=True)
    changed = [shard for shard, written, found in pairs if written != found]
    if changed:
        raise ValueError(f"{changed[0]} is not as it was written")
    return manifest


def resume_state(
    folder: Path, ranks: Ranks, state: DataParallel | ZeroSharded, optimizer: torch.optim.AdamW,
    settings: dict
) -> int:
    """Fill weights and optimizer from the newest checkpoint and return its step, 0 without one.

    A damaged checkpoint is named and removed, and the one before it is taken. What killed runs left
    half written is removed. Raises ValueError where none is intact, or for other settings.
    """
    if ranks.rank == 0:
        left = (*list_checkpoints(folder), *folder.glob(".*.tmp"))
        remove_checkpoints(path for path in left if not (path / MANIFEST).is_file())
    ranks.barrier()
    damaged = []
    for newest in list_checkpoints(folder)[::-1]:
        try:
            manifest = read_manifest(newest, ranks)
            break
        except ValueError as error:
            ranks.print0(f"damaged checkpoint, not used: {error}")
            damaged.append(newest)
    else:
        if damaged:
            raise ValueError(f"{folder}: no checkpoint is intact; remove this folder to train from "
                             "the stage's start")
        return 0
    check_settings(folder, manifest["settings"], settings)
    if ranks.rank == 0:  # all ranks have read them: `checksums` of the intact one waited for all
        remove_checkpoints(damaged)
    shards = [safe_open(path, "pt") for path in shard_paths(newest, len(manifest["shards"]))]
    for master in state.masters.values():  # AdamW makes its state in the first update
        moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
        updates = torch.tensor(float(manifest["updates"]), device=master.device)
        optimizer.state[master] = {"step": updates, **moments}
    for name, master, there, here in state.owned_slices():
        for key, tensor in weight_and_moments(master, optimizer).items():
            tensor.view(-1)[here] = read_slice(shards, f"{key}.{name}", there).to(tensor.device)
    state.all_gather_weights()
    return manifest["step"]


def read_slice(shards: list[safe_open], name: str, wanted: slice) -> Tensor:
    """The elements `wanted` of a flattened tensor. Each shard that has the name holds a piece."""
    pieces, first = [], 0  # first: number of the shard's first element
    for shard in shards:
        if name in shard.keys():  # noqa: SIM118
            piece = shard.get_slice(name)
            (length,) = piece.get_shape()
            low, high = max(wanted.start - first, 0), min(wanted.stop - first, length)
            if low < high:
                pieces.append(piece[low:high])
            first += length
    return torch.cat(pieces)
