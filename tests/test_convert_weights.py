"""convert_weights.py: a tiny Llama, tower and adaptor come back from every foreign layout."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import edit, last_line
from safetensors.torch import load_file, save_file

import convert_weights
from clip import Clip, ClipConfig
from common.files import check_frozen, load_frozen
from conversion import tensor_tables as tables
from conversion.checkpoint_readers import DINOV2_SETTINGS, Stored, meta_config
from conversion.tokenizer_readers import read_meta_tokenizer
from convert_weights import convert
from iaa import Adaptor, AdaptorConfig, load_iaa
from llama import SIZES, Llama, LlamaConfig, RopeScaling, rope_frequencies
from tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
LLAMA = LlamaConfig(
    vocab_size=448, width=64, layers=3, heads=4, kv_heads=2, head_size=16, ffn=96, context=8192)
TOWER = ClipConfig(width=128, layers=2, heads=2, ffn=160, patch=4, image_px=12)
HF_LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "vocab_size": 448, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False}
SCALING = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
HF_VISION = {"model_type": "clip_vision_model", "num_attention_heads": 2,
             "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}  # the shapes tell the rest


def fill(model, seed: int) -> dict[str, torch.Tensor]:
    """State of a model: k/8, k in -8..7, both ends in each 32: exact in bf16 and in four bits."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, tensor in model.state_dict().items():
        values = torch.randint(-8, 8, tensor.shape, generator=generator) / 8
        values[..., ::32], values[..., 1::32] = -1, 7 / 8
        state[name] = values
    return state


@pytest.fixture(scope="module")
def llama():
    return fill(Llama(LLAMA), 0)


@pytest.fixture(scope="module")
def tower():
    return fill(Clip(TOWER), 1)


def interleave(weight, heads: int):
    """Rows as Meta and llama.cpp keep them (LlamaModel.permute of convert_hf_to_gguf.py)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def rename(ours: dict, table: list = tables.HF_LLAMA) -> dict[str, torch.Tensor]:
    """Our tensors as those that a table makes them of; in Meta's and GGUF's pairs interleaved."""
    layers, theirs = sum(name.endswith("ffn_norm.weight") for name in ours), {}
    for row in (row for line in table for row in tables.expand(line, layers)):
        if row.target in ours:
            tensor, names = ours[row.target], row.sources.split()
            parts = tensor.chunk(len(names))
            if len(names) == 3:  # a square matrix of all queries, then keys and values
                first = tensor.shape[-1] if tensor.ndim == 2 else len(tensor) // 3
                parts = tensor.split((first, *[(len(tensor) - first) // 2] * 2))
            if table in (tables.META_LLAMA, tables.GGUF_LLAMA) and len(names) == 3:
                parts = interleave(parts[0], 4), interleave(parts[1], 2), parts[2]
            theirs |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return theirs


def rename_tower(ours: dict, prefix: str = "vision_model.") -> dict[str, torch.Tensor]:
    """A tower in Hugging Face's names, with tensors that nobody needs."""
    return rename(ours, tables.within("", prefix, tables.HF_CLIP)) | {
        f"{prefix}embeddings.position_ids": torch.arange(10)[None],
        f"{prefix}post_layernorm.bias": torch.ones(128)}


def save_hf(folder, tensors, config, tokenizer_model, files=1, kind="safetensors") -> Path:
    """A Hugging Face folder of `files` weight files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_model is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer_model)
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    for n in range(files):
        save(dict(list(tensors.items())[n::files]), folder / f"{stem}-{n + 1}-of-{files}.{kind}")
    return folder


def save_meta(folder: Path, tensors: dict, shards=1, embedding_dim=0, scaled=False) -> Path:
    """A folder of Meta's with `shards` model-parallel slices, without its tokenizer."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({
        "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1,
        "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": scaled}))
    dims = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
    dims |= {"wo": 1, "w2": 1, "tok_embeddings": embedding_dim}
    pieces = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        dim = dims.get(name.split(".")[-2])
        for n, piece in enumerate(pieces):
            piece[name] = tensor if dim is None else tensor.chunk(shards, dim)[n].clone()
    for n, piece in enumerate(pieces):
        torch.save(piece, folder / f"consolidated.{n:02}.pth")
    return folder


