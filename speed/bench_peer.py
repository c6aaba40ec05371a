"""The model as a user of transformers would write it: `bench.py`'s peer, with the same weights.

`peer_llama` is transformers' own Llama, un-fused from ours; `Peer` puts insertion layers between
its layers. The tests hold both to our logits and loss, so that the race is a fair one.

Letters: B rows, T tokens a row, D width, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iaa import Adaptor


def unfused(state: dict[str, Tensor], config) -> dict[str, Tensor]:
    """Our state dict of a Llama -> the names of transformers, q, k, v and gate, up apart again."""
    out = {"model.embed_tokens.weight": state["embedding.weight"],
           "model.norm.weight": state["norm.weight"],
           "lm_head.weight": state["embedding.weight" if config.tied else "head.weight"]}
    sizes = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        parts = state[ours + "attention.qkv.weight"].split(sizes)
        for letter, part in zip("qkv", parts, strict=True):
            out[f"{theirs}self_attn.{letter}_proj.weight"] = part
        parts = state[ours + "ffn.gate_up.weight"].chunk(2)
        for name, part in zip(("gate", "up"), parts, strict=True):
            out[f"{theirs}mlp.{name}_proj.weight"] = part
        out[theirs + "self_attn.o_proj.weight"] = state[ours + "attention.out.weight"]
        out[theirs + "mlp.down_proj.weight"] = state[ours + "ffn.down.weight"]
        out[theirs + "input_layernorm.weight"] = state[ours + "attention_norm.weight"]
        out[theirs + "post_attention_layernorm.weight"] = state[ours + "ffn_norm.weight"]
    return out


def peer_llama(llama) -> nn.Module:
    """`LlamaForCausalLM` with the weights of our Llama, frozen, in its dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c, rope = llama.config, {"rope_type": "default"}
    if c.rope_scaling is not None:
        s = c.rope_scaling
        rope = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_context}
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.ffn, head_dim=c.head_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        max_position_embeddings=c.context, rope_parameters={"rope_theta": c.rope_theta, **rope},
        rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )
    peer = LlamaForCausalLM(config).to(llama.dtype)
    peer.load_state_dict(unfused(llama.state_dict(), c), strict=True)
    return peer.to(llama.device).eval().requires_grad_(False)


class Peer(nn.Module):
    """IAA (structure c, own embedding and head) from transformers' layers, with all logits."""

    def __init__(self, base: nn.Module, clip: nn.Module, ours: Adaptor, image_token: int):
        super().__init__()
        self.base, self.clip, self.image_token = base, clip, image_token
        self.places = ours.config.insertion

        def trained(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module).float().requires_grad_()

        self.layers = nn.ModuleList(trained(base.model.layers[i]) for i in self.places)
        self.embedding, self.norm = trained(base.model.embed_tokens), trained(base.model.norm)
        self.head = trained(base.lm_head)
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())
        self.projector = ours.projector

    def loss(self, tokens: Tensor, targets: Tensor, workflow: str, images: Tensor) -> Tensor:
        """As `IAA.loss`: the sum over scored positions."""
        model, dtype = self.base.model, self.base.dtype
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                features = self.clip(images)
            x = self.embedding(tokens).to(dtype)  # (B, T, D)
            features = self.projector(features.to(dtype)).to(dtype)
            x = x.masked_scatter((tokens == self.image_token)[..., None], features)
            rope = model.rotary_emb(x, torch.arange(tokens.shape[1], device=tokens.device)[None])
            for i, layer in enumerate(model.layers):
                x = layer(x, position_embeddings=rope)
                if i in self.places:
                    x = self.layers[self.places.index(i)](x, position_embeddings=rope)
            logits = self.head(self.norm(x)).flatten(0, 1).float()  # (B T, V)
        wanted = targets.flatten().to(logits.device)
        return F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
