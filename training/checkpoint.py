"""Checkpoints of a stage: each rank writes a shard, then rank 0 writes a manifest.

    step-000100/rank-0-of-2.safetensors    "weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": slices
    step-000100/rank-1-of-2.safetensors    of flattened tensors; rank 1's follow rank 0's
    step-000100/state.json                 the manifest: step, updates, ranks, settings

A checkpoint is complete once its manifest is there. A folder without one was left by a killed run,
and is removed. A rank that resumes reads the slices that it needs from all shards, so the number of
ranks and the ZeRO stage may change in between. On several machines `out` must be a shared folder.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, the manifest first, so that half of it never looks complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left in a stage's folder: incomplete checkpoints, temporary files."""
    for found in [*folder.glob("step-*"), *folder.glob(".*.tmp*")]:
        if found.is_file():
            found.unlink()
        elif not (found / MANIFEST).is_file():
            shutil.rmtree(found)


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
    writers = 1 if state.stage == 0 else ranks.world
    if ranks.rank < writers:
        tensors = {}
        for name, master, _, here in state.owned_slices():
            for key, tensor in weight_and_moments(master, optimizer).items():
                tensors[f"{key}.{name}"] = tensor.flatten()[here].contiguous()
        path = new / f"rank-{ranks.rank}-of-{writers}.safetensors"
        with writing(path):
            save_file(tensors, path)
            flush(path)
    ranks.barrier()
    if ranks.rank == 0:
        flush(new)
        counts = [int(values["step"]) for values in optimizer.state.values()]
        manifest = {"step": step, "updates": max(counts, default=0), "ranks": writers,
                    "settings": settings}
        write_json(new / MANIFEST, manifest)
        for old in complete_checkpoints(folder)[:-2]:
            remove(old)


def check_settings(folder: Path, was: dict, now: dict) -> None:
    """Raise ValueError naming the settings, `FREE` aside, that differ from those of `folder`.

    was: as JSON gave them back. A setting that only one of the two has counts as different.
    """

    def without_free(settings: dict) -> dict:
        return {key: without_free(value) if key == "beginning" and value else value
                for key, value in settings.items() if key not in FREE}

    was, now = without_free(was), without_free(json.loads(json.dumps(now)))
    missing = object()
    changed = [key for key in now | was if was.get(key, missing) != now.get(key, missing)]
    if changed:
        raise ValueError(f"{folder} was made with another {', '.join(changed)}: restore it, "
                         "or remove that folder to train the stage again")


def resume_state(
    folder: Path, ranks: Ranks, state: DataParallel | ZeroSharded, optimizer: torch.optim.AdamW,
    settings: dict
) -> int:
    """Fill weights and optimizer from the newest checkpoint and return its step, 0 without one.

    Raises ValueError where it was made with other settings, or lacks a slice that is needed.
    """
    if ranks.rank == 0:
        remove_leftovers(folder)
    ranks.barrier()
    found = complete_checkpoints(folder)
    if not found:
        return 0
    manifest = read_json(found[-1] / MANIFEST, "step", "updates", "ranks", "settings")
    check_settings(folder, manifest["settings"], settings)
    shards = Shards(found[-1], manifest["ranks"])
    for master in state.masters.values() if manifest["updates"] else ():
        moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
        count = torch.tensor(float(manifest["updates"]), device=master.device)
        optimizer.state[master] = {"step": count, **moments}
    for name, master, there, here in state.owned_slices():
        for key, tensor in weight_and_moments(master, optimizer).items():
            tensor.view(-1)[here] = shards.read(f"{key}.{name}", there).to(tensor.device)
    state.all_gather_weights()
    return manifest["step"]


class Shards:
    """The flattened tensors of a checkpoint, out of the shards of all ranks."""

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.slices = folder, {}  # name -> (file, elements), in the order of ranks
        for rank in range(ranks):
            path = folder / f"rank-{rank}-of-{ranks}.safetensors"
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: missing or broken ({error})") from None
            for name in file.keys():  # noqa: SIM118
                (length,) = file.get_slice(name).get_shape()
                self.slices.setdefault(name, []).append((file, length))

    def read(self, name: str, wanted: slice) -> Tensor:
        """The elements `wanted` of a flattened tensor. ValueError where the shards lack them."""
        parts, first = [], 0
        for file, length in self.slices.get(name, []):
            low, high = max(wanted.start - first, 0), min(wanted.stop - first, length)
            if low < high:
                parts.append(file.get_slice(name)[low:high])
            first += length
        if sum(map(len, parts)) != wanted.stop - wanted.start:
            raise ValueError(f"{self.folder} does not hold {name}: made with other settings")
        return torch.cat(parts)