def check(folder: Path, reference: dict, config, tolerance: float = 0) -> str:
    """The folder loads, and holds the reference's tensors and config. Returns its SHA-256."""
    model = load_frozen(Llama if isinstance(config, LlamaConfig) else Clip, folder)
    assert json.dumps(asdict(model.config)) == json.dumps(asdict(config))  # JSON knows no tuples
    found = {name: tensor.float() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(found, reference, rtol=0, atol=tolerance)
    check_frozen(type(model), folder)
    return model.sha256


def refuse(source: Path, message: str, **options) -> None:
    """A conversion ends with one line that matches, and leaves nothing behind."""
    before = {*source.parent.iterdir()}
    with pytest.raises(ValueError, match=message) as caught:
        convert(source, source.parent / "refused", **options)
    assert "\n" not in str(caught.value) and {*source.parent.iterdir()} == before


@pytest.mark.parametrize(("files", "kind", "dtype", "change"), [
    (1, "safetensors", "bf16", {"tie_word_embeddings": True}),
    (3, "safetensors", "fp32", {"rope_scaling": None}),
    (2, "bin", "fp32", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    (1, "bin", "fp16", {"rope_theta": None, "rope_parameters": {"rope_theta": 500000.0}})])
def test_hf_llama(tmp_path, llama, tokenizer_model, files, kind, dtype, change):
    """Files of safetensors or of torch.save; the rotary base as of transformers 4 and 5."""
    theirs, config = rename(llama), replace(LLAMA, tied="tie_word_embeddings" in change)
    if config.tied:  # a copy of the embedding in the file, no head in ours
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
        llama = {name: tensor for name, tensor in llama.items() if name != "head.weight"}
    if kind == "bin":  # people save parameters too
        theirs = {name: torch.nn.Parameter(tensor) for name, tensor in theirs.items()}
    folder = save_hf(tmp_path / "in", theirs, HF_LLAMA | change, tokenizer_model, files, kind)
    if dtype == "fp16":  # the form before torch 1.6
        torch.save(theirs, folder / "pytorch_model-1-of-1.bin",
                   _use_new_zipfile_serialization=False)
    convert(tmp_path / "in", tmp_path / "out", dtype)
    check(tmp_path / "out", llama, config)
    assert load_frozen(Llama, tmp_path / "out").stored_dtype == convert_weights.DTYPES[dtype]
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@pytest.mark.parametrize(("shards", "embedding_dim", "scaled"), [
    (1, 0, False), (2, 0, True), (2, 1, False)])
def test_meta_llama(tmp_path, llama, tokenizer_model, monkeypatch, shards, embedding_dim, scaled):
    """One file, and slices of each matrix in two; Llama 3.1 has special tokens of its own."""
    read = Mock(return_value=Tokenizer(tokenizer_model, SPECIALS, "vicuna", "<unk>"))
    monkeypatch.setattr(convert_weights.tokenizers, "read_meta_tokenizer", read)
    wanted = replace(LLAMA, context=131072, rope_scaling=RopeScaling(8.0)) if scaled else LLAMA
    theirs = rename(llama, tables.META_LLAMA)
    folder = save_meta(tmp_path / "in", theirs, shards, embedding_dim, scaled)
    convert(folder, tmp_path / "out")
    check(tmp_path / "out", llama, wanted)
    read.assert_called_once_with(folder / "tokenizer.model", "3.1" if scaled else "3", None)


@pytest.mark.parametrize("name", SIZES)
def test_meta_settings(name):
    """What params.json of Llama 3, 3.1 and 3.2 leaves out is found: the sizes of llama.py."""
    known = SIZES[name]
    shapes = {"tok_embeddings.weight": (128256, known.width),
              "layers.0.feed_forward.w2.weight": (known.width, known.ffn),
              "output.weight": (128256, known.width)}  # 1B and 3B have a copy there
    source = {name: Stored(ROOT, partial(torch.empty, shape, device="meta"))
              for name, shape in shapes.items()}
    params = {"dim": known.width, "n_layers": known.layers, "n_heads": known.heads,
              "n_kv_heads": known.kv_heads, "norm_eps": 1e-5, "rope_theta": 500000.0,
              "vocab_size": 128256, "use_scaled_rope": name != "3-8B"}
    assert meta_config(params, source) == known


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1"])
def test_gguf(tmp_path, llama, kind):
    """Values are exact but in Q8_0; a table of rotary factors becomes the scaling that makes it."""
    theirs, config = rename(llama, tables.GGUF_LLAMA), LLAMA
    if kind != "F32":
        config = replace(LLAMA, rope_scaling=RopeScaling(32.0))
        theirs["rope_freqs.weight"] = rope_frequencies(LLAMA) / rope_frequencies(config)
    save_gguf(tmp_path / "in.gguf", theirs, kind)
    convert(tmp_path / "in.gguf", tmp_path / "out", "fp32")
    check(tmp_path / "out", llama, config, 0.005 if kind == "Q8_0" else 0)
    assert Tokenizer.load(tmp_path / "out").encode("ab") == [67, 68]


def test_gguf_of_vicuna(tmp_path, llama, tokenizer_model):
    """Its `tokenizer.model` lies beside the file."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    pieces = [sp.IdToPiece(n) for n in range(sp.GetPieceSize())]
    fields = {"add_tokenizer_model": "llama", "add_token_list": pieces,
              "add_token_types": [2, 3, 3, *(6 if sp.IsByte(n) else 1 for n in range(3, 420))]}
    save_gguf(tmp_path / "in.gguf", rename(llama, tables.GGUF_LLAMA), "F32", **fields)
    convert(tmp_path / "in.gguf", tmp_path / "out", "fp32")
    check(tmp_path / "out", llama, LLAMA)
    assert Tokenizer.load(tmp_path / "out").kind == "sentencepiece"
    pieces[-1], pieces[-2] = pieces[-2:]
    save_gguf(tmp_path / "in.gguf", rename(llama, tables.GGUF_LLAMA), "F32", **fields)
    refuse(tmp_path / "in.gguf", "tokenizer.model has other tokens than this file")


@pytest.mark.parametrize(("tensors", "fields", "message"), [
    ({}, {"add_rope_dimension_count": 8}, "rope.dimension_count = 8 is not supported, only 16"),
    ({}, {"add_rope_scaling_type": Mock(value="yarn")}, "rope.scaling.type = 'yarn' is not supp"),
    ({}, {"add_float32": ("llama.rope.scaling.factor", 4.0)}, "scaling.factor = 4.0 is not supp"),
    ({}, {"add_uint16": ("split.count", 3), "add_uint32": ("split.no", 1)}, "part 2 of 3: join"),
    ({}, {"add_tokenizer_model": "llama"}, "'llama' .* convert the Hugging Face folder instead"),
    ({"rope_freqs.weight": torch.full((3,), 8.0)}, {}, "another scaling than that of Llama 3.1"),
    ({}, {"order": 1}, "big-endian: convert it with gguf-convert-endian first")])
def test_settings_of_gguf_that_are_refused(tmp_path, llama, tensors, fields, message):
    save_gguf(tmp_path / "in.gguf", rename(llama, tables.GGUF_LLAMA) | tensors, "F16", **fields)
    refuse(tmp_path / "in.gguf", message)


def save_gguf(path: Path, tensors: dict, kind: str, order=0, **more) -> None:
    """A GGUF file. more: values by name of the writer's method. order: of bytes, 1 big-endian."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian(order))
    codes = (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
    fields = {
        "add_block_count": 3, "add_context_length": 8192, "add_embedding_length": 64,
        "add_feed_forward_length": 96, "add_head_count": 4, "add_head_count_kv": 2,
        "add_rope_freq_base": 500000.0, "add_layer_norm_rms_eps": 1e-5,
        "add_tokenizer_model": "gpt2", "add_tokenizer_pre": "smollm",
        "add_token_list": ["<|im_start|>", "<|im_end|>", "<empty_output>", *map(chr, codes)],
        "add_token_types": [3, 3, 3] + [1] * 256, "add_token_merges": ["a zz"]}
    for name, value in (fields | more).items():
        getattr(writer, name)(*value if isinstance(value, tuple) else (value,))
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        values = tensor.numpy().astype(np.float32)
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
        else:  # llama.cpp keeps these in fp32
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_memory_holds_one_shard(tmp_path, tokenizer_model):
    """Of 90 MB, memory holds a shard of 8, beside what is mapped; the hash is that of one file."""
    config = replace(LLAMA, width=512, layers=12, heads=8, kv_heads=8, head_size=64, ffn=512)
    ours = fill(Llama(config), 0)
    sizes = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
             "num_key_value_heads": 8, "intermediate_size": 512}
    save_hf(tmp_path / "in", rename(ours), HF_LLAMA | sizes, tokenizer_model)
    work = """import re, convert_weights
from pathlib import Path
def measure(*args):
    print(re.search("RssAnon:(.*)kB", Path("/proc/self/status").read_text())[1])
    save(*args)
save, convert_weights.save_file, convert_weights.SHARD_BYTES = (
    convert_weights.save_file, measure, 8_000_000)
convert_weights.convert(Path("in"), Path("out"), "fp32")"""
    said = subprocess.run([sys.executable, "-c", work], cwd=tmp_path, check=True, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    used = [int(line) for line in said.splitlines() if line.strip().isdigit()]  # kB, at each shard
    assert len(used) >= 10 and max(used) - min(used) < 40_000
    shards = [file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")]
    assert len(shards) == len(used) and max(shards) < 8_100_000
    convert(tmp_path / "in", tmp_path / "one", "fp32")
    assert check(tmp_path / "out", ours, config) == load_frozen(Llama, tmp_path / "one").sha256


def test_dinov2_in_onnx(tmp_path):
    """Nameless weights are found, scales and the patch bias fold, positions are interpolated."""
    onnx = pytest.importorskip("onnx")
    config = ClipConfig(64, 2, 1, 96, 14, feature_layer=-1, **DINOV2_SETTINGS | {"image_px": 28})
    ours = fill(Clip(config), 2)
    scale, bias = torch.rand(64) + 0.5, torch.randn(64)
    named = rename({name: tensor for name, tensor in ours.items() if name != "positions"},
                   [row if row.how is tables.stack else row._replace(sources=row.sources.split()[0])
                    for row in tables.DINOV2])
    named["backbone.embeddings.cls_token"] = ours["class_token"][None, None]
    named["backbone.embeddings.patch_embeddings.projection.bias"] = named["decoder.bn1.bias"] = bias
    for i, (ours_name, n) in itertools.product(range(2), (("out", 1), ("down", 2))):
        named[f"backbone.encoder.layer.{i}.layer_scale{n}.lambda1"] = scale
        for part, factor in (("weight", scale[:, None]), ("bias", scale)):
            ours[f"layers.{i}.{ours_name}.{part}"] *= factor
    ours["positions"] = torch.cat((torch.ones(1, 64), (2 + bias).expand(4, 64)))  # a flat grid
    named |= {"onnx::Concat_1": torch.ones(1, 1, 64), "onnx::Reshape_2": torch.full((1, 9, 64), 2.)}
    users = [("Concat", "onnx::Concat_1", "/backbone/embeddings/Concat_6"),
             ("Reshape", "onnx::Reshape_2", "/backbone/embeddings/Reshape_1")]
    for name in [name for name, tensor in named.items() if "weight" in name and tensor.ndim == 2]:
        users.append(("MatMul", f"onnx::MatMul_{len(users)}",
                      f"/{name.removesuffix('.weight').replace('.', '/')}/MatMul"))
        named[users[-1][1]] = named.pop(name).T.contiguous()
    tensors = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in named.items()]
    nodes = [onnx.helper.make_node(kind, ["x", name], [path], path) for kind, name, path in users]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "in.onnx")
    convert(tmp_path / "in.onnx", tmp_path / "out", image_px=28, feature_layer=-1)
    check(tmp_path / "out", ours, config, 1e-6)


def test_a_feature_layer_is_of_a_tower_that_has_it(tmp_path, tower, llama, tokenizer_model):
    """Another layer is another base, by its SHA-256; else one line, and nothing is left."""
    folder = save_hf(tmp_path / "in", rename_tower(tower), HF_VISION, None)
    convert(folder, tmp_path / "last", feature_layer=-1)
    convert(folder, tmp_path / "usual")
    last = check(tmp_path / "last", tower, replace(TOWER, feature_layer=-1))
    assert last != check(tmp_path / "usual", tower, TOWER)
    refuse(folder, "feature_layer = -9", feature_layer=-9)
    refuse(folder, "in: template: of no meaning for this source", template="llama3")
    folder = save_hf(tmp_path / "llama", rename(llama), HF_LLAMA, tokenizer_model)
    refuse(folder, "feature_layer and clip: of no meaning", feature_layer=-1, clip=tmp_path)


@pytest.fixture(scope="module")
def release(llama, tower):
    """All tensors of an IAA release, its two adaptors as ours, and its tower."""
    theirs = rename(llama) | rename_tower(tower, "model.vision_tower.vision_tower.vision_model.")
    ours = {name: fill(Adaptor(AdaptorConfig((0, 1)), LLAMA, 128), seed)
            for name, seed in (("mm", 3), ("grounding", 4))}
    return theirs | rename(ours["mm"], tables.IAA["mm"]) | rename(
        ours["grounding"], tables.IAA["grounding"]), ours


def test_official_release(tmp_path, llama, tower, release, tokenizer_model):
    """Llama, tower and both adaptors come out, and the adaptors load onto that base."""
    theirs, ours = release
    config = HF_LLAMA | {"model_type": "IAA", "mm_vision_select_layer": -1}
    save_hf(tmp_path / "in", theirs, config, tokenizer_model, 2)
    convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out" / "llama", llama, LLAMA)
    check(tmp_path / "out" / "clip", tower, replace(TOWER, feature_layer=-1))
    model, place = load_iaa(tmp_path / "out", torch.float32)  # as sample.py opens it
    assert [*model.adaptors] == ["mm", "grounding"] and place == tmp_path / "out" / "llama"
    for name, adaptor in model.adaptors.items():
        assert adaptor.config == AdaptorConfig((0, 1)) and adaptor.prompt["template"] == "llama3"
        assert all(torch.equal(ours[name][n], tensor) for n, tensor in adaptor.state_dict().items())
    for name in ("mm_vision_select_feature", "image_aspect_ratio"):  # our tower knows one each
        folder = save_hf(tmp_path / name, theirs, config | {name: "x"}, tokenizer_model)
        refuse(folder, f"{name} = 'x' is not supported, only pa")


def test_release_without_tower(tmp_path, release, tower, tokenizer_model):
    """It takes a tower converted before; without one it is refused."""
    theirs = {name: tensor for name, tensor in release[0].items() if "vision_tower" not in name}
    save_hf(tmp_path / "in", theirs, HF_LLAMA | {"model_type": "IAA"}, tokenizer_model)
    refuse(tmp_path / "in", "no vision tower inside")
    convert(save_hf(tmp_path / "tower", rename_tower(tower), HF_VISION, None), tmp_path / "clip")
    refuse(tmp_path / "in", "config.json: 'config' is missing", clip=tmp_path / "tower")
    convert(tmp_path / "tower", tmp_path / "last", feature_layer=-1)
    refuse(tmp_path / "in", "feature_layer = -1 is not supported, only -2", clip=tmp_path / "last")
    convert(tmp_path / "in", tmp_path / "out", clip=tmp_path / "clip")
    # Loading compares the tower's SHA-256 with the adaptors'.
    assert [*load_iaa(tmp_path / "out", torch.float32)[0].adaptors] == ["mm", "grounding"]


@pytest.fixture
def llava(tmp_path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The folder that transformers wrote, with a tokenizer; its tensors; transformers' results."""
    folder, added = tmp_path / "llava", {"id": 700, "content": "<image>", "special": True}
    shutil.copytree(GOLDEN / "llava", folder)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    del vision["num_attention_heads"], vision["hidden_act"]  # as in published ones: the defaults
    edit(folder / "config.json", vision_config=vision)
    tokenizer = json.loads((GOLDEN / "tokens_llama3.json").read_text())
    tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder, load_file(folder / "model.safetensors"), load_file(GOLDEN / "llava.safetensors")


def logits(model, tokens, workflow, images=None) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens, workflow, images), workflow)


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.std() > 0.3  # far from constant: the comparison means something
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("names", "files"), [("new", 1), ("old", 2)])
def test_llava(llava, names, files):
    """The logits of transformers, of pictures and of text; the LLM is the frozen one."""
    (folder, tensors, wanted), run = llava, llava[0].parent / "run"
    (folder / "model.safetensors").unlink()
    tensors = {llava_name(name, names): tensor for name, tensor in tensors.items()}
    for n in range(files):
        save_file(dict([*tensors.items()][n::files]), folder / f"model-{n}.safetensors")
    convert(folder, run, "fp32")
    model, place = load_iaa(run, torch.float32)  # as sample.py opens it
    near(logits(model, wanted["tokens"], "mm", wanted["images"]), wanted["seen"])
    pair = wanted["tokens"].reshape(1, -1)  # a row with both pictures
    near(logits(model, pair, "mm", wanted["images"]), wanted["both"])
    near(logits(model, wanted["words"], "mm"), wanted["read"])
    near(logits(model, wanted["words"], "text"), wanted["read"])
    assert model.adaptors["mm"].llm is None
    assert model.adaptors["mm"].prompt == {"template": "llama3", "system": ""}
    assert Tokenizer.load(place).image_id == model.image_token == 700


