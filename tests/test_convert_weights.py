"""convert_weights.py: a tiny Llama, tower and adaptor come back from every foreign layout."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import convert_weights
from clip import Clip, ClipConfig
from conversion import tensor_tables
from conversion.checkpoint_readers import Named, Source
from conversion.model_configs import meta_config
from conversion.tokenizer_readers import read_sentencepiece
from convert_weights import convert, hash_tensor
from iaa import Adaptor, AdaptorConfig, load_iaa
from llama import SIZES, Llama, LlamaConfig, RopeScaling, rope_frequencies
from tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
LLAMA = LlamaConfig(
    vocab_size=320, width=64, layers=3, heads=4, kv_heads=2, head_size=16, ffn=96, context=8192)
TOWER = ClipConfig(width=128, layers=2, heads=2, ffn=160, patch=4, image_px=12)
HF_LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "vocab_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False,
}
HF_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}


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


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece model of 274 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").write_text("the cat sat on the mat and saw a dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "t"), vocab_size=274,
        byte_fallback=True, minloglevel=2)
    return folder / "t.model"


def interleave(weight, heads: int):
    """Rows as Meta and llama.cpp keep them (LlamaModel.permute of convert_hf_to_gguf.py)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def split_layer(ours: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The seven matrices and two norms of one of our layers, by Hugging Face's short names."""
    qkv, gate_up = ours[f"{prefix}.attention.qkv.weight"], ours[f"{prefix}.ffn.gate_up.weight"]
    width = qkv.shape[1]  # as wide as all queries; keys and values share the rest
    q, k, v = qkv.split((width, (len(qkv) - width) // 2, (len(qkv) - width) // 2))
    gate, up = gate_up.chunk(2)
    return {"q": q, "k": k, "v": v, "gate": gate, "up": up,
            "o": ours[f"{prefix}.attention.out.weight"], "down": ours[f"{prefix}.ffn.down.weight"],
            "norm1": ours[f"{prefix}.attention_norm.weight"],
            "norm2": ours[f"{prefix}.ffn_norm.weight"]}


def renamed(
    ours: dict, ends: dict[str, str], layer: str, names: dict[str, str], turn=None
) -> dict[str, torch.Tensor]:
    """Foreign names for ours: `ends` for those outside layers, `names` for parts of a layer."""
    theirs = {end: ours[name].clone() for name, end in ends.items() if name in ours}
    layers = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("layers."))
    for i in range(layers):
        for part, tensor in split_layer(ours, f"layers.{i}").items():
            if turn and part in "qk":
                tensor = turn(tensor, 4 if part == "q" else 2)
            theirs[f"{layer.format(i=i)}{names[part]}.weight"] = tensor.clone()
    return theirs


HF_PARTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
            "down": "mlp.down_proj", "norm1": "input_layernorm",
            "norm2": "post_attention_layernorm"}


def to_hf(ours: dict) -> dict[str, torch.Tensor]:
    ends = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight"}
    return renamed(ours, ends, "model.layers.{i}.", HF_PARTS)


def to_meta(ours: dict) -> dict[str, torch.Tensor]:
    ends = {"embedding.weight": "tok_embeddings.weight", "norm.weight": "norm.weight",
            "head.weight": "output.weight"}
    parts = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
             "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
             "norm1": "attention_norm", "norm2": "ffn_norm"}
    return renamed(ours, ends, "layers.{i}.", parts, interleave) | {"rope.freqs": torch.ones(8)}


def to_gguf(ours: dict) -> dict[str, torch.Tensor]:
    ends = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
            "head.weight": "output.weight"}
    parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate",
             "up": "ffn_up", "down": "ffn_down", "norm1": "attn_norm", "norm2": "ffn_norm"}
    return renamed(ours, ends, "blk.{i}.", parts, interleave)


def to_hf_clip(ours: dict, prefix: str = "vision_model.") -> dict[str, torch.Tensor]:
    theirs = {f"{prefix}embeddings.position_ids": torch.arange(10)[None],
              f"{prefix}post_layernorm.bias": torch.ones(128)}
    swaps = (("class_token", "embeddings.class_embedding"),
             ("positions", "embeddings.position_embedding.weight"),
             ("patches", "embeddings.patch_embedding"), ("pre_norm", "pre_layrnorm"),
             ("layers.", "encoder.layers."), ("attention_norm", "layer_norm1"),
             ("ffn_norm", "layer_norm2"), (".out.", ".self_attn.out_proj."),
             (".up.", ".mlp.fc1."), (".down.", ".mlp.fc2."))
    for name, tensor in ours.items():
        for old, new in swaps:
            name = name.replace(old, new)
        if "qkv" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                theirs[prefix + name.replace("qkv", f"self_attn.{part}_proj")] = piece.clone()
        else:
            theirs[prefix + name] = tensor.clone()
    return theirs


