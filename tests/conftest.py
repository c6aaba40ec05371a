"""What the tests share: the path, one thread, no GPU, and a tiny model of each kind."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip import Clip, ClipConfig
from common.files import new_folder, write_json
from iaa import Adaptor, AdaptorConfig
from llama import Llama, LlamaConfig, RopeScaling
from tokenization.tokenizer import Tokenizer

LLAMA = LlamaConfig(512, 48, 4, 6, 2, 8, 112, 256)  # sizes of tiny models, also imported by tests
LLAMA_TIED = LlamaConfig(512, 48, 4, 6, 2, 8, 112, 256,
                         rope_scaling=RopeScaling(8.0, original_context=64), tied=True)
CLIP = ClipConfig(40, 3, 4, 88, 6, 18)

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)  # a launcher's: the tests start their own ranks
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


def byte_tokenizer() -> Tokenizer:
    """A ChatML tokenizer with a token for each byte; the image's is 258."""
    specials = ("<|im_start|>", "<|im_end|>", "<empty_output>", "<|endoftext|>")
    special_tokens = {name: 256 + n for n, name in enumerate(specials)}
    return Tokenizer({bytes([b]): b for b in range(256)}, special_tokens, "chatml",
                     "<empty_output>", r"[\s\S]")


def flip_bits(path: Path) -> Iterator[None]:
    """Flip a bit of a tensor in a safetensors file, in ten places one by one; whole at the end."""
    whole, header = path.read_bytes(), int.from_bytes(path.read_bytes()[:8], "little")
    for place in torch.linspace(8 + header, len(whole) - 1, 10, dtype=int).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        yield
    path.write_bytes(whole)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state. A command's handler of SIGTERM ends with it."""
    torch.manual_seed(0)
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(scope="session")
def write_base():
    """A function that writes a frozen model as convert_weights.py does; sha256: else its kind."""

    def write(path: Path, model: Llama | Clip, sha256: str = "") -> None:
        kind = type(model).__name__.lower()
        with new_folder(path) as folder:
            save_file(model.state_dict(), folder / "model-00001-of-00001.safetensors")
            write_json(folder / "config.json", {"kind": kind, "config": asdict(model.config),
                                                "sha256": sha256 or kind})

    return write


@pytest.fixture(scope="session")
def tiny_base(write_base):
    """A function that writes a tiny base into a folder: `llama/` (one token a byte) and `clip/`."""

    def write(root: Path, layers: int = 3) -> tuple[Llama, Clip]:
        torch.manual_seed(0)
        config = LlamaConfig(260, 48, layers, 6, 2, 8, 64, context=400)
        llama, tower = Llama(config), Clip(CLIP)
        write_base(root / "llama", llama)
        write_base(root / "clip", tower)
        byte_tokenizer().save(root / "llama")
        return llama, tower

    return write


@pytest.fixture(scope="session")
def tiny_run(tiny_base):
    """A function that writes a run into a folder: a tiny base, random adaptors mm and grounding."""

    def write(root: Path) -> None:
        llama, tower = tiny_base(root)
        for name, system in (("mm", None), ("grounding", "Box.")):
            adaptor = Adaptor(AdaptorConfig((0, 2)), llama.config, tower.config.width)
            for weight in adaptor.parameters():
                torch.nn.init.normal_(weight, std=0.2)
            with new_folder(root / name) as folder:
                adaptor.prompt = {"template": "chatml", "system": system}
                adaptor.save(folder, {"llama": "llama", "clip": "clip"}, {}, torch.float32)
        write_json(root / "iaa.json", {"llm": "llama", "vision": "clip", "image_token": 258,
                                       "adaptors": {"mm": "mm", "grounding": "grounding"}})

    return write