def llava_name(name: str, names: str) -> str:
    """The name of a tensor in transformers 4.52 and later ("new"), or before ("old")."""
    if names == "old":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("language_model.model.", "language_model.")
    return name.split(".", 1)[1] if "lm_head" in name else f"model.{name}"


def test_llava_on_its_base(llava, tmp_path):
    """With --base the adaptor brings its own LLM: text is the base's, pictures are LLaVA's."""
    folder, tensors, wanted = llava
    config = json.loads((folder / "config.json").read_text())["text_config"] | {
        "model_type": "llama", "vocab_size": 700}  # without LLaVA's token and its padding
    base = {name.removeprefix("language_model."): (tensor * 1.5)[:700]
            for name, tensor in tensors.items() if name.startswith("language_model.")}
    save_hf(tmp_path / "llama", base, config, None)
    shutil.copy(GOLDEN / "tokens_llama3.json", tmp_path / "llama" / "tokenizer.json")
    convert(tmp_path / "llama", tmp_path / "base", "fp32")
    convert(folder, tmp_path / "run", "fp32", base=tmp_path / "base")
    model, place = load_iaa(tmp_path / "run", torch.float32)
    assert place.resolve() == (tmp_path / "base").resolve() and model.image_token == 5
    tokens = wanted["tokens"].masked_fill(wanted["tokens"] == 700, 5)
    near(logits(model, tokens, "mm", wanted["images"]), wanted["seen"][..., :700])
    near(logits(model, wanted["words"], "mm"), wanted["read"][..., :700])
    alone = load_frozen(Llama, tmp_path / "base")
    assert model.adaptors["mm"].config.own_llm and alone.sha256 == model.llama.sha256
    assert not torch.allclose(logits(model, wanted["words"], "text"), wanted["read"][..., :700])
    other = tmp_path / "other"
    save_hf(other, base, config | {"rms_norm_eps": 1e-3}, None)
    shutil.copy(GOLDEN / "tokens_llama3.json", other / "tokenizer.json")
    convert(other, tmp_path / "far", "fp32")
    refuse(folder, "its LLM or tokenizer is of another kind than", base=tmp_path / "far")