def save_hf(
    folder: Path, tensors: dict, config: dict, tokenizer_model: Path | None, files=1,
    kind="safetensors",
):
    """A Hugging Face folder of `files` weight files, with an index where there are several."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_model is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    stem, end = ("model", kind) if kind == "safetensors" else ("pytorch_model", "bin")
    home = {}
    for n in range(files):
        name = f"{stem}.{end}" if files == 1 else f"{stem}-{n + 1:05}-of-{files:05}.{end}"
        part = dict(list(tensors.items())[n::files])
        home |= dict.fromkeys(part, name)
        save_file(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
    if files > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": home}))
    return folder


def save_meta(
    folder: Path, tensors: dict, tokenizer_model: Path, shards: int, embedding_dim=0, **params
) -> Path:
    """A folder of Meta's with `shards` model-parallel slices."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": -1,
              "norm_eps": 1e-5, "rope_theta": 500000.0} | params
    (folder / "params.json").write_text(json.dumps(params))
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


def written(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a converted folder, as fp32."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor.float() for name, tensor in tensors.items()}


def check(folder: Path, reference: dict, config, tolerance: float = 0) -> str:
    """The folder loads, and holds the reference's tensors and config. Returns its SHA-256."""
    model = (Llama if isinstance(config, LlamaConfig) else Clip).load(folder)
    assert json.dumps(asdict(model.config)) == json.dumps(asdict(config))  # JSON knows no tuples
    found = written(folder)
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance,
                                   msg=lambda m, n=name: f"{n}: {m}")
    digest = hashlib.sha256(json.dumps(asdict(model.config)).encode())
    for name, tensor in model.state_dict().items():
        hash_tensor(digest, name, tensor)
    assert model.sha256 == digest.hexdigest()
    return model.sha256


# ------------------------------------------------------------------------------------------ Llama


@pytest.mark.parametrize(("files", "kind"), [
    (1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin"), (1, "parameters"), (1, "old")])
def test_hf_llama(tmp_path, llama, tokenizer_model, files, kind):
    """One file or several, of safetensors or torch.save; parameters; the form before torch 1.6."""
    theirs, ending = to_hf(llama), "safetensors" if kind == "safetensors" else "bin"
    if kind == "parameters":
        theirs = {name: torch.nn.Parameter(tensor) for name, tensor in theirs.items()}
    folder = save_hf(tmp_path / "in", theirs, HF_LLAMA, tokenizer_model, files, ending)
    if kind == "old":
        torch.save(theirs, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out", llama, LLAMA)
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert next(iter(tensors.values())).dtype == torch.bfloat16
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 0), (2, 0), (2, 1)])
def test_meta_llama(tmp_path, llama, tokenizer_model, shards, embedding_dim):
    """One file, and slices of each matrix in two."""
    save_meta(tmp_path / "in", to_meta(llama), tokenizer_model, shards, embedding_dim)
    convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out", llama, LLAMA)


PARAMS = {  # Meta's params.json, but for what only trainers need
    "3-8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8},
    "3.1-8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
               "use_scaled_rope": True},
    "3.2-1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8,
               "use_scaled_rope": True},
    "3.2-3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8,
               "use_scaled_rope": True},
}


