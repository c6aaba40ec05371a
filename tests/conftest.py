"""What the tests share: the path, one thread, no GPU, files, and a tiny model of each kind."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import sentencepiece
import torch
from make_golden_tokens import lines
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clip import Clip, ClipConfig
from common.files import new_folder, sha256_of, write_json
from iaa import IAA, Adaptor, AdaptorConfig
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


def talk(*texts: str, first: int = 0) -> list[dict]:
    """Turns of human and gpt, as in a row; first 1: gpt begins."""
    return [{"from": ("human", "gpt")[(place + first) % 2], "value": text}
            for place, text in enumerate(texts)]


def write_rows(path: Path, rows: Iterable) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def last_line(command: Callable, *arguments) -> str:
    """The one line that a command must end with: Python prints it on stderr and exits with 1."""
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code.strip()
    return stopped.value.code


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
def tokenizer_model() -> bytes:
    """A sentencepiece model of 420 tokens with Llama 2's options, trained on the golden lines."""
    plain = (line for line in lines(300) if line.isascii() and "\0" not in line)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=plain, model_writer=written, vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, minloglevel=2, hard_vocab_limit=False)
    return written.getvalue()


def write_base(path: Path, model: Llama | Clip, sha256: str = "") -> None:
    """Write a frozen model as convert_weights.py does; sha256: else the true one."""
    kind, config = type(model).__name__.lower(), asdict(model.config)
    model.sha256 = sha256 or sha256_of(config, model.state_dict().items())
    with new_folder(path) as folder:
        save_file(model.state_dict(), folder / "model-00001-of-00001.safetensors")
        write_json(folder / "config.json", {"kind": kind, "config": config, "sha256": model.sha256})


def tiny_base(root: Path, layers: int = 3, seed: int = 0) -> tuple[Llama, Clip]:
    """Write a tiny base into a folder: `llama/` (one token a byte) and `clip/`."""
    torch.manual_seed(seed)
    config = LlamaConfig(260, 48, layers, 6, 2, 8, 64, context=400)
    llama, tower = Llama(config), Clip(CLIP)
    write_base(root / "llama", llama)
    write_base(root / "clip", tower)
    byte_tokenizer().save(root / "llama")
    return llama, tower


def tiny_run(root: Path) -> IAA:
    """Write a run into a folder: a tiny base, random adaptors mm and grounding. Returns it."""
    model = IAA(*tiny_base(root), 258)
    for name, system in (("mm", None), ("grounding", "Box.")):
        adaptor = Adaptor(AdaptorConfig((0, 2)), model.llama.config, CLIP.width)
        model.adaptors[name] = adaptor
        for weight in adaptor.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        with new_folder(root / name) as folder:
            adaptor.prompt = {"template": "chatml", "system": system}
            adaptor.save(folder, model.base, {}, torch.float32)
    write_json(root / "iaa.json", {"llm": "llama", "vision": "clip", "image_token": 258,
                                   "adaptors": {"mm": "mm", "grounding": "grounding"}})
    return model
