"""llama.py: parity with transformers (golden files), causality, cache, masks, errors."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.files import build
from llama import (
    SIZES,
    FeedForward,
    KVCache,
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    attend,
    attention_mask,
    rope_frequencies,
    rotate,
)

GOLDEN = Path(__file__).parent / "golden"
PADDING, PREFIX = 7, 17  # as in make_golden.py
PLAIN = LlamaConfig(61, 24, 3, 6, 2, 10, 26, 256, rope_theta=100.0)
SCALED = dataclasses.replace(PLAIN, tied=True, rope_scaling=RopeScaling(8.0, original_context=64))
CASES = {"gqa": dataclasses.replace(PLAIN, layers=2),
         "tied_scaled": dataclasses.replace(SCALED, layers=2)}


def from_peer(weights: dict[str, torch.Tensor], config: LlamaConfig) -> Llama:
    """Our model with a peer's weights: q, k, v joined in this order, gate and up too."""
    model = Llama(config)
    state = {"embedding.weight": weights["model.embed_tokens.weight"],
             "norm.weight": weights["model.norm.weight"]}
    if not config.tied:
        state["head.weight"] = weights["lm_head.weight"]
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        layer = {name.removeprefix(theirs): t for name, t in weights.items() if theirs in name}
        qkv = [layer[f"self_attn.{letter}_proj.weight"] for letter in "qkv"]
        gate_up = [layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]
        state[ours + "attention.qkv.weight"] = torch.cat(qkv)
        state[ours + "attention.out.weight"] = layer["self_attn.o_proj.weight"]
        state[ours + "ffn.gate_up.weight"] = torch.cat(gate_up)
        state[ours + "ffn.down.weight"] = layer["mlp.down_proj.weight"]
        state[ours + "attention_norm.weight"] = layer["input_layernorm.weight"]
        state[ours + "ffn_norm.weight"] = layer["post_attention_layernorm.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden(case: str) -> tuple[Llama, dict[str, torch.Tensor]]:
    """The model and the results of one golden file."""
    tensors = load_file(GOLDEN / f"llama_{case}.safetensors")
    weights = {name.removeprefix("weight."): t
               for name, t in tensors.items() if name.startswith("weight.")}
    return from_peer(weights, CASES[case]), tensors


@torch.no_grad()
def run(model: Llama, tokens, positions=None, mask=None, cache=None) -> torch.Tensor:
    """Logits (B, T, V) of tokens (B, T)."""
    if positions is None:
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + tokens.shape[1])[None]
    if mask is None:
        mask = attention_mask(tokens.shape[1], 0 if cache is None else cache.length)
    x = model.embedding(tokens)
    return model.logits(model(x, model.rope(positions, x.dtype), mask, cache))


def small(seed: int = 0, **changes) -> tuple[Llama, torch.Tensor]:
    """A random model with weights that matter, and tokens (3, 13)."""
    torch.manual_seed(seed)
    model = Llama(dataclasses.replace(PLAIN, **changes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model, torch.randint(0, 61, (3, 13))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    """fp32 logits within 1e-4 of LlamaForCausalLM: GQA, tied or not, Llama 3.1's rotary scaling."""
    model, wanted = golden(case)
    torch.testing.assert_close(run(model, wanted["tokens"]), wanted["full"], atol=1e-4, rtol=0)
    assert wanted["full"].std() > 0.5  # logits far from constant: the comparison means something


@pytest.mark.parametrize("case", CASES)
def test_left_padded_batch_equals_transformers(case):
    """Padded on the left, a row keeps transformers' logits within 1e-4; padding stays finite."""
    model, wanted = golden(case)
    tokens = wanted["tokens"].shape[1]
    positions = torch.arange(tokens) - torch.tensor([[0], [PADDING]])
    mask = attention_mask(tokens, segments=positions.clamp(-1, 0))
    logits = run(model, wanted["tokens"], positions.clamp(min=0), mask)
    torch.testing.assert_close(logits[0], wanted["padded"][0], atol=1e-4, rtol=0)
    own = slice(PADDING, None)
    torch.testing.assert_close(logits[1, own], wanted["padded"][1, own], atol=1e-4, rtol=0)
    assert logits.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_cached_decode_equals_transformers(case):
    """Token after token behind a cached prefix: transformers' own cached logits, within 1e-4."""
    model, wanted = golden(case)
    tokens = wanted["tokens"]
    cache = KVCache(model.config, model.config.layers, 2, tokens.shape[1])
    run(model, tokens[:, :PREFIX], cache=cache)
    steps = [run(model, step, cache=cache) for step in tokens[:, PREFIX:].split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted["cached"], atol=1e-4, rtol=0)


def test_a_changed_token_changes_nothing_before_it():
    """Causality: logits before the changed token are the same bits; from it on they differ."""
    model, tokens = small()
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 61
    before, after = run(model, tokens), run(model, changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert (before[:, 8:] != after[:, 8:]).any(-1).all()


@pytest.mark.parametrize("pieces", [(13,), (1,) * 13, (6, 7), (5, 1, 1, 4, 2)])
def test_cache_equals_no_cache(pieces):
    """However tokens are cut into cached passes, the logits are those of one uncached pass."""
    model, tokens = small()
    cache = KVCache(model.config, model.config.layers, 3, 13)
    parts = [run(model, piece, cache=cache) for piece in tokens.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), run(model, tokens), atol=1e-5, rtol=1e-5)
    assert cache.length == 13


def test_left_padding_with_cache_equals_each_row_alone():
    """Rows of 13, 9 and 4 tokens, padded, in three cached passes, equal each row alone."""
    model, tokens = small()
    positions = torch.arange(13) - torch.tensor([[0], [4], [9]])  # below 0: padding
    cache, parts = KVCache(model.config, model.config.layers, 3, 13), []
    for piece in tokens.split((10, 2, 1), 1):
        past, end = cache.length, cache.length + piece.shape[1]
        mask = attention_mask(piece.shape[1], past, positions[:, :end].clamp(-1, 0))
        parts.append(run(model, piece, positions[:, past:end].clamp(min=0), mask, cache))
    logits = torch.cat(parts, 1)
    for row, start in enumerate((0, 4, 9)):
        alone = run(model, tokens[row : row + 1, start:])
        torch.testing.assert_close(logits[row : row + 1, start:], alone, atol=1e-5, rtol=1e-5)


def test_segments_equal_each_question_alone():
    """Questions behind one prefix, blind to each other, positions restarted, equal each alone."""
    model, tokens = small()
    tokens = tokens[:1]
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 5])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9]])
    logits = run(model, tokens, positions, attention_mask(13, segments=segments))
    first = run(model, tokens[:, :8])
    second = run(model, torch.cat((tokens[:, :5], tokens[:, 8:]), 1))
    torch.testing.assert_close(logits[:, :8], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[:, 8:], second[:, 5:], atol=1e-5, rtol=1e-5)


