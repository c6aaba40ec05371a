"""memory.py: what is counted on the meta device is what real tensors take; the paper's figures."""

import pytest
import torch
from safetensors.torch import save

import clip
import llama
import memory
from iaa import AdaptorConfig

TINY, TOWER = llama.SIZES["tiny"], clip.SIZES["tiny"]


def bytes_held(model: torch.nn.Module) -> int:
    """Bytes of the distinct storages behind a real model's tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in model.state_dict().values()}
    return sum(storages.values())


def test_the_count_is_what_real_tensors_take():
    """One LLM with two adaptors, and a separate model: storages in memory, data in a file."""
    settings = AdaptorConfig((0, 1, 3))
    real = memory.model(TINY, TOWER, {"mm": settings, "grounding": settings}).bfloat16()
    alone = memory.model(TINY, TOWER, {"mm": AdaptorConfig((), "c", False, False)}).bfloat16()
    with torch.device("meta"):
        together, apart = memory.together(TINY, TOWER, 3), memory.apart(TINY, TOWER)
    assert together[-1][1] == bytes_held(real) == sum(number for _, number in together[:-1])
    in_file = save(alone.state_dict())
    data = len(in_file) - 8 - int.from_bytes(in_file[:8], "little")  # behind the header
    assert apart[1][1] == bytes_held(alone) == data
    assert apart[-1][1] == 2 * bytes_held(alone) + bytes_held(alone.llama)


def test_the_paper_s_figures(monkeypatch, capsys):
    """IAA-8 on Llama-3-8B: about 30 GB against about 50 GB, without allocating them."""
    monkeypatch.setattr("sys.argv", ["memory.py"])
    memory.main()
    printed = capsys.readouterr().out.splitlines()
    lines = dict(line.removesuffix(" GB").rsplit(maxsplit=1) for line in printed)
    assert float(lines["one LLM, one CLIP, two adaptors"]) == pytest.approx(30, abs=3)
    assert float(lines["three separate models"]) == pytest.approx(50, abs=1)
    assert lines["LLM"] == "16.06"  # 8.03 billion weights


def test_too_many_layers_is_one_line(monkeypatch):
    """More insertion layers than the LLM has."""
    monkeypatch.setattr("sys.argv", ["memory.py", "--insertion", "33"])
    with pytest.raises(SystemExit, match="^memory.py: insertion = 33: 0 to 32 layers can be "):
        memory.main()