@pytest.mark.parametrize(("change", "message"), [
    ({"text_config": {"model_type": "mistral"}}, "language model = 'mistral' is not supported"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower = 'siglip_vision_model'"),
    ({"vision_feature_select_strategy": "full"}, "'full' is not supported, only default"),
    ({"vision_feature_layer": [-2, -5]}, r"config.json: feature_layer = \[-2, -5\]: expected int"),
    ({"text_config": {"num_hidden_layers": 3}}, "layers.2.input_layernorm.weight is missing"),
    ({"model_type": "llava_next"}, "model_type = 'llava_next' is not supported"),
    ({"text_config": "x"}, "config.json: cannot be read"),
    ({"text_config": None}, "convert the same model in Hugging Face's, as llava-hf/llava-1.5-7b")])
def test_llavas_that_are_refused(llava, change, message):
    path = llava[0] / "config.json"
    config = json.loads(path.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps({name: value for name, value in config.items() if value}))
    refuse(llava[0], message)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("down_proj", lambda tensor: None, r"model.layers.1.mlp.down_proj.weight is missing"),
    ("extra", lambda tensor: torch.ones(2), "1 tensors left over, .*: model.layers.1.mlp.extra"),
    ("down_proj", lambda tensor: tensor.T.contiguous(),
     r"model-1-of-1.safetensors: model.layers.1.mlp.down_proj.weight: layers.1.ffn.down.weight "
     r"should be \[64, 96\], they make \[96, 64\]"),
    ("down_proj", lambda tensor: tensor * float("nan"), "down_proj.*: values are not finite"),
    ("down_proj", lambda tensor: tensor + 1e5, "down_proj.*not finite, or too large for F16"),
    ("down_proj", lambda tensor: tensor.to(torch.int8), "of quantised weights only GGUF is read"),
    ("down_proj", lambda tensor: tensor.to(torch.float8_e4m3fn), "weights only GGUF is read")])