def test_attention_mask_literals():
    """Causal after a past, padding that sees itself, segments; None where causal is enough.

    Last, ask.py's: prefix 0 0, questions 1 1 and 2, padding, then a new column of each question.
    """
    assert attention_mask(5) is None and attention_mask(1, past=7) is None
    assert attention_mask(2, past=1)[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    padded = attention_mask(3, segments=torch.tensor([[-1, -1, 0], [0, 0, 0]]))
    assert padded[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert padded[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    blind = attention_mask(4, segments=torch.tensor([[0, 1, 2, 2]]))
    assert blind[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    asked = attention_mask(2, 6, torch.tensor([[0, 0, 1, 1, 2, -1, 1, 2]]))
    assert asked.int().tolist() == [[[[1, 1, 1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0, 0, 1]]]]


def test_the_hook_sees_every_layer_in_order():
    """`after_layer` gets each layer's (i, x_in, x_out); the next layer takes what it returns."""
    model, tokens = small()
    x, seen = model.embedding(tokens), []
    rope = model.rope(torch.arange(13)[None], x.dtype)

    def hook(i, x_in, x_out):
        seen.append((i, x_in, x_out))
        return x_out * 2

    out = model(x, rope, after_layer=hook)
    assert [i for i, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] is x
    assert torch.equal(seen[1][1], seen[0][2] * 2) and torch.equal(out, seen[2][2] * 2)
    for i, x_in, x_out in seen:
        assert torch.equal(x_out, model.layers[i](x_in, rope))


def test_cache_misuse_raises():
    """Too many tokens, too many layers, too few layers: each raises and says what was asked for."""
    model, tokens = small()
    with pytest.raises(ValueError, match=r"3 slots of 12 tokens, asked for slot 0 up to token 13"):
        run(model, tokens, cache=KVCache(PLAIN, 3, 3, 12))
    with pytest.raises(ValueError, match=r"2 slots of 13 tokens, asked for slot 2"):
        run(model, tokens, cache=KVCache(PLAIN, 2, 3, 13))
    with pytest.raises(ValueError, match=r"cache has 4 slots, 3 layers ran"):
        run(model, tokens, cache=KVCache(PLAIN, 4, 3, 13))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, "heads = 6 is not a multiple of kv_heads = 4"),
        ({"head_size": 7}, "head_size = 7"),
        ({"layers": 0}, "layers = 0: must be 1 or more"),
        ({"vocab_size": -3}, "vocab_size = -3"),
    ],
)
def test_impossible_sizes_raise(change, message):
    """A config that contradicts itself names the key and the value."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)


def test_config_survives_json():
    """asdict and back, as a config.json does it, gives an equal config."""
    assert build(LlamaConfig, json.loads(json.dumps(dataclasses.asdict(SCALED)))) == SCALED


def test_rope_frequencies_literal():
    """100^(-j/5); scaled by 8: waves under 16 tokens stay, over 64 are divided, blended between."""
    plain = [1.0, 0.3981072, 0.1584893, 0.0630957, 0.0251189]
    torch.testing.assert_close(rope_frequencies(PLAIN), torch.tensor(plain), atol=1e-6, rtol=0)
    keep = (64 * plain[2] / (2 * math.pi) - 1) / 3  # the third pair turns 1.61 times in 64 tokens
    blended = plain[2] * (keep + (1 - keep) / 8)
    scaled = [plain[0], plain[1], blended, plain[3] / 8, plain[4] / 8]
    torch.testing.assert_close(rope_frequencies(SCALED), torch.tensor(scaled), atol=1e-6, rtol=0)


def test_rotation_is_a_rotation():
    """Lengths stay; a product of query and key depends on their positions' distance alone."""
    model, _ = small()
    q, k = torch.randn(2, 1, 1, 1, 10)

    def product(m, n):
        turned_q = rotate(q, model.rope(torch.tensor([[m]]), torch.float32))
        turned_k = rotate(k, model.rope(torch.tensor([[n]]), torch.float32))
        assert turned_q.norm() == pytest.approx(q.norm().item(), rel=1e-5)
        return (turned_q * turned_k).sum().item()

    assert product(11, 5) == pytest.approx(product(106, 100), abs=1e-4)
    assert product(11, 5) != pytest.approx(product(11, 6), abs=1e-2)


def test_grouped_heads_equal_repeated_heads():
    """`attend` is softmax(q k / sqrt(E)) v with every key head repeated, one query or many."""
    for tokens, seen in ((1, 11), (11, 11)):
        q, (k, v) = torch.randn(2, 6, tokens, 10), torch.randn(2, 2, 3, seen, 10)
        mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
        keys, values = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ keys.mT / math.sqrt(10)).masked_fill(~mask, -math.inf)
        wanted = scores.softmax(-1) @ values
        torch.testing.assert_close(attend(q, k, v, None), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attend(q, k, v, mask[None, None]), wanted, atol=1e-5, rtol=1e-5)