@pytest.mark.parametrize("name", PARAMS)
def test_meta_settings(name):
    """Meta's own params.json of Llama 3, 3.1 and 3.2 gives the sizes that llama.py names."""
    known = SIZES[name]
    shapes = {"tok_embeddings.weight": (128256, known.width),
              "layers.0.feed_forward.w1.weight": (known.ffn, known.width),
              "output.weight": (128256, known.width)}  # 1B and 3B have a copy there
    params = {"norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256} | PARAMS[name]
    assert meta_config(Named(params), Source(shapes, None)) == known


@pytest.mark.parametrize(("width", "factor", "shards"), [(64, 8.0, 2), (2048, 32.0, 1)])
def test_meta_llama_3_1_and_3_2(tmp_path, tokenizer_model, monkeypatch, width, factor, shards):
    """Scaled rotary, its factor by the width; 1B and 3B have a tied head, whose copy is dropped."""
    versions = []

    def read_meta_tokenizer(path, version):
        versions.append(version)
        return read_sentencepiece(tokenizer_model)

    monkeypatch.setattr(convert_weights, "read_meta_tokenizer", read_meta_tokenizer)
    small = width == 2048
    wanted = LlamaConfig(320, width, 1, 4, 2, width // 4, 96, context=131072, tied=small,
                         rope_scaling=RopeScaling(factor))
    ours = fill(Llama(wanted), 0)
    theirs = to_meta(ours | ({"head.weight": ours["embedding.weight"]} if small else {}))
    folder = save_meta(tmp_path / "in", theirs, tokenizer_model, shards, dim=width, n_layers=1,
                       use_scaled_rope=True)
    convert(folder, tmp_path / "out")
    check(tmp_path / "out", ours, wanted)
    assert versions == ["3.1"]
    if small:
        torch.save(theirs | {"output.weight": theirs["output.weight"] + 1},
                   folder / "consolidated.00.pth")
        with pytest.raises(ValueError, match=r"output.weight should equal tok_embeddings.weight"):
            convert(folder, tmp_path / "out2")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1"])
def test_gguf(tmp_path, llama, kind):
    """The tensors of 1 dimension stay in fp32, as llama.cpp writes them; Q8_0 rounds."""
    save_gguf(tmp_path / "in.gguf", to_gguf(llama), kind)
    convert(tmp_path / "in.gguf", tmp_path / "out", "fp32")
    check(tmp_path / "out", llama, LLAMA, 0.005 if kind in ("Q8_0", "Q5_0") else 0)
    assert Tokenizer.load(tmp_path / "out").encode("ab") == [67, 68]


def test_gguf_of_a_sentencepiece_model(tmp_path, llama, tokenizer_model):
    """Llama 2's and Vicuna's: `tokenizer.model` lies beside the file, or it is said."""
    save_gguf(tmp_path / "in.gguf", to_gguf(llama), "F32", "llama")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model: no such file; .*Hugging Face"):
        convert(tmp_path / "in.gguf", tmp_path / "out")
    shutil.copy(tokenizer_model, tmp_path / "tokenizer.model")
    convert(tmp_path / "in.gguf", tmp_path / "out", "fp32")
    check(tmp_path / "out", llama, LLAMA)
    assert Tokenizer.load(tmp_path / "out").kind == "sentencepiece"


@pytest.mark.parametrize(("add", "value", "message"), [
    ("add_rope_dimension_count", 8, "rope.dimension_count = 8 is not supported, only 16"),
    ("add_rope_scaling_type", "yarn", "rope.scaling.type = 'yarn' is not supported, only none")])
def test_rotary_settings_of_gguf_that_are_refused(tmp_path, llama, add, value, message):
    gguf = pytest.importorskip("gguf")
    value = gguf.RopeScalingType(value) if isinstance(value, str) else value
    save_gguf(tmp_path / "in.gguf", to_gguf(llama), "F16", more=lambda w: getattr(w, add)(value))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in.gguf", tmp_path / "out")


def save_gguf(
    path: Path, tensors: dict, kind: str, tokenizer: str = "gpt2", more=lambda writer: None
) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_context_length(8192)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    codes = (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
    words = [chr(code) for code in codes]
    writer.add_token_list(["<|im_start|>", "<|im_end|>", "<empty_output>", *words])
    writer.add_token_types([3, 3, 3] + [1] * 256)
    writer.add_token_merges(["a zz"])
    more(writer)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        values = tensor.numpy().astype(np.float32)
        if values.ndim == 2:
            writer.add_tensor(name, gguf.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_tied_heads(tmp_path, llama, tokenizer_model):
    """A copy of a tied embedding is dropped, and refused if it is none; Meta's tied head too."""
    tied = {name: tensor for name, tensor in llama.items() if name != "head.weight"}
    theirs = to_hf(llama) | {"lm_head.weight": llama["embedding.weight"].clone()}
    config = HF_LLAMA | {"tie_word_embeddings": True, "rope_theta": None, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
    save_hf(tmp_path / "in", theirs, config, tokenizer_model)
    convert(tmp_path / "in", tmp_path / "out")
    stretched = replace(LLAMA, tied=True, rope_scaling=RopeScaling(8.0))
    check(tmp_path / "out", tied, stretched)
    save_hf(tmp_path / "other", to_hf(llama), config, tokenizer_model)
    with pytest.raises(ValueError, match=r"lm_head.weight should equal model.embed_tokens.weight"):
        convert(tmp_path / "other", tmp_path / "out2")
    theirs = to_meta(tied)
    save_meta(tmp_path / "meta", theirs, tokenizer_model, 2, use_scaled_rope=False)
    convert(tmp_path / "meta", tmp_path / "out3")
    check(tmp_path / "out3", tied, replace(LLAMA, tied=True))


def test_rotary_factors_of_gguf(tmp_path, llama):
    """A table of factors becomes the RopeScaling that makes it; any other table is refused."""
    scaled = replace(LLAMA, rope_scaling=RopeScaling(32.0))
    factors = rope_frequencies(LLAMA) / rope_frequencies(scaled)
    save_gguf(tmp_path / "a.gguf", to_gguf(llama) | {"rope_freqs.weight": factors}, "F16")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    check(tmp_path / "out", llama, scaled)
    save_gguf(tmp_path / "b.gguf", to_gguf(llama) | {"rope_freqs.weight": factors * 2}, "F16")
    with pytest.raises(ValueError, match=r"rope_freqs.weight is neither"):
        convert(tmp_path / "b.gguf", tmp_path / "out2")


def test_memory_does_not_grow_with_the_model(tmp_path, tokenizer_model):
    """Ten layers more, 168 MB of them, cost next to none: memory holds a shard, here of 8 MB."""
    for layers in (1, 11):
        sizes = {"hidden_size": 512, "num_hidden_layers": layers, "num_attention_heads": 8,
                 "num_key_value_heads": 8, "intermediate_size": 2048}
        layer = {f"self_attn.{name}_proj": (512, 512) for name in "qkvo"} | {
            "mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512), "mlp.down_proj": (512, 2048),
            "input_layernorm": (512,), "post_attention_layernorm": (512,)}
        shapes = {"embed_tokens": (320, 512), "norm": (512,)} | {
            f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
        tensors = {f"model.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
        save_hf(tmp_path / f"in{layers}", tensors | {"lm_head.weight": torch.ones(320, 512)},
                HF_LLAMA | sizes, tokenizer_model)
    work = ("import resource, convert_weights\nfrom pathlib import Path\n"
            "convert_weights.SHARD_BYTES = 8_000_000\n"
            "for n in (1, 11):\n    convert_weights.convert(Path(f'in{n}'), Path(f'out{n}'))\n"
            "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n")
    said = subprocess.run([sys.executable, "-c", work], cwd=tmp_path, check=True, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    small, large = (int(line) for line in said.splitlines() if line.isdigit())
    assert large - small < 40e6


def test_shards_are_limited(tmp_path, llama, tokenizer_model, monkeypatch):
    """Many files, the same tensors and the same hash, which every file order and size shares."""
    save_hf(tmp_path / "in", to_hf(llama), HF_LLAMA, tokenizer_model)
    convert(tmp_path / "in", tmp_path / "one")
    whole = check(tmp_path / "one", llama, LLAMA)
    monkeypatch.setattr(convert_weights, "SHARD_BYTES", 50_000)
    convert(tmp_path / "in", tmp_path / "many")
    assert check(tmp_path / "many", llama, LLAMA) == whole
    sizes = [file.stat().st_size for file in (tmp_path / "many").glob("model-*.safetensors")]
    assert len(sizes) > 3 and max(sizes) < 60_000


# ---------------------------------------------------------------------------------- vision towers


@pytest.mark.parametrize("whole", [False, True])
def test_hf_clip(tmp_path, tower, whole):
    """The tower alone, and a CLIPModel with its text half and its own mean and std of pixels."""
    theirs, config, wanted = to_hf_clip(tower), HF_VISION, TOWER
    if whole:
        theirs |= {"text_model.final_layer_norm.weight": torch.ones(4),
                   "visual_projection.weight": torch.ones(4, 4), "logit_scale": torch.ones(())}
        config = {"model_type": "clip", "vision_config": HF_VISION, "hidden_act": "silu"}
        wanted = replace(TOWER, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    folder = save_hf(tmp_path / "in", theirs, config, None)
    if whole:
        (folder / "preprocessor_config.json").write_text(json.dumps(
            {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1.0], "do_center_crop": True}))
    convert(folder, tmp_path / "out")
    check(tmp_path / "out", tower, wanted)


def test_dinov2_in_onnx(tmp_path):
    """Nameless weights are found, scales and the patch bias fold, positions are interpolated."""
    onnx = pytest.importorskip("onnx")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config = ClipConfig(64, 2, 1, 96, patch=14, image_px=28, activation="gelu", norm_eps=1e-6,
                        pre_norm=False, feature_norm=True, feature_layer=-1, mean=mean, std=std)
    state = fill(Clip(config), 2)
    scale, bias = torch.rand(64) + 0.5, torch.randn(64)
    named = {"backbone.embeddings.cls_token": state["class_token"][None, None],
             "backbone.embeddings.patch_embeddings.projection.weight": state["patches.weight"],
             "backbone.embeddings.patch_embeddings.projection.bias": bias,
             "onnx::Concat_1": torch.ones(1, 1, 64), "onnx::Reshape_2": torch.full((1, 9, 64), 2.0),
             "backbone.layernorm.weight": state["feature_norm.weight"],
             "backbone.layernorm.bias": state["feature_norm.bias"], "decoder.bn1.bias": bias}
    users = [("Concat", "onnx::Concat_1", "/backbone/embeddings/Concat_6"),
             ("Reshape", "onnx::Reshape_2", "/backbone/embeddings/Reshape_1")]
    parts = ("query", "key", "value")
    modules = {"norm1": "attention_norm", "norm2": "ffn_norm", "attention.output.dense": "out",
               "mlp.fc1": "up", "mlp.fc2": "down"}
    modules |= {f"attention.attention.{part}": "qkv" for part in parts}
    for i in range(2):
        for theirs, ours in modules.items():
            weight, part_bias = state[f"layers.{i}.{ours}.weight"], state[f"layers.{i}.{ours}.bias"]
            if ours == "qkv":
                n = parts.index(theirs.split(".")[-1])
                weight, part_bias = weight.chunk(3)[n], part_bias.chunk(3)[n]
            name = f"backbone.encoder.layer.{i}.{theirs}"
            named[f"{name}.bias"] = part_bias
            if weight.ndim == 1:
                named[f"{name}.weight"] = weight
                continue
            named[f"onnx::MatMul_{len(named)}"] = weight.T.contiguous()
            path = f"/backbone/encoder/layer.{i}/{theirs.replace('.', '/')}/MatMul"
            users.append(("MatMul", list(named)[-1], path))
        for n, ours in ((1, "out"), (2, "down")):
            named[f"backbone.encoder.layer.{i}.layer_scale{n}.lambda1"] = scale
            state[f"layers.{i}.{ours}.weight"] = state[f"layers.{i}.{ours}.weight"] * scale[:, None]
            state[f"layers.{i}.{ours}.bias"] = state[f"layers.{i}.{ours}.bias"] * scale
    rest = (2 + bias).expand(4, 64)  # a flat grid stays flat
    state["positions"] = torch.cat((torch.ones(1, 64), rest))
    tensors = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in named.items()]
    nodes = [onnx.helper.make_node(kind, ["x", name], [path], path) for kind, name, path in users]
    graph = onnx.helper.make_graph(nodes, "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "in.onnx")
    convert(tmp_path / "in.onnx", tmp_path / "out", image_px=28, feature_layer=-1)
    check(tmp_path / "out", state, config, 1e-6)


def test_a_feature_layer_is_of_a_tower_that_has_it(tmp_path, tower, llama, tokenizer_model):
    """Another layer is another base, by its SHA-256; else one line, and nothing is left."""
    folder, out = save_hf(tmp_path / "in", to_hf_clip(tower), HF_VISION, None), tmp_path / "out"
    convert(folder, tmp_path / "last", feature_layer=-1)
    convert(folder, tmp_path / "usual")
    (last, last_sha), (usual, sha) = map(ClipConfig.read, (tmp_path / "last", tmp_path / "usual"))
    assert (last.feature_layer, usual.feature_layer) == (-1, -2) and last_sha != sha
    with pytest.raises(ValueError, match="feature_layer = -9"):
        convert(folder, out, feature_layer=-9)
    folder = save_hf(tmp_path / "llama", to_hf(llama), HF_LLAMA, tokenizer_model)
    with pytest.raises(ValueError, match="feature_layer: the source is no vision tower"):
        convert(folder, out, feature_layer=-1)
    assert not out.exists()


# ---------------------------------------------------------------------------- the official release


@pytest.fixture(scope="module")
def release(llama, tower):
    """All tensors of an IAA release, its two adaptors as ours, and its tower."""
    config = AdaptorConfig((0, 1))
    seeds = {"mm": 3, "grounding": 4}
    ours = {name: fill(Adaptor(config, LLAMA, 128), seed) for name, seed in seeds.items()}
    theirs = to_hf(llama) | to_hf_clip(tower, "model.vision_tower.vision_tower.vision_model.")
    for name, end, projector in (("mm", "", "mm_projector"),
                                 ("grounding", "_grounding", "mm_projector_G")):
        ends = {"embedding.weight": f"model.embed_tokens_condition{end}.weight",
                "norm.weight": f"model.norm_condition{end}.weight",
                "head.weight": f"lm_head_condtion{end}.weight"}
        ends |= {f"projector.{part}.{kind}": f"model.{projector}.{n}.{kind}"
                 for part, n in (("up", 0), ("down", 2)) for kind in ("weight", "bias")}
        theirs |= renamed(ours[name], ends, f"model.condition_layers{end}.{{i}}.", HF_PARTS)
    return theirs, ours


def test_official_release(tmp_path, llama, tower, release, tokenizer_model):
    """Llama, tower and both adaptors come out, and the adaptors load onto that base."""
    theirs, ours = release
    save_hf(tmp_path / "in", theirs, HF_LLAMA | {"model_type": "IAA"}, tokenizer_model, 2)
    convert(tmp_path / "in", tmp_path / "out")
    base = {"llama": check(tmp_path / "out" / "llama", llama, LLAMA),
            "clip": check(tmp_path / "out" / "clip", tower, TOWER)}
    for name, tensors in ours.items():
        adaptor = Adaptor.load(tmp_path / "out" / name, LLAMA, 128, base, torch.float32)
        assert adaptor.config == AdaptorConfig((0, 1)) and adaptor.prompt["template"] == "llama3"
        found = written(tmp_path / "out" / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    model, place = load_iaa(tmp_path / "out", torch.float32)  # as sample.py opens it
    assert [*model.adaptors] == ["mm", "grounding"] and place == tmp_path / "out" / "llama"


@pytest.mark.parametrize(("change", "layer"), [
    ({"mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}, -1),
    ({"mm_vision_select_feature": "cls_patch"}, None), ({"image_aspect_ratio": "square"}, None)])
def test_features_of_a_release(tmp_path, release, tokenizer_model, change, layer):
    """The layer that its adaptors were trained with is used; what we cannot compute is refused."""
    save_hf(tmp_path / "in", release[0], HF_LLAMA | {"model_type": "IAA"} | change, tokenizer_model)
    if layer is None:
        with pytest.raises(ValueError, match=f"{[*change][0]} = .* is not supported, only pa"):
            convert(tmp_path / "in", tmp_path / "out")
    else:
        convert(tmp_path / "in", tmp_path / "out")
        assert ClipConfig.read(tmp_path / "out" / "clip")[0].feature_layer == layer


def test_release_without_tower(tmp_path, release, tower, tokenizer_model):
    """It takes a tower converted before; without one it is refused."""
    theirs = {name: tensor for name, tensor in release[0].items() if "vision_tower" not in name}
    save_hf(tmp_path / "in", theirs, HF_LLAMA | {"model_type": "IAA"}, tokenizer_model)
    with pytest.raises(ValueError, match="no vision tower inside"):
        convert(tmp_path / "in", tmp_path / "out")
    convert(save_hf(tmp_path / "tower", to_hf_clip(tower), HF_VISION, None), tmp_path / "clip")
    with pytest.raises(ValueError, match="not as convert_weights.py writes it"):  # not converted
        convert(tmp_path / "in", tmp_path / "out", clip=tmp_path / "tower")
    convert(tmp_path / "in", tmp_path / "out", clip=tmp_path / "clip")
    meta = json.loads((tmp_path / "out" / "mm" / "config.json").read_text())
    assert meta["base"]["clip"] == Clip.load(tmp_path / "clip").sha256
    assert not (tmp_path / "out" / "clip").exists()
    assert [*load_iaa(tmp_path / "out", torch.float32)[0].adaptors] == ["mm", "grounding"]
    meta = json.loads((tmp_path / "clip" / "config.json").read_text())
    meta["config"]["width"] = 384
    (tmp_path / "clip" / "config.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="no vision tower of width 128"):
        convert(tmp_path / "in", tmp_path / "again", clip=tmp_path / "clip")


# ------------------------------------------------------------------------------ parity with peers


def test_llama_logits_against_transformers(tmp_path, tokenizer_model):
    """GQA, Llama 3.1's rotary scaling, tied head: a folder of transformers gives its logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters=rope,
        tie_word_embeddings=True, initializer_range=0.3)).eval()
    peer.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    convert(tmp_path / "in", tmp_path / "out", "fp32")
    ours = Llama.load(tmp_path / "out")
    tokens = torch.randint(0, 320, (2, 100))
    with torch.no_grad():
        x = ours(ours.embedding(tokens), ours.rope(torch.arange(100)[None], torch.float32))
        torch.testing.assert_close(ours.logits(x), peer(tokens).logits, rtol=0, atol=1e-4)


def test_clip_features_against_transformers(tmp_path):
    """A folder of transformers with a whole CLIP gives the features of its last layer but one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3,
              "num_attention_heads": 4, "image_size": 12, "patch_size": 4, "hidden_act": "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text)
    peer = transformers.CLIPModel(config).eval()
    peer.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    ours = Clip.load(tmp_path / "out")
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = peer.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(ours(images), wanted, rtol=0, atol=1e-4)


# -------------------------------------------------------------------------------------- bad input


def spoiled(tensors: dict, how: str) -> dict:
    """The tensors with one removed, added, transposed or copied."""
    tensors = dict(tensors)
    name = "model.layers.1.mlp.down_proj.weight"
    if how == "removed":
        del tensors[name]
    elif how == "added":
        tensors["model.layers.3.mlp.down_proj.weight"] = tensors[name].clone()
    else:
        tensors[name] = tensors[name].T.contiguous()
    return tensors


@pytest.mark.parametrize(("how", "message"), [
    ("removed", r"model.layers.1.mlp.down_proj.weight is missing"),
    ("added", r"1 tensors left over, of no known use: model.layers.3.mlp.down_proj.weight"),
    ("transposed", r"ffn.down.weight should be \[64, 96\], "
                   r"but model.layers.1.mlp.down_proj.weight \[96, 64\] gives"),
])
def test_wrong_tensors(tmp_path, llama, tokenizer_model, how, message):
    save_hf(tmp_path / "in", spoiled(to_hf(llama), how), HF_LLAMA, tokenizer_model)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.parametrize(("change", "dtype", "message"), [
    (lambda weight: weight * float("nan"), None, "values are not finite"),
    (lambda weight: weight + 1e5, "fp16", "values are not finite, or too large for F16"),
    (lambda weight: weight.to(torch.int8), None, "torch.int8: of quantised weights only GGUF")])
def test_impossible_values(tmp_path, llama, tokenizer_model, change, dtype, message):
    name = "model.layers.1.mlp.down_proj.weight"
    theirs = to_hf(llama)
    save_hf(tmp_path / "in", theirs | {name: change(theirs[name])}, HF_LLAMA, tokenizer_model)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        convert(tmp_path / "in", tmp_path / "out", dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_more_ids_than_rows(tmp_path, tokenizer_model):
    """A token that was added to the tokenizer alone would fail in training, so it fails here."""
    ours = fill(Llama(replace(LLAMA, vocab_size=273)), 0)
    save_hf(tmp_path / "in", to_hf(ours), HF_LLAMA | {"vocab_size": 273}, tokenizer_model)
    with pytest.raises(ValueError, match="tokenizer has 274 ids, the embedding 273 rows"):
        convert(tmp_path / "in", tmp_path / "out")


def test_no_archive_with_code_is_opened(tmp_path):
    """OpenAI's TorchScript archive: one line says where the same weights are without code."""
    (tmp_path / "ViT-L-14-336px.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match="openai/clip-vit-large-patch14-336"):
        convert(tmp_path / "ViT-L-14-336px.pt", tmp_path / "out")


@pytest.mark.parametrize(("name", "kept"), [
    ("hf/model.safetensors", 0.5), ("hf/model.safetensors", 0.01), ("bin/pytorch_model.bin", 0.5),
    ("meta/consolidated.00.pth", 0.9), ("x.gguf", 0.5), ("x.gguf", 0.01), ("x.onnx", 0.5)])
def test_truncated_files(tmp_path, llama, tokenizer_model, name, kept):
    """One line that names the file, and nothing left behind."""
    path = tmp_path / name
    if name.startswith("hf"):
        save_hf(tmp_path / "hf", to_hf(llama), HF_LLAMA, tokenizer_model)
    elif name.startswith("bin"):
        save_hf(tmp_path / "bin", to_hf(llama), HF_LLAMA, tokenizer_model, kind="bin")
    elif name.startswith("meta"):
        save_meta(tmp_path / "meta", to_meta(llama), tokenizer_model, 1)
    elif name == "x.gguf":
        save_gguf(path, to_gguf(llama), "Q4_1")
    else:
        onnx = pytest.importorskip("onnx")
        tensors = [onnx.numpy_helper.from_array(np.ones((99, 99)), "w")]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    source = path if path.parent == tmp_path else path.parent
    with pytest.raises(ValueError, match=path.name) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    {"rope_theta": 500000.0, "rope_scaling": None},  # transformers 4
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},  # 5
    {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_theta": 500000.0, "rope_parameters": {"rope_type": None}},
])
def test_rotary_base_of_hf(tmp_path, llama, tokenizer_model, change):
    """Wherever the rotary base stands, null is no value."""
    save_hf(tmp_path / "in", to_hf(llama), HF_LLAMA | change, tokenizer_model)
    convert(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out", llama, LLAMA)


@pytest.mark.parametrize(("change", "message"), [
    ({"rms_norm_eps": None}, "norm_eps = None: expected float"),
    ({"max_position_embeddings": "long"}, "must be a whole number, 1 or more"),
    ({"rope_parameters": "llama3"}, "rope_parameters = 'llama3': expected dict"),
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type = 'linear' is not supported"),
    ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
    ({"num_hidden_layers": 2}, "tensors left over"),
    ({"num_hidden_layers": None}, "must be a whole number, 1 or more"),
    ({"num_attention_heads": 8}, "layers.0.attention.qkv.weight should be"),
])
def test_configs_that_are_refused(tmp_path, llama, tokenizer_model, change, message):
    save_hf(tmp_path / "in", to_hf(llama), HF_LLAMA | change, tokenizer_model)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "in", tmp_path / "out")


def test_failure_while_writing_leaves_nothing(tmp_path, llama, tokenizer_model, monkeypatch):
    """A full disk halfway: no output, no temporary folder."""
    save_hf(tmp_path / "in", to_hf(llama), HF_LLAMA, tokenizer_model)
    real, calls = convert_weights.make_tensor, []

    def full_disk(*args):
        calls.append(args)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(convert_weights, "make_tensor", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_command_line(tmp_path, llama, tokenizer_model, monkeypatch):
    """What a user can cause is one line and exit code 1; what is converted says so."""
    def error(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            convert_weights.main()
        assert "\n" not in caught.value.code.strip()
        return caught.value.code

    (tmp_path / "odd").mkdir()
    assert "not a known format" in error(tmp_path / "odd", tmp_path / "out")
    save_hf(tmp_path / "in", to_hf(llama), HF_LLAMA, None)
    assert "tokenizer" in error(tmp_path / "in", tmp_path / "out")
    assert "already there" in error(tmp_path / "in", tmp_path / "odd")
    with monkeypatch.context() as patch:  # Ctrl-C halfway
        patch.setattr(convert_weights, "make_tensor", Mock(side_effect=KeyboardInterrupt))
        (tmp_path / "in" / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
        assert "stopped; nothing is left in" in error(tmp_path / "in", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "odd"}
    command = [sys.executable, convert_weights.__file__, tmp_path / "nothing", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = f"convert_weights.py: {tmp_path}/nothing: no such file or folder\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_marks_of_a_row():
    """{i} is a row for each layer, * one for weight and one for bias."""
    row = tensor_tables.Row("layers.{i}.up.*", "l.{i}.fc.*")
    assert [made[:2] for made in tensor_tables.expand(row, 2)] == [
        ("layers.0.up.weight", "l.0.fc.weight"), ("layers.0.up.bias", "l.0.fc.bias"),
        ("layers.1.up.weight", "l.1.fc.weight"), ("layers.1.up.bias", "l.1.fc.bias")]
    plain = tensor_tables.Row("norm.weight", "a b")
    assert tensor_tables.expand(plain, 2) == [plain]


def test_tables_use_each_tensor_once():
    """No source name stands in two rows of a table, but DINOv2's scales: weight and bias."""
    tables = {name: getattr(tensor_tables, name) for name in
              ("META_LLAMA", "HF_LLAMA", "GGUF_LLAMA", "HF_CLIP", "DINOV2")}
    for name, rows in {**tables, **tensor_tables.IAA}.items():
        names = [source for row in rows for source in row.sources.split()]
        assert len(names) == len(set(names)), name
        assert len({row.target for row in rows}) == len(rows), name