def test_tensors_that_are_refused(tmp_path, llama, tokenizer_model, name, change, message):
    """Missing, one too many, transposed, NaN, too large, quantised; and nothing is left."""
    name, theirs = f"model.layers.1.mlp.{name}.weight", rename(llama)
    theirs[name] = change(theirs.get(name))
    theirs = {name: tensor for name, tensor in theirs.items() if tensor is not None}
    save_hf(tmp_path / "in", theirs, HF_LLAMA, tokenizer_model)
    refuse(tmp_path / "in", message, dtype="fp16")


@pytest.mark.parametrize(("name", "kept"), [
    ("hf/model-1-of-1.safetensors", 0.5), ("bin/pytorch_model-1-of-1.bin", 0.5),
    ("meta/consolidated.00.pth", 0.9), ("x.gguf", 0.5), ("x.gguf", 0.01), ("x.onnx", 0.5)])
def test_truncated_files(tmp_path, llama, tokenizer_model, name, kept):
    """One line that names the file, and nothing left behind."""
    path, source = tmp_path / name, tmp_path / name.split("/")[0]
    if source.name == "meta":
        save_meta(source, rename(llama, tables.META_LLAMA))
    elif source.name == "x.gguf":
        save_gguf(path, rename(llama, tables.GGUF_LLAMA), "Q4_1")
    elif source.name == "x.onnx":
        pytest.importorskip("onnx")
        path.write_bytes(b"\xff" * 99)
    else:
        save_hf(source, rename(llama), HF_LLAMA, tokenizer_model, kind=path.suffix[1:])
    os.truncate(path, int(path.stat().st_size * kept))
    refuse(source, f"{path.name}: cannot be read")


