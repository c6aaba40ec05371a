"""features.py: what the tower made comes back bit for bit, whole or not at all."""

import pytest
import torch

from features import Features

IMAGES = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
MADE = torch.arange(2 * 5 * 6.0).view(2, 5, 6).to(torch.bfloat16)[:, 1:]  # as the tower cuts it


def test_all_are_read_or_none(tmp_path):
    """With one picture of two missing, both are to be made again; then both come as they were."""
    features = Features(tmp_path / "new", "tower")
    assert features.read(IMAGES) is IMAGES
    assert torch.equal(features.keep(IMAGES[:1], MADE[:1]), MADE[:1])
    assert features.read(IMAGES) is IMAGES
    kept = features.keep(IMAGES, MADE + 1)  # the first stays what it was, for all who see it
    assert torch.equal(kept, torch.stack([MADE[0], MADE[1] + 1]))
    assert torch.equal(features.read(IMAGES), kept)
    assert torch.equal(features.read(IMAGES.flip(0)), kept.flip(0))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2


def test_another_tower_or_picture_has_other_files(tmp_path):
    """A file is of one tower and one picture to the last bit."""
    features = Features(tmp_path, "tower")
    features.keep(IMAGES, MADE)
    assert Features(tmp_path, "other").read(IMAGES) is IMAGES
    changed = IMAGES.clone()
    changed[1, 2, 3, 3] += 1e-5
    assert features.read(changed) is changed


@pytest.mark.parametrize("bytes_left", [0, 5, 60, -1])
def test_a_broken_file_is_made_again(tmp_path, bytes_left):
    """A file cut short counts as missing, and is replaced when the tower has run."""
    features = Features(tmp_path, "tower")
    features.keep(IMAGES, MADE)
    path = features.path(IMAGES[1])
    path.write_bytes(path.read_bytes()[:bytes_left])
    assert features.read(IMAGES) is IMAGES
    features.keep(IMAGES, MADE)
    assert torch.equal(features.read(IMAGES), MADE)
