"""The models that speed/bench.py compares ours with, each an optional package.

`transformers`: its own Llama with the weights of ours, and an IAA model from its layers, as a user
of transformers would write one. Tests hold both to our logits and loss, so that the race is fair.
llama.cpp, through the wheel xllamacpp: a GGUF file as it is.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iaa import Adaptor
from llama import Llama, LlamaConfig


def split_weights(state: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Our state dict of a Llama under transformers' names, with q, k, v and gate, up apart."""
    found = {"model.embed_tokens.weight": state["embedding.weight"],
             "model.norm.weight": state["norm.weight"],
             "lm_head.weight": state["embedding.weight" if config.tied else "head.weight"]}
    sizes = [heads * config.head_size for heads in (config.heads, config.kv_heads, config.kv_heads)]
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        parts = state[ours + "attention.qkv.weight"].split(sizes)
        for letter, part in zip("qkv", parts, strict=True):
            found[f"{theirs}self_attn.{letter}_proj.weight"] = part
        parts = state[ours + "ffn.gate_up.weight"].chunk(2)
        for name, part in zip(("gate", "up"), parts, strict=True):
            found[f"{theirs}mlp.{name}_proj.weight"] = part
        found[theirs + "self_attn.o_proj.weight"] = state[ours + "attention.out.weight"]
        found[theirs + "mlp.down_proj.weight"] = state[ours + "ffn.down.weight"]
        found[theirs + "input_layernorm.weight"] = state[ours + "attention_norm.weight"]
        found[theirs + "post_attention_layernorm.weight"] = state[ours + "ffn_norm.weight"]
    return found


def transformers_llama(llama: Llama) -> nn.Module:
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
    peer.load_state_dict(split_weights(llama.state_dict(), c), strict=True)
    return peer.to(llama.device).eval().requires_grad_(False)


class TransformersIAA(nn.Module):
    """IAA (structure c, own embedding and head) from transformers' layers, with all logits.

    Trained weights are fp32 under autocast, where ours casts them itself.
    """

    def __init__(self, base: nn.Module, clip: nn.Module, ours: Adaptor, image_token: int):
        super().__init__()
        self.base, self.clip, self.image_token = base, clip, image_token
        self.insertion = ours.config.insertion

        def trained(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module).float().requires_grad_()

        self.layers = nn.ModuleList(trained(base.model.layers[i]) for i in self.insertion)
        self.embedding, self.norm = trained(base.model.embed_tokens), trained(base.model.norm)
        self.head = trained(base.lm_head)
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())  # apart from a tied one
        self.projector = copy.deepcopy(ours.projector)

    def loss(self, tokens: Tensor, targets: Tensor, workflow: str, images: Tensor) -> Tensor:
        """As `IAA.loss`: the sum over the scored positions."""
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
                if i in self.insertion:
                    x = self.layers[self.insertion.index(i)](x, position_embeddings=rope)
            logits = self.head(self.norm(x)).flatten(0, 1).float()  # (B T, V)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


class LlamaCpp:
    """A GGUF file in llama.cpp, on as many threads as torch has."""

    def __init__(self, gguf: str, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = gguf, context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def seconds(self, prompt: list[int], new: int) -> tuple[float, float]:
        """Of a prompt of token ids, and of `new` tokens after the first, by its own clock."""
        times = self.server.handle_completions({
            "prompt": prompt, "n_predict": new + 1, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False})["timings"]
        decoded = times["predicted_ms"] * new / max(1, times["predicted_n"] - 1)
        return times["prompt_ms"] / 1e3, decoded / 1e3