def test_a_pipe_in_a_folder_is_not_opened(tmp_path, llama, tokenizer_model):
    path = save_hf(tmp_path / "in", rename(llama), HF_LLAMA, tokenizer_model)
    (path / "model-1-of-1.safetensors").unlink()
    os.mkfifo(path / "model-1-of-1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"in: no model\*.safetensors or pytorch_model"):
        convert(path, tmp_path / "out")
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such file"):
        read_meta_tokenizer(tmp_path / "tokenizer.model", "3")


@pytest.mark.parametrize(("change", "message"), [
    ({"rms_norm_eps": "small"}, "norm_eps = 'small': expected float"),
    ({"hidden_size": "wide"}, "of another kind: TypeError"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type = 'linear' is not supported"),
    ({"rope_scaling": SCALING | {"factor": 0.0}}, "factor = 0.0: must be above 0, and finite"),
    ({"rope_scaling": SCALING | {"original_max_position_embeddings": -1}},
     "original_context = -1: must be a whole number, 1 or more"),
    ({"tie_word_embeddings": True}, "lm_head.weight should equal model.embed_tokens.weight"),
    ({"model_type": "mistral"}, "model_type = 'mistral' is not supported"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised .awq.: of such only GGUF"),
    ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}},
     "rope type = 'yarn' is not supported"),
    ({"num_hidden_layers": 10**6}, "config.json: layers = 1000000, but there are 30 tensors"),
    ({"num_hidden_layers": None}, "config.json: missing .* 'layers'"),
    ({"num_attention_heads": 8}, "layers.0.attention.qkv.weight should be"),
    ({"vocab_size": 419}, "tokenizer has 420 ids, the embedding 419 rows")])
