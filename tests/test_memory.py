"""memory.py: what is counted on the meta device is what real tensors take; the paper's figures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import clip
import llama
import memory
from iaa import AdaptorConfig

ROOT = Path(__file__).parent.parent
TINY, TOWER = llama.SIZES["tiny"], clip.SIZES["tiny"]


def bytes_held(model: torch.nn.Module) -> int:
    """Bytes of the distinct storages behind a real model's tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in model.state_dict().values()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_count_is_what_real_tensors_take(dtype):
    """One LLM with two adaptors, and a separate model: storages in memory, data in a file."""
    settings = AdaptorConfig((0, 1, 3))
    torch.set_default_dtype(dtype)
    try:
        real = memory.model(TINY, TOWER, {"mm": settings, "grounding": settings})
        alone = memory.model(TINY, TOWER, {"mm": AdaptorConfig((), "c", False, False)})
        with torch.device("meta"):
            together = memory.together(TINY, TOWER, 3)
            apart = memory.apart(TINY, TOWER)
    finally:
        torch.set_default_dtype(torch.float32)
    assert together[-1][1] == bytes_held(real) == sum(number for _, number in together[:-1])
    in_file = save(alone.state_dict())
    data = len(in_file) - 8 - int.from_bytes(in_file[:8], "little")  # behind the header
    assert apart[1][1] == bytes_held(alone) == data
    assert apart[-1][1] == 2 * bytes_held(alone) + bytes_held(alone.llama)


def test_the_paper_s_figures():
    """IAA-8 on Llama-3-8B: about 30 GB against about 50 GB, without allocating them."""
    run = subprocess.run([sys.executable, str(ROOT / "memory.py")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = dict(line.removesuffix(" GB").rsplit(maxsplit=1) for line in run.stdout.splitlines())
    assert float(lines["one LLM, one CLIP, two adaptors"]) == pytest.approx(30, abs=3)
    assert float(lines["three separate models"]) == pytest.approx(50, abs=1)
    assert lines["LLM"] == "16.06"  # 8.03 billion weights


def test_too_many_layers_is_one_line():
    """More insertion layers than the LLM has."""
    run = subprocess.run([sys.executable, str(ROOT / "memory.py"), "--insertion", "33"],
                         capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == (
        "memory.py: insertion = 33: 0 to 32 layers can be inserted in 32\n")
