"""What a pass must cost, by arithmetic: FLOPs computed, bytes read.

Letters: L frozen layers, N insertion layers.
"""

from llama import SIZES


def layer_weights(config) -> int:
    """Weights of one decoder layer's matrices, its two norms aside."""
    attention = config.width * config.head_size * (2 * config.heads + 2 * config.kv_heads)
    return attention + 3 * config.width * config.ffn


def forward_flops(config, layers: int, rows: int, tokens: int, logits: int) -> int:
    """FLOPs of a forward pass: 2 a weight and token, causal attention, `logits` rows of head."""
    matrices = 2 * rows * tokens * layers * layer_weights(config)
    attention = 2 * rows * tokens**2 * layers * config.heads * config.head_size  # causal: half
    return matrices + attention + 2 * logits * config.width * config.vocab_size


def training_flops(config, inserted: int, rows: int, tokens: int, scored: int) -> int:
    """FLOPs of a step without the vision tower: forward, activations' and weights' gradients."""
    layers = config.layers + inserted
    attention = 2 * rows * tokens**2 * layers * config.heads * config.head_size
    trained = 2 * rows * tokens * inserted * layer_weights(config)
    trained += 2 * scored * config.width * config.vocab_size
    forward = forward_flops(config, layers, rows, tokens, scored)
    return 2 * forward + attention + trained  # attention's backward is twice its forward


def decode_bytes(
    config, layers: int, context: int, itemsize: int, rows: int = 1, cache_itemsize: int = 0
) -> int:
    """Bytes read for one new token of `rows` rows: every layer, the head, keys and values."""
    weights = layers * (layer_weights(config) + 2 * config.width)
    weights += (config.vocab_size + 1) * config.width
    cache = layers * 2 * config.kv_heads * config.head_size * context * rows
    return itemsize * weights + (cache_itemsize or itemsize) * cache


def flops_of_8b(prompt: int = 640) -> str:
    """What insertion costs Llama 3 8B in FLOPs: a picture of 576 tokens and a short question."""
    c, counts = SIZES["3-8B"], []
    for inserted in (0, 8, 14):
        counts.append(forward_flops(c, c.layers + inserted, 1, prompt, 1) / 1e12)
    shares = ", ".join(f"IAA-{n} {count:.1f} ({count / counts[0]:.3f} times)"
                       for n, count in zip((8, 14), counts[1:], strict=True))
    return (f"Llama 3 8B, prefill of {prompt} tokens, TFLOP: {counts[0]:.1f}, {shares}; "
            "the paper measured 1.20 times LLaVA's time with 8")
