"""Checkpoints of a stage: each rank writes a shard, then rank 0 writes a manifest.

    step-000100/rank-0-of-2.safetensors    "weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": slices
    step-000100/rank-1-of-2.safetensors    of flattened tensors; rank 1's follow rank 0's
    step-000100/state.json                 the manifest: step, updates, ranks, settings

A checkpoint is complete once its manifest is there. A folder without one was left by a killed run,
and is removed. A rank that resumes reads the slices that it needs from all shards, so the number of
ranks and the ZeRO stage may change in between. On several machines `out` must be a shared folder.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from shutil import rmtree

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.device import Ranks
from common.files import flush, read_json, write_json, writing
from training.zero import DataParallel, ZeroSharded

MANIFEST = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# Settings that may change when a stage is resumed: the result is the same, up to rounding.
FREE = ("save_every", "eval_every", "eval_rows", "held_out", "micro_batch", "zero")


def complete_checkpoints(folder: Path) -> list[Path]:
    """The stage's complete checkpoints, oldest first."""
    return [found.parent for found in sorted(folder.glob(f"step-*/{MANIFEST}"))]


def remove_checkpoints(folders: Iterable[Path]) -> None:
    """Remove folders, each one's manifest first: a kill then leaves what looks unfinished."""
    for folder in folders:
        if folder.is_dir():
            (folder / MANIFEST).unlink(missing_ok=True)
            rmtree(folder)


def weight_and_moments(master: Tensor, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """A master weight and its two moments; before the first update it has none."""
    values = optimizer.state.get(master, {})
    return {"weight": master.detach(), **{key: values[key] for key in MOMENTS if values}}


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
    writers = 1 if state.stage == 0 else ranks.world  # at stage 0 every rank holds the same
    if ranks.rank < writers:
        tensors = {}
        for name, master, _, here in state.owned_slices():
            for key, tensor in weight_and_moments(master, optimizer).items():
                tensors[f"{key}.{name}"] = tensor.flatten()[here].contiguous()
        path = new / f"rank-{ranks.rank}-of-{writers}.safetensors"
        with writing(path):
            save_file(tensors, path)
            flush(path)
    ranks.barrier()  # all shards are on the disk before the manifest says so
    if ranks.rank == 0:
        flush(new)
        counts = [int(values["step"]) for values in optimizer.state.values()]
        manifest = {"step": step, "updates": max(counts, default=0), "ranks": writers,
                    "settings": settings}
        write_json(new / MANIFEST, manifest)
        remove_checkpoints(complete_checkpoints(folder)[:-2])


def check_settings(folder: Path, was: dict, now: dict) -> None:
    """Raise ValueError naming the settings, `FREE` aside, that differ from those of `folder`.

    was: as JSON gave them back.
    """

    def without_free(settings: dict) -> dict:
        return {key: without_free(value) if key == "beginning" and value else value
                for key, value in settings.items() if key not in FREE}

    was, now = without_free(was), without_free(json.loads(json.dumps(now)))  # tuples: now lists
    changed = [key for key in now | was if was.get(key) != now.get(key)]
    if changed:
        raise ValueError(f"{folder} was made with another {', '.join(changed)}: restore it, "
                         "or remove that folder to train the stage again")


def resume_state(
    folder: Path, ranks: Ranks, state: DataParallel | ZeroSharded, optimizer: torch.optim.AdamW,
    settings: dict
) -> int:
    """Fill weights and optimizer from the newest checkpoint and return its step, 0 without one.

    What killed runs left half written is removed. Raises ValueError where the checkpoint was made
    with other settings, or is damaged.
    """
    if ranks.rank == 0:
        left = (*folder.glob("step-*"), *folder.glob(".*.tmp"))
        remove_checkpoints(path for path in left if not (path / MANIFEST).is_file())
    ranks.barrier()
    found = complete_checkpoints(folder)
    if not found:
        return 0
    manifest = read_json(found[-1] / MANIFEST)
    check_settings(folder, manifest["settings"], settings)
    count = manifest["ranks"]
    shards = [safe_open(found[-1] / f"rank-{rank}-of-{count}.safetensors", "pt")
              for rank in range(count)]
    if manifest["updates"]:  # AdamW makes its state in the first update; here it is made empty
        for master in state.masters.values():
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
    if sum(map(len, pieces)) != wanted.stop - wanted.start:
        raise ValueError(f"the checkpoint does not hold all of {name}: remove its folder")
    return torch.cat(pieces)
