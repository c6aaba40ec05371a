"""llama.py: parity with transformers, the hook; sizes and files of all models, also clip.py's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import CLIP, LLAMA, LLAMA_TIED, flip_bits, write_base
from safetensors.torch import load_file
from torch import Tensor

import clip
from clip import Clip
from common.files import check_frozen, load_frozen, read_frozen
from conversion.tensor_tables import HF_LLAMA, expand
from iaa import AdaptorConfig
from llama import SIZES, KVCache, Llama, LlamaConfig, RopeScaling, attention_mask

GOLDEN = Path(__file__).parent / "golden"
PADDING, PREFIX = 7, 17  # as in make_golden.py
PLAIN = LlamaConfig(61, 24, 2, 6, 2, 10, 26, 256, rope_theta=100.0)
SCALED = dataclasses.replace(PLAIN, tied=True, rope_scaling=RopeScaling(8.0, original_context=64))


def golden(name: str, config: LlamaConfig) -> tuple[Llama, dict[str, Tensor]]:
    """Our model with a peer's weights, and the peer's results: of one golden file."""
    tensors = load_file(GOLDEN / f"llama_{name}.safetensors")
    peer = {key.removeprefix("weight."): t for key, t in tensors.items() if "weight." in key}
    model = Llama(config).eval()
    rows = (row for line in HF_LLAMA for row in expand(line, config.layers))
    model.load_state_dict({row.target: row.how(config, *map(peer.get, row.sources.split()))
                           for row in rows if row.target in model.state_dict()})
    return model, tensors


@torch.no_grad()
def run(model: Llama, tokens, positions=None, mask=None, cache=None) -> Tensor:
    """Logits (B, T, V) of tokens (B, T)."""
    past = 0 if cache is None else cache.length
    if positions is None:
        positions = torch.arange(past, past + tokens.shape[1])[None]
    if mask is None:
        mask = attention_mask(tokens.shape[1], past)
    x = model.embedding(tokens)
    return model.logits(model(x, model.rope(positions, x.dtype), mask, cache))


def small() -> tuple[Llama, Tensor]:
    """A random model with weights that matter, and tokens (3, 13)."""
    model = Llama(LLAMA).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model, torch.randint(0, LLAMA.vocab_size, (3, 13))


@pytest.mark.parametrize(("name", "config"), [("gqa", PLAIN), ("tied_scaled", SCALED)])
def test_logits_equal_transformers(name, config):
    """fp32 logits within 1e-4 of LlamaForCausalLM's: whole, padded on the left, token by token."""
    model, wanted = golden(name, config)
    assert wanted["full"].std() > 0.5  # logits far from constant: the comparison means something
    tokens, length = wanted["tokens"], wanted["tokens"].shape[1]
    assert attention_mask(length) is None and attention_mask(1, past=7) is None
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(run(model, tokens), wanted["full"], **close)
    positions = torch.arange(length) - torch.tensor([[0], [PADDING]])
    mask = attention_mask(length, segments=positions.clamp(-1, 0))
    assert mask.any(-1).all()  # a pad sees itself: its softmax is never 0 / 0
    logits = run(model, tokens, positions.clamp(min=0), mask)
    torch.testing.assert_close(logits[0], wanted["padded"][0], **close)
    torch.testing.assert_close(logits[1, PADDING:], wanted["padded"][1, PADDING:], **close)
    assert logits.isfinite().all()  # padding too: NaN would spread
    cache = KVCache(config, config.layers, 2, length)
    run(model, tokens[:, :PREFIX], cache=cache)
    steps = [run(model, step, cache=cache) for step in tokens[:, PREFIX:].split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted["cached"], **close)


@pytest.mark.parametrize(("model", "config", "count"), [
    (Llama, SIZES["3-8B"], 8_030_261_248), (Llama, SIZES["3.1-8B"], 8_030_261_248),
    (Llama, SIZES["3.2-1B"], 1_235_814_400), (Llama, SIZES["3.2-3B"], 3_212_749_824),
    (Clip, clip.SIZES["ViT-L/14-336"], 303_505_408)])
def test_named_sizes_have_the_published_number_of_parameters(model, config, count):
    """Counted on the meta device; of the tower without its last norm and projection."""
    with torch.device("meta"):
        parameters = model(config).parameters()
    assert sum(p.numel() for p in parameters) == count
    assert [config.patches for config in clip.SIZES.values()] == [576, 256]  # tokens of a picture


