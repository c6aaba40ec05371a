"""llama.py: parity with transformers (golden files), causality, cache, masks, errors."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, LLAMA_TIED, flip_bits
from safetensors.torch import load_file
from torch import Tensor

from common.files import check_frozen, load_frozen, read_frozen, sha256_of
from llama import SIZES, KVCache, Llama, LlamaConfig, RopeScaling, attention_mask, rope_frequencies

GOLDEN = Path(__file__).parent / "golden"
PADDING, PREFIX = 7, 17  # as in make_golden.py
PLAIN = LlamaConfig(61, 24, 2, 6, 2, 10, 26, 256, rope_theta=100.0)
SCALED = dataclasses.replace(PLAIN, tied=True, rope_scaling=RopeScaling(8.0, original_context=64))
each_case = pytest.mark.parametrize(("name", "config"), [("gqa", PLAIN), ("tied_scaled", SCALED)])


def golden(name: str, config: LlamaConfig) -> tuple[Llama, dict[str, Tensor]]:
    """Our model with a peer's weights, and the peer's results: of one golden file."""
    tensors = load_file(GOLDEN / f"llama_{name}.safetensors")
    peer = {key.removeprefix("weight."): t for key, t in tensors.items() if "weight." in key}
    state = {"embedding.weight": peer["model.embed_tokens.weight"],
             "norm.weight": peer["model.norm.weight"]}
    if not config.tied:
        state["head.weight"] = peer["lm_head.weight"]
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        qkv = [peer[f"{theirs}self_attn.{letter}_proj.weight"] for letter in "qkv"]
        gate_up = [peer[f"{theirs}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        state[f"{ours}attention.qkv.weight"] = torch.cat(qkv)
        state[f"{ours}ffn.gate_up.weight"] = torch.cat(gate_up)
        for name, source in (("attention.out", "self_attn.o_proj"), ("ffn.down", "mlp.down_proj"),
                             ("attention_norm", "input_layernorm"),
                             ("ffn_norm", "post_attention_layernorm")):
            state[f"{ours}{name}.weight"] = peer[f"{theirs}{source}.weight"]
    model = Llama(config).eval()
    model.load_state_dict(state)
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


def near(a: Tensor, b: Tensor, within: float = 1e-5) -> None:
    """Equal within an absolute and the same relative distance."""
    torch.testing.assert_close(a, b, atol=within, rtol=within)


# Parity


@each_case
def test_logits_equal_transformers(name, config):
    """fp32 logits within 1e-4 of LlamaForCausalLM's: whole, padded on the left, token by token."""
    model, wanted = golden(name, config)
    assert wanted["full"].std() > 0.5  # logits far from constant: the comparison means something
    tokens, length = wanted["tokens"], wanted["tokens"].shape[1]
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(run(model, tokens), wanted["full"], **close)
    positions = torch.arange(length) - torch.tensor([[0], [PADDING]])
    mask = attention_mask(length, segments=positions.clamp(-1, 0))
    logits = run(model, tokens, positions.clamp(min=0), mask)
    torch.testing.assert_close(logits[0], wanted["padded"][0], **close)
    torch.testing.assert_close(logits[1, PADDING:], wanted["padded"][1, PADDING:], **close)
    assert logits.isfinite().all()  # padding too: NaN would spread
    cache = KVCache(config, config.layers, 2, length)
    run(model, tokens[:, :PREFIX], cache=cache)
    steps = [run(model, step, cache=cache) for step in tokens[:, PREFIX:].split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted["cached"], **close)


@pytest.mark.parametrize(
    ("name", "billions"), [("3-8B", 8.03), ("3.1-8B", 8.03), ("3.2-1B", 1.24), ("3.2-3B", 3.21)])
def test_named_sizes_have_the_published_number_of_parameters(name, billions):
    """Counted on the meta device."""
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


def test_rope_frequencies_literal():
    """100^(-j/5); scaled by 8: waves under 16 tokens stay, over 64 are divided, blended between."""
    plain = [1.0, 0.3981072, 0.1584893, 0.0630957, 0.0251189]
    torch.testing.assert_close(rope_frequencies(PLAIN), torch.tensor(plain), atol=1e-6, rtol=0)
    keep = (64 * plain[2] / (2 * math.pi) - 1) / 3  # the third pair turns 1.61 times in 64 tokens
    blended = plain[2] * (keep + (1 - keep) / 8)
    scaled = [plain[0], plain[1], blended, plain[3] / 8, plain[4] / 8]
    torch.testing.assert_close(rope_frequencies(SCALED), torch.tensor(scaled), atol=1e-6, rtol=0)


