"""Vision features kept on disk: the tower is frozen, so a picture needs it once, not every epoch.

With `features = "FOLDER"` in a config, what the tower makes in training is kept, and a batch whose
pictures are all there is read from disk: later epochs, stages and runs do without the tower.

A file a picture, P x D numbers in the tower's dtype (1.2 MB for ViT-L/14-336, 28 KB in the demo).
Its name is the SHA-256 of all that decides its content: pixels as the tower takes them, and the
tower itself. So nothing goes stale, and any number of runs may share a folder. Pictures are still
decoded, by the processes that load data, and their pixels hashed there (3 ms at 336 px).

Letters: N images, S image side in pixels, P patches, D width.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.files import new_file


class Features:
    """The files of one tower in a folder; `tower` tells it from all others."""

    def __init__(self, folder: str | Path, tower: str):
        self.folder, self.tower = Path(folder), tower.encode()

    def path(self, pixels: Tensor) -> Path:
        """The file of a picture, pixels (3, S, S)."""
        name = hashlib.sha256(self.tower + pixels.numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> features (N, P, D); the images themselves unless all N are kept."""
        found = [load(self.path(pixels)) for pixels in images]
        return images if any(features is None for features in found) else torch.stack(found)

    def keep(self, images: Tensor, features: Tensor) -> Tensor:
        """Write what the tower made of `images`, where there is none or a broken file.

        Returns what is kept now: a picture made anew, in another batch, may round otherwise, and a
        process that goes on after a stop is to see what it would have seen.
        """
        rows = []
        for pixels, made in zip(images.cpu(), features.cpu(), strict=True):
            path = self.path(pixels)
            old = load(path)
            if old is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with new_file(path) as new:  # no fsync: what a power cut breaks is made again
                    save_file({"features": made.contiguous()}, new)
            rows.append(made if old is None else old)
        return torch.stack(rows).to(features.device)


def load(path: Path) -> Tensor | None:
    """The features (P, D) in a file, None where it is missing or broken."""
    try:
        return load_file(path)["features"]
    except (FileNotFoundError, SafetensorError):
        return None
