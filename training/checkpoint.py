"""Checkpoints of a stage: every rank writes its shard; a manifest, written last, completes a set.

    step-000100/rank-0-of-2.safetensors    "weight.NAME", "exp_avg.NAME", "exp_avg_sq.NAME": pieces
    step-000100/rank-1-of-2.safetensors    of flattened tensors, whole in the order of the ranks
    step-000100/state.json                 the manifest: step, updates, ranks, settings

A folder without its manifest is what a killed run left behind: ignored, and removed. Whoever
resumes takes the pieces that it needs from all files, so the number of ranks and the ZeRO stage may
change in between. On several machines the folder must be one that all of them see.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import check_same, flush, read_json, write_json, writing
from training.ranks import Ranks
from training.zero import Replicated, Sharded

MANIFEST = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
# What may change when a stage is resumed: it makes no other result, up to rounding.
FREE = ("save_every", "eval_every", "eval_rows", "held_out", "micro_batch", "zero")


def complete_sets(folder: Path) -> list[Path]:
    """The stage's complete checkpoints, oldest first."""
    return [found.parent for found in sorted(folder.glob(f"step-*/{MANIFEST}"))]


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, manifest first: at no time does half of it look whole."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left in a stage's folder: incomplete sets, temporary files."""
    for found in [*folder.glob("step-*"), *folder.glob(".*.tmp*")]:
        if found.is_file():
            found.unlink()
        elif not (found / MANIFEST).is_file():
            shutil.rmtree(found)


def kept(master: Tensor, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What a checkpoint keeps of a master: itself, and its moments once it has been updated."""
    values = optimizer.state.get(master, {})
    return {"weight": master.detach(), **{key: values[key] for key in MOMENTS if values}}


def save_state(
    folder: Path, ranks: Ranks, state: Replicated | Sharded, optimizer: torch.optim.AdamW,
    settings: dict, step: int
) -> None:
    """A checkpoint from which the stage goes on at `step`; the newest two are kept.

    settings: what must be the same when it goes on, but for `FREE`; JSON can hold it.
    """
    new = folder / f"step-{step:06d}"
    if ranks.rank == 0:
        new.mkdir()
    ranks.barrier()
    writers = 1 if state.stage == 0 else ranks.world
    if ranks.rank < writers:
        tensors = {}
        for name, master, _, here in state.pieces():
            for key, tensor in kept(master, optimizer).items():
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
        for old in complete_sets(folder)[:-2]:
            remove(old)


def lasting(settings: dict) -> dict:
    """Settings without what is free, also of those that it began with."""
    return {key: lasting(value) if key == "beginning" and value else value
            for key, value in settings.items() if key not in FREE}


def check_settings(made: Path, was: dict, settings: dict) -> None:
    """Raise ValueError where what lies at `made` was made with other settings, but for `FREE`."""
    check_same(made, lasting(was), lasting(settings),
               "restore it, or remove that folder to train the stage again")


def resume_state(
    folder: Path, ranks: Ranks, state: Replicated | Sharded, optimizer: torch.optim.AdamW,
    settings: dict
) -> int:
    """Fill weights and optimizer from the newest checkpoint, return its step; 0 without one.

    Raises ValueError where it was made with other settings, or does not hold what is needed.
    """
    if ranks.rank == 0:
        remove_leftovers(folder)
    ranks.barrier()
    found = complete_sets(folder)
    if not found:
        return 0
    manifest = read_json(found[-1] / MANIFEST, "step", "updates", "ranks", "settings")
    check_settings(folder, manifest["settings"], settings)
    pieces = Pieces(found[-1], manifest["ranks"])
    for master in state.masters.values() if manifest["updates"] else ():
        moments = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
        count = torch.tensor(float(manifest["updates"]), device=master.device)
        optimizer.state[master] = {"step": count, **moments}
    for name, master, there, here in state.pieces():
        for key, tensor in kept(master, optimizer).items():
            tensor.view(-1)[here] = pieces.read(f"{key}.{name}", there).to(tensor.device)
    state.publish()
    return manifest["step"]


class Pieces:
    """The tensors of a checkpoint, flattened, from the files of all ranks."""

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.places = folder, {}  # name -> (file, elements) in order
        for rank in range(ranks):
            path = folder / f"rank-{rank}-of-{ranks}.safetensors"
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: missing or broken ({error})") from None
            for name in file.keys():  # noqa: SIM118
                (length,) = file.get_slice(name).get_shape()
                self.places.setdefault(name, []).append((file, length))

    def read(self, name: str, wanted: slice) -> Tensor:
        """Elements `wanted` of a flattened tensor. Raises ValueError where they are not there."""
        parts, first = [], 0
        for file, length in self.places.get(name, []):
            low, high = max(wanted.start - first, 0), min(wanted.stop - first, length)
            if low < high:
                parts.append(file.get_slice(name)[low:high])
            first += length
        if sum(map(len, parts)) != wanted.stop - wanted.start:
            raise ValueError(f"{self.folder} does not hold {name}: made with other settings")
        return torch.cat(parts)