def test_bf16_stays_near_fp32():
    """The model in bf16 gives fp32's logits within bf16's resolution."""
    model, tokens = small()
    wanted = run(model, tokens)
    logits = run(model.bfloat16(), tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().mean() < 0.03 * wanted.abs().mean() + 0.03


# Who sees whom


def test_a_changed_token_changes_nothing_before_it():
    """Causality: logits before the changed token are the same bits; from it on they differ."""
    model, tokens = small()
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % LLAMA.vocab_size
    before, after = run(model, tokens), run(model, changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


@pytest.mark.parametrize("pieces", [(13,), (1,) * 13, (6, 7), (5, 1, 1, 4, 2)])
def test_cache_equals_no_cache(pieces):
    """However tokens are cut into cached passes, the logits are those of one uncached pass."""
    model, tokens = small()
    cache = KVCache(LLAMA, LLAMA.layers, 3, 13)
    parts = [run(model, piece, cache=cache) for piece in tokens.split(pieces, 1)]
    near(torch.cat(parts, 1), run(model, tokens))
    assert cache.length == 13


def test_segments_equal_each_question_alone():
    """Questions behind one prefix, blind to each other, positions restarted, equal each alone."""
    model, tokens = small()
    tokens = tokens[:1]
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 5])
    positions = torch.tensor([[*range(8), *range(5, 10)]])
    logits = run(model, tokens, positions, attention_mask(13, segments=segments))
    near(logits[:, :8], run(model, tokens[:, :8]))
    near(logits[:, 8:], run(model, torch.cat((tokens[:, :5], tokens[:, 8:]), 1))[:, 5:])


def test_attention_mask_literals():
    """Causal after a past, padding that sees itself, segments, also behind a cache; None where
    causal is enough."""

    def mask(*args, **options):
        return attention_mask(*args, **options).int().tolist()

    assert attention_mask(5) is None and attention_mask(1, past=7) is None
    assert mask(2, past=1) == [[[[1, 1, 0], [1, 1, 1]]]]
    assert mask(3, segments=torch.tensor([[-1, -1, 0], [0, 0, 0]])) == [
        [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]], [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]]
    assert mask(4, segments=torch.tensor([[0, 1, 2, 2]])) == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]]]
    assert mask(2, 6, torch.tensor([[0, 0, 1, 1, 2, -1, 1, 2]])) == [
        [[[1, 1, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]]]]


# Hook, cache, sizes


def test_the_hook_sees_every_layer_in_order():
    """`after_layer` gets each layer's (i, x_in, x_out); the next layer takes what it returns."""
    model, tokens = small()
    x, seen = model.embedding(tokens), []
    rope = model.rope(torch.arange(13)[None], x.dtype)

    def hook(i, x_in, x_out):
        seen.append((i, x_in, x_out))
        return x_out * 2

    out = model(x, rope, after_layer=hook)
    assert [i for i, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] is x
    for (i, x_in, x_out), (_, following, _) in zip(seen, [*seen[1:], (4, out, None)], strict=True):
        assert torch.equal(x_out, model.layers[i](x_in, rope))
        assert torch.equal(following, x_out * 2)


def test_a_cache_too_large_for_the_memory():
    """Torch has no kind of its own for it on a CPU: it becomes one that commands end well with."""
    with pytest.raises(MemoryError, match="no memory for a KV cache of 1 x 1000000000000 tokens"):
        KVCache(LLAMA, 4, 1, 10**12)


def test_cache_misuse_raises():
    """Too many tokens, too many layers, too few layers: each raises and says what was asked for."""
    model, tokens = small()
    for slots, length, message in (
        (4, 12, "4 slots of 12 tokens, asked for slot 0 up to token 13"),
        (3, 13, "3 slots of 13 tokens, asked for slot 3"),
        (5, 13, "the cache has 5 slots, but 4 layers ran"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, tokens, cache=KVCache(LLAMA, slots, 3, length))


@pytest.mark.parametrize(("change", "message"), [
    ({"kv_heads": 4}, "heads = 6 must be a multiple of kv_heads = 4"),
    ({"head_size": 7}, "head_size = 7"),
    ({"layers": 0}, "layers = 0: must be a whole number, 1 or more"),
    ({"rope_theta": float("nan")}, "rope_theta = nan: must be above 0"),
    ({"norm_eps": float("inf")}, "norm_eps = inf: must be above 0, and finite"),
])
def test_impossible_sizes_raise(change, message):
    """A config that contradicts itself names the key and the value."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


@pytest.mark.parametrize("config", [LLAMA, LLAMA_TIED], ids=["own head", "tied, scaled"])
def test_written_and_loaded_again(config, tmp_path, write_base):
    """Sizes, hash and tensors come back, frozen, in the files' dtype or the one asked for."""
    model = Llama(config).bfloat16()
    write_base(tmp_path / "llm", model, "ab" * 32)
    assert read_frozen(LlamaConfig, tmp_path / "llm") == (config, "ab" * 32)
    loaded = load_frozen(Llama, tmp_path / "llm")
    again = load_frozen(Llama, tmp_path / "llm", torch.float32)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.sha256 == "ab" * 32 and again.stored_dtype == loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor.float())


def test_a_changed_bit_of_a_frozen_model_is_noticed(tmp_path, write_base):
    """Ten places in the tensors, and a size that fits as well: the file is named."""
    model, folder = Llama(LLAMA), tmp_path / "llm"
    sha256 = sha256_of(dataclasses.asdict(LLAMA), model.state_dict().items())
    write_base(folder, model, sha256)
    assert check_frozen(Llama, folder) is None
    path, config = folder / "model-00001-of-00001.safetensors", folder / "config.json"
    said = f"^{folder}: the weights do not have the SHA-256 of its config.json: {path.name} or"
    for _ in flip_bits(path):
        with pytest.raises(ValueError, match=said):
            check_frozen(Llama, folder)
    config.write_text(config.read_text().replace("500000.0", "100000.0"))
    with pytest.raises(ValueError, match=said):
        check_frozen(Llama, folder)
