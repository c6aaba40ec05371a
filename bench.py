"""Speed and memory: ours beside transformers on the same weights, both beside the machine's limits.

- Every figure is a median over `--runs`; the variants take turns within a run, so whatever else the
  machine does hits all of them, and a ratio is the median of the ratios within a run.
- Share of limit: FLOPs that must be done / time / measured rate of matrix products (prefill,
  training), bytes that must be read / time / measured bandwidth (decode).
- The peer is `LlamaForCausalLM` with the same weights, un-fused (decode: its `generate`); for
  training, `bench_peer.Peer`: this IAA model from transformers' layers, with all logits, and
  autocast over fp32 weights where ours casts them itself.
- Peak memory: of a process of its own, from after the weights are built; on a GPU what the
  allocator counted.

    python bench.py --llm weights/smollm2 --vision weights/dinov2 [--runs 5] [--json bench.json]
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn

from bench_peer import Peer, peer_llama
from iaa import DTYPES, IAA, Adaptor, AdaptorConfig, load_base, spread

KINDS = ("prefill", "decode", "training")
PROMPT, NEW = 320, 64  # tokens
ROWS, TEXT, SCORED = 8, 116, 20  # training: rows, tokens a row behind its image, scored ones


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


def decode_bytes(config, layers: int, context: int, itemsize: int) -> int:
    """Bytes that one new token must read: every layer, the head, the context's keys and values."""
    weights = layers * (layer_weights(config) + 2 * config.width)
    weights += (config.vocab_size + 1) * config.width
    return itemsize * (weights + layers * 2 * config.kv_heads * config.head_size * context)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, the device's queue included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Bench:
    """The frozen weights, and one measurement by kind and variant: a call of it returns seconds."""

    def __init__(self, args: argparse.Namespace):
        dtype, self.device = DTYPES[args.dtype], args.device
        llama, _ = load_base(args.llm, dtype, self.device)
        clip, _ = load_base(args.vision, dtype, self.device)
        self.model = IAA(llama, clip, llama.config.vocab_size - 1)
        self.config, self.itemsize = llama.config, dtype.itemsize
        self.inserted = min(args.inserted, self.config.layers)
        self.row = clip.config.patches + TEXT  # tokens of a training row
        variants = {"ours": 0, f"ours, {self.inserted} inserted": self.inserted}
        if importlib.util.find_spec("transformers"):
            variants |= {name.replace("ours", "transformers"): n for name, n in variants.items()}
        self.variants = variants  # name -> insertion layers
        generator = torch.Generator().manual_seed(0)
        words = self.config.vocab_size - 1
        self.prompt = torch.randint(0, words, (PROMPT,), generator=generator).tolist()
        tokens = torch.randint(0, words, (ROWS, self.row), generator=generator)
        targets = torch.full_like(tokens, -100)
        targets[:, -SCORED:] = tokens.roll(-1, 1)[:, -SCORED:]
        tokens[:, 1 : 1 + clip.config.patches] = self.model.image_token
        side = clip.config.image_px
        images = torch.randn(ROWS, 3, side, side, generator=generator)
        self.batch = [t.to(self.device) for t in (tokens, targets, images)]

    def names(self, kind: str) -> list[str]:
        """Variants of a kind: transformers has no insertion layers, but `Peer` trains them."""
        return [name for name, inserted in self.variants.items()
                if kind == "training" or name.startswith("ours") or not inserted]

    def adaptor(self, inserted: int) -> Adaptor:
        """A fresh adaptor (fp32, trainable) with its own embedding and head."""
        torch.manual_seed(0)
        config = AdaptorConfig(spread(inserted, self.config.layers))
        adaptor = Adaptor(config, self.config, self.model.clip.config.width).to(self.device)
        adaptor.copy_frozen(self.model.llama)
        return adaptor

    def build(self, kind: str, name: str) -> Callable[[], float]:
        """The measurement of one variant."""
        peer = peer_llama(self.model.llama) if name.startswith("transformers") else None
        if kind == "training":
            return self.build_training(self.variants[name], peer)
        workflow = "mm" if self.variants[name] else "text"
        if workflow == "mm":
            self.model.adaptors["mm"] = self.adaptor(self.variants[name]).to(self.model.llama.dtype)
        build = self.build_prefill if kind == "prefill" else self.build_decode
        return build(workflow, peer)

    def build_prefill(self, workflow: str, peer: nn.Module | None) -> Callable[[], float]:
        """The prompt into a cache, and the logits of its last token."""
        tokens = torch.tensor([self.prompt], device=self.device)

        @torch.inference_mode()
        def work():
            if peer is not None:
                return peer(tokens, use_cache=True, logits_to_keep=1)
            x = self.model(tokens, workflow, cache=self.model.new_cache(1, PROMPT, workflow))
            return self.model.logits(x[:, -1], workflow)

        return lambda: timed(work, self.device)

    def build_decode(self, workflow: str, peer: nn.Module | None) -> Callable[[], float]:
        """`generate`, from its first new token to its last: NEW steps."""
        tokens = torch.tensor([self.prompt], device=self.device)

        def measure() -> float:
            times = []

            def note(*_) -> None:
                times.append(time.perf_counter())

            if peer is None:
                self.model.generate([self.prompt], workflow=workflow, max_tokens=NEW + 1,
                                    on_token=note)
            else:
                streamer = SimpleNamespace(put=note, end=lambda: None)  # notes the prompt too
                peer.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                              max_new_tokens=NEW + 1, streamer=streamer)
            return times[-1] - times[-NEW - 1]

        return measure

    def build_training(self, inserted: int, peer: nn.Module | None) -> Callable[[], float]:
        """Forward, backward and AdamW on one batch with images."""
        tokens, targets, images = self.batch
        adaptor, frozen = self.adaptor(inserted), self.model
        if peer is None:
            model = IAA(frozen.llama, frozen.clip, frozen.image_token)
            model.adaptors["mm"] = adaptor
        else:
            model = Peer(peer, frozen.clip, adaptor, frozen.image_token)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def work():
            loss = model.loss(tokens, targets, "mm", images) / (ROWS * SCORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: timed(work, self.device)

    def tokens(self, kind: str) -> int:
        """Tokens that one measurement handles."""
        return {"prefill": PROMPT, "decode": NEW, "training": ROWS * self.row}[kind]

    def least_seconds(self, kind: str, name: str, limits: dict[str, float]) -> float:
        """The time that the machine's limit alone would take."""
        c, n = self.config, self.variants[name]
        if kind == "decode":
            need = decode_bytes(c, c.layers + n, PROMPT + NEW // 2, self.itemsize)
            return NEW * need / (limits["memory, GB/s"] * 1e9)
        if kind == "prefill":
            flops = forward_flops(c, c.layers + n, 1, PROMPT, 1)
        else:
            flops = training_flops(c, n, ROWS, self.row, ROWS * SCORED)
        return flops / (limits["matrix product, TFLOP/s"] * 1e12)


def measure_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """One look at the machine: matrix products in the dtype and in fp32, reading a large tensor."""
    out, side = {}, 2048
    for name, kind in (("", dtype), (" fp32", torch.float32)):
        a = torch.randn(side, side, device=device).to(kind)
        timed(lambda a=a: a @ a, device)
        rate = 2 * side**3 / timed(lambda a=a: a @ a, device)
        out[f"matrix product{name}, TFLOP/s"] = rate / 1e12
    big = torch.zeros(2**26, device=device)  # 256 MB
    timed(big.sum, device)
    out["memory, GB/s"] = big.numel() * 4 / timed(big.sum, device) / 1e9
    return out


def peak_memory(work: Callable[[], float], device: str) -> int:
    """Bytes at the peak of two calls of `work`; on a CPU (Linux) of the whole process."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the weights
    else:
        torch.cuda.reset_peak_memory_stats()
    work()
    work()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def memory_elsewhere(args: argparse.Namespace, kind: str, name: str) -> int:
    """`peak_memory` of one variant in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", kind, name]
    for key in ("llm", "vision", "dtype", "device", "inserted", "threads"):
        command += [f"--{key}", str(getattr(args, key))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {kind}, {name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout)


def compare(bench: Bench, kind: str, runs: int) -> dict[str, list[float]]:
    """Seconds by variant, a value a run; they take turns, after one call each to warm up."""
    works = {name: bench.build(kind, name) for name in bench.names(kind)}
    seconds = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            taken = work()
            if run:
                seconds[name].append(taken)
    return seconds


def rows_of(bench: Bench, kind: str, seconds: dict[str, list[float]], limits: dict) -> list[dict]:
    """The table's rows of one kind: tokens/s, share of the limit, and the peer's time over ours."""
    out = []
    for name, times in seconds.items():
        row = {"what": kind, "model": name, "tokens_per_s": bench.tokens(kind) / median(times),
               "share_of_limit": bench.least_seconds(kind, name, limits) / median(times)}
        ours = name.startswith("ours")
        peer = seconds.get(name.replace("ours", "transformers")) if ours else None
        ratio = None if peer is None else median(b / a for a, b in zip(times, peer, strict=True))
        out.append({**row, "ours_to_theirs": ratio})
    return out


def show(result: dict) -> str:
    """The result as a Markdown table under the machine's limits."""
    limits = ", ".join(f"{name}: {value:.3g}" for name, value in result["limits"].items())
    lines = [limits, "",
             "| what | model | tokens/s | share of limit | ours / theirs | peak memory, MB |",
             "|---|---|--:|--:|--:|--:|"]
    for row in result["rows"]:
        ratio = "" if row["ours_to_theirs"] is None else f"{row['ours_to_theirs']:.2f}"
        memory = f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else ""
        lines.append(f"| {row['what']} | {row['model']} | {row['tokens_per_s']:,.1f} | "
                     f"{row['share_of_limit']:.0%} | {ratio} | {memory} |")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default="weights/smollm2", help="folder of the frozen LLM [%(default)s]")
    add("--vision", default="weights/dinov2", help="folder of the vision tower [%(default)s]")
    add("--runs", type=int, default=5, help="measurements of each variant [%(default)s]")
    add("--dtype", choices=DTYPES, default="bf16", help="of frozen weights, compute [%(default)s]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="[%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU [%(default)s]")
    add("--only", choices=KINDS, action="append", help="leave the others out (may be repeated)")
    add("--no-memory", action="store_true", help="leave peak memory out: a process a row")
    add("--json", type=Path, help="write the result here too")
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    """Measure and print; returns what `--json` writes."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    if args.memory_of:
        print(peak_memory(bench.build(*args.memory_of), args.device))
        return {}
    looks, times = [], {}
    for kind in args.only or KINDS:
        looks.append(measure_limits(DTYPES[args.dtype], args.device))
        times[kind] = compare(bench, kind, args.runs)
        looks.append(measure_limits(DTYPES[args.dtype], args.device))
    limits = {name: median(look[name] for look in looks) for name in looks[0]}
    rows = [row for kind, seconds in times.items() for row in rows_of(bench, kind, seconds, limits)]
    for row in rows if not args.no_memory else ():
        row["peak_bytes"] = memory_elsewhere(args, row["what"], row["model"])
    settings = ("llm", "vision", "dtype", "device", "threads", "runs")
    about = {name: str(getattr(args, name)) for name in settings}
    result = {"about": {**about, "torch": torch.__version__}, "limits": limits, "rows": rows}
    print(show(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
