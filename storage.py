"""Models as folders: frozen bases from `convert_weights.py`, adaptors, whole models by `iaa.json`.

Every tensor is checked as it is read; an adaptor names the base that it was trained on by its
SHA-256, and loads onto no other.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from clip import Clip, ClipConfig
from common.files import build, read_json, write_json
from iaa import IAA, Adaptor, AdaptorConfig, check_workflow, is_workflow
from llama import Llama, LlamaConfig


def load_tensors(
    model: nn.Module, files: list[Path], dtype: torch.dtype | None, device: str,
    partly: bool = False
) -> None:
    """Fill a model, every tensor exactly once. Raises ValueError naming it.

    partly: what is not in the files stays as it is; else the model may be on the meta device.
    """
    expected, seen = model.state_dict(), set()
    for file in files:
        try:
            tensors = load_file(file, device)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: broken or cut short ({error})") from None
        for name, tensor in tensors.items():
            if name not in expected or name in seen:
                fault = "comes twice" if name in seen else "is not known"
                raise ValueError(f"{file}: tensor {name!r} {fault}")
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{file}: {name} is {list(tensor.shape)}, "
                                 f"should be {list(expected[name].shape)}")
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        model.load_state_dict(tensors, strict=False, assign=True)  # strict: the checks around it
        seen.update(tensors)
    missing = sorted(expected.keys() - seen)
    if missing and not partly:
        raise ValueError(f"{files[0].parent}: {len(missing)} tensors missing, "
                         f"such as {missing[0]}")


def read_base(folder: str | Path) -> tuple[LlamaConfig | ClipConfig, str]:
    """Sizes and SHA-256 of a frozen model that `convert_weights.py` wrote, by its config.json."""
    path = Path(folder, "config.json")
    meta = read_json(path, kind=str, config=dict, sha256=str)
    kinds = {"llama": LlamaConfig, "clip": ClipConfig}
    if meta["kind"] not in kinds:
        raise ValueError(f"{path}: kind is {meta['kind']!r}, not llama or clip")
    return build(kinds[meta["kind"]], meta["config"], f"{path}: config"), meta["sha256"]


def load_base(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Llama | Clip, str]:
    """A frozen model that `convert_weights.py` wrote, in eval mode, and its SHA-256."""
    config, sha = read_base(folder)
    files = sorted(Path(folder).glob("model-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model-*.safetensors in it")
    with torch.device("meta"):
        model = Llama(config) if isinstance(config, LlamaConfig) else Clip(config)
    load_tensors(model, files, dtype, device)
    return model.eval().requires_grad_(False), sha


def save_adaptor(
    adaptor: Adaptor, folder: Path, base: dict[str, str], extra: dict, dtype: torch.dtype
) -> None:
    """Write `adaptor.safetensors` and `config.json` into `folder` (made ready by `new_folder`).

    base: SHA-256 of the frozen "llama" and "clip"; extra: what users must know, such as the prompt.
    """
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in adaptor.state_dict().items()}
    save_file(tensors, folder / "adaptor.safetensors")
    meta = {"adaptor": asdict(adaptor.config), "base": base, **extra}
    (folder / "config.json").write_text(json.dumps(meta, indent=2) + "\n")


def read_meta(folder: Path, base: dict[str, str]) -> dict:
    """An adaptor's config.json. Raises ValueError where it was trained on another base."""
    meta = read_json(folder / "config.json", adaptor=AdaptorConfig, base=dict[str, str],
                     prompt=dict[str, str | None])
    for part, digest in base.items():
        trained = meta["base"].get(part, "unknown")
        if trained != digest:
            raise ValueError(f"{folder} was trained on {part} {trained[:16]}..., "
                             f"this {part} is {digest[:16]}...")
    return meta


def load_adaptor(
    folder: str | Path,
    llama: LlamaConfig,
    vision_width: int,
    base: dict[str, str],
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Adaptor, dict]:
    """An adaptor and its config.json. Raises ValueError where it was trained on another base."""
    folder = Path(folder)
    meta = read_meta(folder, base)
    with torch.device("meta"):
        adaptor = Adaptor(meta["adaptor"], llama, vision_width)
    load_tensors(adaptor, [folder / "adaptor.safetensors"], dtype, device)
    return adaptor, meta


@dataclass(frozen=True)
class Index:
    """`iaa.json`: where the parts of a whole model lie, as paths from its folder."""

    llm: str
    vision: str
    image_token: int  # the placeholder's id
    adaptors: dict[str, str]  # workflow -> folder


def read_index(folder: str | Path) -> Index:
    """What `iaa.json` says. Raises FileNotFoundError, ValueError."""
    path = Path(folder, "iaa.json")
    return build(Index, read_json(path), str(path))


def write_index(folder: str | Path, index: Index) -> None:
    """Write `iaa.json`; it appears whole or not at all."""
    write_json(Path(folder, "iaa.json"), asdict(index))


def load_iaa(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    workflows: Sequence[str] | None = None,  # None: all
) -> tuple[IAA, dict]:
    """A whole model by its `iaa.json`: base, and the adaptors of `workflows`.

    Returns the model and {"llm": folder of LLM and tokenizer, "prompts": {workflow: prompt},
    "base": SHA-256 of "llama" and "clip"}. Raises ValueError, before anything is loaded, for a
    workflow that `iaa.json` lacks.
    """
    folder = Path(folder)
    index = read_index(folder)
    for name in workflows or ():
        check_workflow(name, index.adaptors)
    llama, llama_sha = load_base(folder / index.llm, dtype, device)
    clip, clip_sha = load_base(folder / index.vision, dtype, device)
    model, base = IAA(llama, clip, index.image_token), {"llama": llama_sha, "clip": clip_sha}
    prompts = {name: add_adaptor(model, name, folder / place, base, dtype or llama.dtype)
               for name, place in index.adaptors.items()
               if workflows is None or name in workflows}
    return model.eval(), {"llm": folder / index.llm, "prompts": prompts, "base": base}


def add_adaptor(
    model: IAA, name: str, folder: str | Path, base: dict[str, str],
    dtype: torch.dtype | None = None,
) -> dict[str, str | None]:
    """Load the adaptor in `folder` as one more workflow; its prompt {"template", "system"}.

    base: as `load_iaa` returns it. Raises ValueError for a name that is taken or cannot be one.
    """
    if name in model.adaptors or not is_workflow(name):
        raise ValueError(f"an adaptor cannot be named {name!r}: letters, digits and _, "
                         "not in use, and no name of torch's, as 'train'")
    device = str(model.llama.device)
    width = model.clip.config.width
    adaptor, meta = load_adaptor(folder, model.llama.config, width, base, dtype, device)
    model.adaptors[name] = adaptor.requires_grad_(False).eval()
    return {"template": None, "system": None, **meta["prompt"]}