def test_bf16_stays_near_fp32():
    """The model in bf16 gives fp32's logits within bf16's resolution."""
    model, tokens = small()
    wanted = run(model, tokens)
    logits = run(model.bfloat16(), tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().mean() < 0.03 * wanted.abs().mean() + 0.03


def test_the_hook_sees_every_layer_in_order():
    """`after_layer` gets each layer's (i, x_in, x_out); the next layer takes what it returns."""
    model, tokens = small()
    x, seen = model.embedding(tokens), []
    rope = model.rope(torch.arange(13)[None], x.dtype)

    def hook(i, x_in, x_out):
        assert i == len(seen) and x_in is (seen[-1] if seen else x)
        assert torch.equal(x_out, model.layers[i](x_in, rope))
        seen.append(x_out * 2)
        return seen[-1]

    out = model(x, rope, after_layer=hook)
    assert len(seen) == 4 and out is seen[-1]


@pytest.mark.parametrize(("config", "change", "message"), [
    (LLAMA, {"kv_heads": 4}, "heads = 6 must be a multiple of kv_heads = 4"),
    (LLAMA, {"head_size": 7}, "head_size = 7"),
    (LLAMA, {"layers": 0}, "layers = 0: must be a whole number, 1 or more"),
    (LLAMA, {"rope_theta": float("nan")}, "rope_theta = nan: must be above 0"),
    (LLAMA, {"norm_eps": float("inf")}, "norm_eps = inf: must be above 0, and finite"),
    (CLIP, {"image_px": 20}, "image_px = 20 is not a multiple of patch = 6"),
    (CLIP, {"patch": 0}, "patch = 0: must be a whole number, 1 or more"),
    (CLIP, {"heads": 3}, "width = 40 is not a multiple of heads = 3"),
    (CLIP, {"activation": "relu"}, "'relu': quick_gelu or gelu"),
    (CLIP, {"aspect": "crop"}, "'crop': pad"),
    (CLIP, {"feature_layer": 2}, "feature_layer = 2: -3 to -1"),
    (CLIP, {"feature_layer": -4}, "feature_layer = -4"),
    (AdaptorConfig(), {"structure": "d"}, "'d': a, b or c"),
    (AdaptorConfig(), {"insertion": (3, 1)}, r"\[3, 1\]: layer indices, ascending"),
    (AdaptorConfig(), {"insertion": (1, 1)}, "each once"),
    (AdaptorConfig(), {"insertion": (-1,)}, "ascending"),
    (AdaptorConfig(), {"own_llm": True}, "own_embedding = false")])
def test_impossible_sizes_raise(config, change, message):
    """A config that contradicts itself names the key, the value and what is accepted."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("config", [LLAMA, LLAMA_TIED, CLIP], ids=["own head", "tied", "tower"])
def test_written_and_loaded_again(config, tmp_path):
    """Sizes, hash and tensors come back, frozen, in the files' dtype or the one asked for."""
    kind = Clip if config == CLIP else Llama
    model = kind(config).bfloat16()
    write_base(tmp_path / "llm", model, "ab" * 32)
    assert read_frozen(type(config), tmp_path / "llm") == (config, "ab" * 32)
    loaded = load_frozen(kind, tmp_path / "llm")
    again = load_frozen(kind, tmp_path / "llm", torch.float32)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.sha256 == "ab" * 32 and again.stored_dtype == torch.bfloat16
    assert [next(m.parameters()).dtype for m in (loaded, again)] == [torch.bfloat16, torch.float32]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor.float())


def test_a_changed_bit_of_a_frozen_model_is_noticed(tmp_path):
    """Ten places in the tensors, and a size that fits as well: the file is named."""
    folder = tmp_path / "llm"
    write_base(folder, Llama(LLAMA))
    assert check_frozen(Llama, folder) is None
    path, config = folder / "model-00001-of-00001.safetensors", folder / "config.json"
    said = f"^{folder}: the weights do not have the SHA-256 of its config.json: {path.name} or"
    for _ in flip_bits(path):
        with pytest.raises(ValueError, match=said):
            check_frozen(Llama, folder)
    config.write_text(config.read_text().replace("500000.0", "100000.0"))
    with pytest.raises(ValueError, match=said):
        check_frozen(Llama, folder)
