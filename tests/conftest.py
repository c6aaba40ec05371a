"""What the tests share: the path, one thread, no GPU, and a tiny model of each kind."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip
from clip import Clip
from files import new_folder
from llama import Llama, LlamaConfig
from tokenizer import Tokenizer

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # a launcher's: the tests start their own ranks
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_base():
    """A function that writes a tiny base into a folder: `llama/` (one token a byte) and `clip/`."""

    def write(root: Path, layers: int = 3) -> tuple[Llama, Clip]:
        torch.manual_seed(0)
        config = LlamaConfig(260, 48, layers, 6, 2, 8, 64, context=400)
        llama, tower = Llama(config), Clip(clip.SIZES["tiny"])
        for kind, model, sizes in (("llama", llama, config), ("clip", tower, clip.SIZES["tiny"])):
            with new_folder(root / kind) as folder:
                save_file(model.state_dict(), folder / "model-00001-of-00001.safetensors")
                meta = {"kind": kind, "config": asdict(sizes), "sha256": kind}
                (folder / "config.json").write_text(json.dumps(meta))
        specials = {"<|im_start|>": 256, "<|im_end|>": 257, "<empty_output>": 258,
                    "<|endoftext|>": 259}
        engine = {bytes([b]): b for b in range(256)}
        Tokenizer(engine, specials, "chatml", "<empty_output>", r"[\s\S]").save(root / "llama")
        return llama, tower

    return write