def test_every_module_keeps_the_stated_shape():
    """Each part called on distinct sizes: B 3, T 13, D 24, H 6, K 2, E 10, F 26, V 61."""
    model, tokens = small()
    x = model.embedding(tokens)
    rope = model.rope(torch.arange(13)[None], x.dtype)
    layer = model.layers[0]
    assert x.shape == (3, 13, 24)
    assert [t.shape for t in rope] == [(1, 1, 13, 10)] * 2
    assert rotate(torch.randn(3, 8, 13, 10), rope).shape == (3, 8, 13, 10)
    assert RMSNorm(24, 1e-5)(x).shape == (3, 13, 24)
    assert layer.attention(x, rope, None, None).shape == (3, 13, 24)
    assert FeedForward(PLAIN).gate_up(x).shape == (3, 13, 52) and layer.ffn(x).shape == (3, 13, 24)
    assert layer(x, rope).shape == (3, 13, 24)
    assert model.logits(x).shape == (3, 13, 61) and model.logits(x[:, -1]).shape == (3, 61)
    keys, values = KVCache(PLAIN, 3, 3, 17).extend(*torch.randn(2, 3, 2, 13, 10))
    assert keys.shape == values.shape == (3, 2, 13, 10)


def test_rms_norm_formula():
    """x / sqrt(mean x^2 + eps) * weight, in fp32 even for bf16 input."""
    norm = RMSNorm(7, 1e-5)
    norm.weight.data = torch.arange(1.0, 8)
    x = torch.randn(2, 7)
    wanted = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * torch.arange(1.0, 8)
    torch.testing.assert_close(norm(x), wanted)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    huge = torch.full((1, 7), 3e38).bfloat16() / 1e19  # its square overflows nothing in fp32
    assert norm(huge).isfinite().all()


def test_bf16_stays_near_fp32():
    """The model in bf16 gives fp32's logits within bf16's resolution, cached or not."""
    model, tokens = small()
    wanted = run(model, tokens)
    half = model.bfloat16()
    logits = run(half, tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - wanted).abs().mean() < 0.03 * wanted.abs().mean() + 0.03


def test_checkpointed_layers_give_the_same_gradients():
    """`recompute` changes memory, not one bit of the result or of the gradients."""
    model, tokens = small()
    gradients = []
    for recompute in (False, True):
        for layer in model.layers:
            layer.recompute = recompute
        model.zero_grad()
        x = model.embedding(tokens)
        model.logits(model(x, model.rope(torch.arange(13)[None], x.dtype))).pow(2).mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "billions"), [("3-8B", 8.03), ("3.1-8B", 8.03), ("3.2-1B", 1.24), ("3.2-3B", 3.21)]
)
def test_named_sizes_have_the_published_number_of_parameters(name, billions):
    """Counted on the meta device."""
    with torch.device("meta"):
        model = Llama(SIZES[name])
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
