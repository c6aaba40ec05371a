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

    python bench.py [--llm FOLDER] [--vision FOLDER] [--runs 5] [--json bench.json]
    python bench.py --profile --only decode          where the time goes, in place of all this
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch.autograd import DeviceType

from speed.bench_cases import KINDS, Bench, timed
from speed.costs import flops_of_8b
from common.files import one_line, write_json
from iaa import DTYPES
from evaluation.text_retention import perplexity
from tokenization.tokenizer import Tokenizer

PARTS = {  # of a pass: its operators, by what their names hold; all others are "the rest"
    "matrices": ("::mm", "::addmm", "_linear_pointwise", "int8pack_mm", "::convolution"),
    "attention": ("bmm", "softmax", "dot_product"),
    "optimizer": ("adamw",),
}


def measure_limits(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The machine: matrix products in the dtype and in fp32, reading memory; the best of 5."""
    out, side = {}, 2048
    for name, kind in (("", dtype), (" fp32", torch.float32)):
        a = torch.randn(side, side, device=device).to(kind)
        best = min(timed(lambda a=a: a @ a, device) for _ in range(5))
        out[f"matrix product{name}, TFLOP/s"] = 2 * side**3 / best / 1e12
    big = torch.ones(2**26, device=device)  # 256 MB, written: pages of zeros may share one page
    best = min(timed(big.sum, device) for _ in range(5))
    out["memory, GB/s"] = big.numel() * 4 / best / 1e9
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
        last = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ChildProcessError(f"the memory of {kind}, {name}: {last}")
    return int(done.stdout)


def compare(bench: Bench, kind: str, runs: int) -> dict[str, list[float]]:
    """Seconds by variant, a value a run; they take turns, after one call each to warm up."""
    works = {name: bench.build(kind, name) for name in bench.cases(kind)}
    seconds = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            taken = work()
            if run:
                seconds[name].append(taken)
    return seconds


def rows_of(bench: Bench, kind: str, seconds: dict[str, list[float]], limits: dict) -> list[dict]:
    """The table's rows of one kind: rate, share of the limit, speed relative to another case."""
    out, cases = [], bench.cases(kind)
    for name, times in seconds.items():
        against, rate = cases[name].against, bench.tokens(kind, name) / median(times)
        row = {"what": kind, "model": name, "tokens_per_s": rate, "against": against,
               "share_of_limit": bench.least_seconds(kind, name, limits) / median(times)}
        if against:
            pairs = zip(times, seconds[against], strict=True)
            more = bench.tokens(kind, name) / bench.tokens(kind, against)
            row["times_as_fast"] = more * median(theirs / ours for ours, theirs in pairs)
        out.append(row)
    return out


def show(result: dict) -> str:
    """The result as a Markdown table under the machine's limits."""
    limits = ", ".join(f"{name}: {value:.3g}" for name, value in result["limits"].items())
    lines = [limits, "",
             "| what | case | tokens/s | share of limit | times as fast as |",
             "|---|---|--:|--:|--:|"]
    for row in result["rows"]:
        ratio = f"{row['times_as_fast']:.2f} {row['against']}" if row["against"] else ""
        share = f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else ""
        lines.append(f"| {row['what']} | {row['model']} | {row['tokens_per_s']:,.1f} | "
                     f"{share} | {ratio} |")
    for name, value in result["perplexity"].items():
        lines.append(f"perplexity, {name}: {value:.3f}")
    return "\n".join([*lines, flops_of_8b()])


def profile(work: Callable[[], float], device: str) -> dict[str, float]:
    """Shares of a call's time by `PARTS`; "Python": what is left, the profiler's own work too.

    Of a decoding call the prompt is a part. On a GPU: shares of the time that its kernels take.
    """
    work()
    with torch.profiler.profile(acc_events=True) as seen:
        wall = timed(work, device) * 1e6
    which = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    found = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in seen.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel of its own: the operator that launched it has its time
        part = next((part for part, names in PARTS.items() if any(n in event.key for n in names)),
                    "the rest")
        found[part] += getattr(event, which)
    spent = sum(found.values())
    whole = max(wall, spent) if device == "cpu" else spent
    return {part: time / whole for part, time in found.items()} | {"Python": 1 - spent / whole}


def show_profile(bench: Bench, kinds: list[str]) -> None:
    """Print where the time of every case goes."""
    names = [*PARTS, "the rest", "Python"]
    print("\n".join(f"| {' | '.join(row)} |" for row in (
        ("what", "case", *names), ("---", "---", *["--:"] * len(names)))))
    for kind in kinds:
        for name in bench.cases(kind):
            shares = profile(bench.build(kind, name), bench.device)
            print(f"| {kind} | {name} | {' | '.join(f'{shares[n]:.0%}' for n in names)} |",
                  flush=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", default="weights/smollm2", help="folder of the frozen LLM [%(default)s]")
    add("--vision", default="weights/dinov2-84px", help="folder of the vision tower [%(default)s]")
    add("--runs", type=int, default=5, help="measurements of each variant [%(default)s]")
    add("--dtype", choices=DTYPES, default="bf16", help="of frozen weights, compute [%(default)s]")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="[%(default)s]")
    add("--inserted", type=int, default=8, help="insertion layers [%(default)s]")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU [%(default)s]")
    add("--only", choices=KINDS, action="append", help="leave the others out (may be repeated)")
    add("--profile", action="store_true", help="where the time of each case goes, nothing else")
    add("--no-memory", action="store_true", help="leave peak memory out: a process a row")
    add("--text", type=Path, help="a text: its perplexity too, packed and int8")
    add("--json", type=Path, help="write the result here too")
    add("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.runs, args.threads) < 1:
        raise ValueError(f"--runs {args.runs}, --threads {args.threads}: 1 or more")
    if args.profile and (args.json or args.text):
        raise ValueError("--profile prints its table alone: without --json and --text")
    if args.text and not args.text.read_text().strip():
        raise ValueError(f"{args.text}: no text in it")
    return args


@one_line("bench.py")
def main(argv: list[str] | None = None) -> dict:
    """Measure and print; returns what `--json` writes."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    if args.memory_of:
        print(peak_memory(bench.build(*args.memory_of), args.device))
        return {}
    if args.profile:
        show_profile(bench, args.only or KINDS)
        return {}
    looks, times = [], {}
    for kind in args.only or KINDS:
        looks.append(measure_limits(DTYPES[args.dtype], args.device))
        times[kind] = compare(bench, kind, args.runs)
        looks.append(measure_limits(DTYPES[args.dtype], args.device))
    limits = {name: median(look[name] for look in looks) for name in looks[0]}
    rows = [row for kind, seconds in times.items() for row in rows_of(bench, kind, seconds, limits)]
    settings = ("llm", "vision", "dtype", "device", "threads", "runs")
    scores = {}
    if args.text:
        words, text = Tokenizer.load(args.llm), args.text.read_text()
        scores = {name: perplexity(bench.fast(form), words, text)
                  for name, form in ((args.dtype, ""), ("int8", "int8"))}
    about = {name: str(getattr(args, name)) for name in settings}
    result = {"about": {**about, "torch": torch.__version__}, "limits": limits, "rows": rows,
              "perplexity": scores}
    print(show(result))
    if not args.no_memory:
        print("\n| what | case | peak memory, MB |\n|---|---|--:|")
    try:
        for row in rows if not args.no_memory else ():
            row["peak_bytes"] = memory_elsewhere(args, row["what"], row["model"])
            print(f"| {row['what']} | {row['model']} | {row['peak_bytes'] / 1e6:,.0f} |",
                  flush=True)
    finally:  # what took long stays where this fails
        if args.json:
            write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
