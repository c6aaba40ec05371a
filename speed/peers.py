"""The models that speed/bench.py compares ours with, each an optional package.

`transformers`: its own Llama of the size of ours, and an IAA model of its layers, as a user of
transformers would write one. Weights are random: the time does not depend on their values.
llama.cpp, through the wheel xllamacpp: a GGUF file as it is.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iaa import IAA
from llama import Llama

Work = Callable[[], tuple[float, ...]]  # measures once; returns the seconds of each figure


def transformers_llama(llama: Llama) -> nn.Module:
    """`LlamaForCausalLM` of the size of our Llama, frozen, in its dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = llama.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.ffn, head_dim=c.head_size,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,  # `generate` never stops early
    )
    with llama.device:
        peer = LlamaForCausalLM(config).to(llama.dtype)
    return peer.eval().requires_grad_(False)


def transformers_answering(llama: Llama, prompt: Tensor, new: int) -> Work:
    """Seconds of a prompt (1, T) up to its first new token, and of `new` tokens after it."""
    peer = transformers_llama(llama)

    def work() -> tuple[float, float]:
        times = []  # of the prompt's arrival, then of each token
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()),
                                   end=lambda: None)
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                      max_new_tokens=new + 1, streamer=streamer)
        return times[1] - times[0], times[-1] - times[1]

    return work


def llama_cpp_answering(gguf: Path, prompt: list[int], new: int) -> Work:
    """As `transformers_answering` for a GGUF file; torch's number of threads, llama.cpp's clock."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(gguf), len(prompt) + new + 8, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.verbosity = 0
    server = xllamacpp.Server(params)
    request = {"prompt": prompt, "n_predict": new + 1, "temperature": 0, "ignore_eos": True,
               "cache_prompt": False}

    def work() -> tuple[float, float]:
        times = server.handle_completions(request)["timings"]
        decoded = times["predicted_ms"] * new / (times["predicted_n"] - 1)
        return times["prompt_ms"] / 1e3, decoded / 1e3

    return work


def write_q8_0(source: Path, target: Path) -> None:
    """Write a GGUF file again with all its matrices in Q8_0: 8 bits, a scale for 32 weights."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader, q8_0 = GGUFReader(source), GGMLQuantizationType.Q8_0
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        # The writer makes the header, "GGUF.*", and the architecture by itself.
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) > 1:  # norms stay
            writer.add_tensor(tensor.name, quants.quantize(values, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TransformersIAA(nn.Module):
    """An adaptor (structure c, own embedding and head) of transformers' layers, with all logits.

    Trained weights are fp32 under autocast, where ours casts them itself.
    """

    def __init__(self, ours: IAA, workflow: str):
        super().__init__()
        self.clip, self.image_token, self.dtype = ours.clip, ours.image_token, ours.llama.dtype
        adaptor, self.llama = ours.adaptors[workflow], transformers_llama(ours.llama)

        def trained(module: nn.Module) -> nn.Module:
            return copy.deepcopy(module).float().requires_grad_()

        model, layers = self.llama.model, []
        for i, layer in enumerate(model.layers):
            layers += [layer, trained(layer)] if i in adaptor.config.insertion else [layer]
        model.layers, model.config.num_hidden_layers = nn.ModuleList(layers), len(layers)
        model.embed_tokens, model.norm = trained(model.embed_tokens), trained(model.norm)
        self.llama.lm_head, self.projector = trained(self.llama.lm_head), trained(adaptor.projector)

    def loss(self, tokens: Tensor, targets: Tensor, workflow: str, images: Tensor) -> Tensor:
        """As `IAA.loss`: the sum over the scored positions."""
        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                features = self.clip(images)
            x = self.llama.model.embed_tokens(tokens).to(self.dtype)  # (B, T, D)
            features = self.projector(features.to(self.dtype)).to(self.dtype)
            x = x.masked_scatter((tokens == self.image_token)[..., None], features)
            logits = self.llama(inputs_embeds=x, use_cache=False).logits.float()  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