def test_configs_that_are_refused(tmp_path, llama, tokenizer_model, change, message):
    save_hf(tmp_path / "in", rename(llama), HF_LLAMA | change, tokenizer_model)
    refuse(tmp_path / "in", message)


def hostile(folder: Path) -> dict[str, Path]:
    """Small files whose claims are large, or which are code."""
    torch.save({"x": torch.zeros(1).expand(10**9)}, folder / "view.bin")  # stride 0
    (folder / "pickle.bin").write_bytes(b"\x80\x02X\xff\xff\xff\xffa")  # 4 GB of text
    # GLOBAL bytearray, BININT 2 * 10^9, TUPLE1, REDUCE: 2 GB
    (folder / "zeros.bin").write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\0\x945w\x85R.")
    with zipfile.ZipFile(folder / "code.bin", "w") as new:
        new.writestr("code/constants.pkl", b"")
    torch.save({"x": torch.zeros(1)}, folder / "twice.bin")  # torch reads the list at its offset,
    first = (folder / "twice.bin").read_bytes()  # Python the one ahead of the end
    end = first.rindex(b"PK\5\6")
    torch.save({"x": torch.ones(1)}, folder / "second.bin")
    (folder / "twice.bin").write_bytes(first[:end] + (folder / "second.bin").read_bytes())
    (folder / "second.bin").unlink()
    with zipfile.ZipFile(folder / "view.bin") as old, zipfile.ZipFile(
            folder / "packed.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    header = b"GGUF" + np.array([3], "<u4").tobytes()
    array = b"\1\0\0\0\0\0\0\0a" + np.array([9, 0], "<u4").tobytes()  # "a": an array of bytes
    counts = {"tensors": [2**40, 0], "array": [0, 1, 2**40], "numbers": [0, 1, 2**20]}
    for name, values in counts.items():
        parts = [np.array([value], "<u8").tobytes() for value in values]
        content = header + b"".join(parts[:2]) + array * (name != "tensors") + b"".join(parts[2:])
        (folder / f"{name}.gguf").write_bytes(content + bytes(2**20 * (name == "numbers")))
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(("name", "message"), [
    ("view", "tensors of 4000000000 bytes in a file of "), ("pickle", "cannot be read"),
    ("code", "TorchScript, which is code"), ("packed", "not made by torch.save: compressed"),
    ("twice", "not made by torch.save"), ("zeros", "cannot be read"),
    ("tensors", "claim more than it holds"), ("array", "claim more than it holds"),
    ("numbers", "cannot be read")])
def test_cost_is_bounded_by_the_file(tmp_path, name, message):
    """Files of 1 MB at most: one line, in memory that the file's length bounds."""
    (tmp_path / "all").mkdir()
    path = hostile(tmp_path / "all")[name]
    source = tmp_path / path.name
    if path.suffix == ".gguf":
        pytest.importorskip("gguf")
    else:
        source = save_hf(tmp_path / "in", {}, HF_LLAMA, None, 0)
    shutil.move(path, source / "pytorch_model.bin" if source.is_dir() else source)
    tracemalloc.start()
    refuse(source, message)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


PICTURES = {"image_mean": [0.5, 0.25, 0.5], "image_std": [0.5, 0.5, 1.0], "do_normalize": True,
            "crop_size": {"height": 12, "width": 12}, "resample": 3, "rescale_factor": 1 / 255}


@pytest.mark.parametrize(("without", "pictures", "options", "wanted"), [
    ("", {}, {}, "heads: 2, read; activation: quick_gelu, read; mean: (0.48145466, 0.4578275, "
     "0.40821073), assumed; std: (0.26862954, 0.26130258, 0.27577711), assumed"),
    ("num_attention_heads", PICTURES, {"heads": 4}, "heads: 4, given; activation: quick_gelu, read;"
     " mean: (0.5, 0.25, 0.5), read; std: (0.5, 0.5, 1.0), read"),
    ("num_attention_heads", {}, {}, "config.json: no file says the tower's heads: --heads is need"),
    ("hidden_act", {}, {}, "config.json: no file says the tower's activation: --activation is nee"),
    ("", {"crop_size": 24}, {}, r"positions should be \[37, 128\], they make \[10, 128\]"),
    ("", {"num_hidden_layers": 10**6}, {}, "layers = 1000000 is not supported, only 2"),
    ("", {"do_normalize": False}, {}, "preprocessor_config.json: do_normalize = False is not sup"),
    ("", {"image_mean": "x"}, {}, "config.json: mean = 'x': expected tuple"),
    ("", {"image_std": [math.nan, 1.0, 1.0]}, {}, r"std = \(nan, 1.0, 1.0\), .*above 0"),
    ("", {"image_mean": [0.5, 0.5, math.inf]}, {}, "mean, std = .*: three finite numbers each"),
    ("", {}, {"activation": "tanh"}, "activation = 'tanh': quick_gelu or gelu")])
def test_facts_of_a_tower(tmp_path, capsys, tower, without, pictures, options, wanted):
    """Heads, activation, mean, std are read or given, each in a line of output, never guessed."""
    config = {name: value for name, value in HF_VISION.items() if name != without}
    folder = save_hf(tmp_path / "in", rename_tower(tower), config, None)
    file, pictures = ("processor_config.json", {"image_processor": pictures}) if options else (
        "preprocessor_config.json", pictures)  # of transformers 5, and before
    (folder / file).write_text(json.dumps(pictures))
    if wanted.startswith("heads"):
        convert(folder, tmp_path / "out", **options)
        assert capsys.readouterr().out.splitlines()[:4] == wanted.split("; ")
    else:
        refuse(folder, wanted, **options)


def test_command_line(tmp_path, llama, tokenizer_model, monkeypatch, capsys):
    """What a user can cause is one line and exit code 1; --check computes the SHA-256 anew."""
    def error(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
        return last_line(convert_weights.main)

    (tmp_path / "odd").mkdir()
    assert "not a known format" in error(tmp_path / "odd", tmp_path / "out")
    (tmp_path / "odd" / "ViT.pt").touch()
    said = error(tmp_path / "odd" / "ViT.pt", tmp_path / "out")
    assert "TorchScript, which is code: convert the same weights in Hugging Face's" in said
    save_hf(tmp_path / "in", rename(llama), HF_LLAMA, tokenizer_model)
    with monkeypatch.context() as patch:  # SIGTERM halfway, which ends it as Ctrl-C does
        patch.setattr(convert_weights, "make_tensor",
                      lambda *_: signal.raise_signal(signal.SIGTERM))
        assert "stopped; nothing is left in" in error(tmp_path / "in", tmp_path / "out")
    assert "there already" in error(tmp_path / "in", tmp_path / "odd")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "odd"}
    assert "OUT is needed" in error(tmp_path / "in")
    said = error(tmp_path / "nothing", tmp_path / "out")
    assert said == f"convert_weights.py: {tmp_path}/nothing: no such file or folder"
    convert(tmp_path / "in", tmp_path / "out")
    assert "--check takes SOURCE alone" in error(tmp_path / "out", "--check", "--dtype", "fp32")
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", str(tmp_path / "out"), "--check"])
    convert_weights.main()
    assert "as it was converted, by its SHA-256" in capsys.readouterr().out
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"norm_eps": 1e-05', '"norm_eps": 1e-06'))
    assert "out: the weights do not have the SHA-256" in last_line(convert_weights.main)


def test_names_of_the_peers():
    """The tables have the names of the peers' files; none stands in two rows of a table."""
    for rows, known in (
        (tables.META_LLAMA, "tok_embeddings.weight output.weight layers.1.attention.wk.weight "
         "layers.1.attention_norm.weight layers.1.feed_forward.w3.weight"),
        (tables.GGUF_LLAMA, "token_embd.weight output_norm.weight blk.1.attn_output.weight "
         "blk.1.ffn_norm.weight blk.1.ffn_gate.weight"),
        (tables.IAA["mm"], "model.embed_tokens_condition.weight model.mm_projector.2.bias "
         "model.norm_condition.weight model.condition_layers.1.self_attn.q_proj.weight"),
        (tables.IAA["grounding"], "lm_head_condtion_grounding.weight model.mm_projector_G.0.bias "
         "model.condition_layers_grounding.1.mlp.down_proj.weight"),
        (tables.DINOV2, "backbone.encoder.layer.1.attention.attention.query.bias "
         "backbone.encoder.layer.1.layer_scale2.lambda1 backbone.layernorm.weight"),
    ):
        found = [name for row in rows for one in tables.expand(row, 2)
                 for name in one.sources.split()]
        scales = sum("layer_scale" in name for name in found) // 2  # of weight and of bias
        assert len(found) - scales == len({*found}) and {*known.split()} <= {*found}
