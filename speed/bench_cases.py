"""What bench.py measures: every kind of work, its cases, and how one measurement of each is made.

Inference is as `sample.py` runs it: packed weights (packing.py). Training is one step of an adaptor
on a batch with images: forward, backward, AdamW.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from speed.bench_peer import Peer, peer_llama
from speed.costs import decode_bytes, forward_flops, training_flops
from data import UNSCORED, Batch
from generate import generate, prefill
from iaa import DTYPES, IAA, Adaptor, AdaptorConfig, spread
from lean import set_memory_use
from speed.packing import pack
from storage import load_base

KINDS = ("prefill", "decode", "batch", "mixed", "length", "answer", "training")
WORKFLOWS = ("grounding", "mm", "text")  # of a mixed batch
PROMPT, NEW, LENGTHS = 320, 64, (400, 4000)  # tokens
ROWS, ROW, SCORED = 8, 342, 20  # training: rows; tokens of one, at least; scored ones


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that `work` takes, the device's queue included."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_batch(model: IAA, rows: int, text: int, scored: int, seed: int) -> Batch:
    """Random rows of an image and `text` tokens, of which the last `scored` count."""
    generator = torch.Generator().manual_seed(seed)
    clip, words = model.clip.config, model.image_token
    tokens = torch.randint(0, words, (rows, clip.patches + text), generator=generator)
    targets = torch.full_like(tokens, UNSCORED)
    targets[:, -scored:] = tokens.roll(-1, 1)[:, -scored:]
    tokens[:, : clip.patches] = words
    images = torch.randn(rows, 3, clip.image_px, clip.image_px, generator=generator)
    lengths = torch.full((rows,), tokens.shape[1])
    return Batch(tokens, targets, images, None, None, lengths, [])


@dataclass(frozen=True)
class Case:
    """What one row of the table measures."""

    inserted: int = 0  # insertion layers
    peer: bool = False  # transformers' layers in place of ours
    form: str = ""  # of the weights: "" packed in the dtype of the run, "fp32", "int8"
    rows: int = 1
    apart: bool = False  # each row in a batch of its own
    context: int = PROMPT  # tokens of the prompt
    against: str = ""  # the case whose time a token is divided by this one's


class Bench:
    """The frozen weights, and one measurement by kind and case: a call of it returns seconds."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.dtype, self.device = args, DTYPES[args.dtype], args.device
        self.model = self.frozen(self.dtype)  # plain: for training, and for transformers
        self.config, clip = self.model.llama.config, self.model.clip.config
        self.inserted = min(args.inserted, self.config.layers)
        self.row = max(ROW, clip.patches + 100)  # tokens of a training row
        self.packed: dict[str, IAA] = {}  # form -> model with the adaptor "mm"
        self.generator = torch.Generator().manual_seed(0)
        text = self.row - clip.patches
        self.batch = make_batch(self.model, ROWS, text, SCORED, 0).to(self.device)

    def frozen(self, dtype: torch.dtype) -> IAA:
        """LLM and tower from their files."""
        llama, _ = load_base(self.args.llm, dtype, self.device)
        clip, _ = load_base(self.args.vision, dtype, self.device)
        return IAA(llama, clip, llama.config.vocab_size - 1)

    def random_tokens(self, rows: int, length: int) -> Tensor:
        """(rows, length), without the placeholder."""
        words = self.config.vocab_size - 1
        return torch.randint(0, words, (rows, length), generator=self.generator)

    def cases(self, kind: str) -> dict[str, Case]:
        """The rows of a kind by name."""
        n = self.inserted
        theirs = "transformers" if importlib.util.find_spec("transformers") else ""
        ours = {"ours": Case(against=theirs), f"ours, {n} inserted": Case(n)}
        peers = {"transformers": Case(peer=True)} if theirs else {}
        if kind == "decode":
            ours |= {"ours, fp32": Case(form="fp32"),
                     "ours, int8": Case(form="int8", against="ours, fp32")}
        elif kind == "batch":
            return {"1 row": Case(), "16 rows": Case(rows=16, against="1 row")}
        elif kind == "mixed":
            rows = len(WORKFLOWS)
            return {f"{rows} workflows apart": Case(n, rows=rows, apart=True),
                    "in one batch": Case(n, rows=rows, against=f"{rows} workflows apart")}
        elif kind == "length":
            room = self.config.context - NEW - 1
            short, long = (min(length, room) for length in LENGTHS)
            return {f"{short} tokens": Case(context=short),
                    f"{long} tokens": Case(context=long, against=f"{short} tokens")}
        elif kind == "answer":
            prompt = max(PROMPT, self.model.clip.config.patches + 32)
            return {"ours": Case(context=prompt),
                    f"ours, {n} inserted": Case(n, context=prompt, against="ours")}
        elif kind == "training" and theirs:
            ours[f"ours, {n} inserted"] = Case(n, against=f"transformers, {n} inserted")
            peers[f"transformers, {n} inserted"] = Case(n, peer=True)
        return ours | peers

    def adaptor(self, inserted: int) -> Adaptor:
        """A fresh adaptor (fp32, trainable) with its own embedding and head."""
        torch.manual_seed(0)
        config = AdaptorConfig(spread(inserted, self.config.layers))
        adaptor = Adaptor(config, self.config, self.model.clip.config.width).to(self.device)
        adaptor.copy_frozen(self.model.llama)
        return adaptor

    def fast(self, form: str) -> IAA:
        """The model as `sample.py` runs it, in a form of `Case`."""
        if form not in self.packed:
            dtype = torch.float32 if form == "fp32" else self.dtype
            model = self.frozen(dtype)
            model.adaptors["mm"] = self.adaptor(self.inserted).requires_grad_(False).to(dtype)
            pack(model, form == "int8")
            self.packed[form] = model.eval()
        return self.packed[form]

    def build(self, kind: str, name: str) -> Callable[[], float]:
        """The measurement of one case."""
        case = self.cases(kind)[name]
        peer = peer_llama(self.model.llama) if case.peer else None
        if kind == "training":
            return self.build_training(case.inserted, peer)
        model = None if peer else self.fast(case.form)
        workflow = "mm" if case.inserted else "text"
        prompts = self.random_tokens(case.rows, case.context)
        if kind == "prefill":
            return self.build_prefill(model, workflow, prompts.to(self.device), peer)
        if kind == "answer":
            return self.build_answer(model, workflow, prompts.tolist())
        if kind == "mixed":
            return self.build_mixed(model, prompts, case.apart)
        return self.build_decode(model, workflow, prompts, peer)

    def build_prefill(self, model, workflow: str, prompts: Tensor, peer) -> Callable[[], float]:
        """The prompt into a cache, and the logits of its last token."""

        @torch.inference_mode()
        def work():
            if peer is not None:
                return peer(prompts, use_cache=True, logits_to_keep=1)
            cache = model.new_cache(1, prompts.shape[1], workflow)
            return prefill(model, prompts.tolist(), None, workflow, cache)

        return lambda: timed(work, self.device)

    def build_answer(self, model: IAA, workflow: str, prompts: list) -> Callable[[], float]:
        """A picture through the tower and an answer of two tokens, the end's included."""
        image = self.batch.images[:1]
        patches = model.clip.config.patches
        prompts[0][1 : 1 + patches] = [model.image_token] * patches

        @torch.inference_mode()
        def work():
            features = model.clip(image)
            given = features if workflow == "mm" else None
            generate(model, prompts, given, workflow, max_tokens=2)

        return lambda: timed(work, self.device)

    def build_decode(self, model, workflow: str, prompts: Tensor, peer) -> Callable[[], float]:
        """`generate`, from its first new token to its last: NEW steps."""
        rows, tokens = len(prompts), prompts.to(self.device)

        def measure() -> float:
            times = []

            def note(*_) -> None:
                times.append(time.perf_counter())

            if peer is None:
                generate(model, prompts.tolist(), None, workflow, NEW + 1, on_token=note)
            else:
                streamer = SimpleNamespace(put=note, end=lambda: None)  # notes the prompt too
                peer.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False,
                              max_new_tokens=NEW + 1, streamer=streamer)
            return times[-1] - times[-NEW * rows - 1]

        return measure

    def build_mixed(self, model: IAA, prompts: Tensor, apart: bool) -> Callable[[], float]:
        """Decoding of a row of each workflow: in one batch, or one after the other."""
        if "grounding" not in model.adaptors:
            adaptor = self.adaptor(self.inserted).requires_grad_(False)
            model.adaptors["grounding"] = adaptor.to(self.dtype)
            pack(model)
        parts = [(WORKFLOWS, prompts)]
        if apart:
            parts = zip(WORKFLOWS, prompts.split(1), strict=True)
        works = [self.build_decode(model, names, rows, None) for names, rows in parts]
        return lambda: sum(work() for work in works)

    def build_training(self, inserted: int, peer: nn.Module | None) -> Callable[[], float]:
        """Forward, backward and AdamW on one batch with images, memory kept as in train.py."""
        set_memory_use()
        b = self.batch
        adaptor, frozen = self.adaptor(inserted), self.model
        if peer is None:
            model = IAA(frozen.llama, frozen.clip, frozen.image_token)
            model.adaptors["mm"] = adaptor
        else:
            model = Peer(peer, frozen.clip, adaptor, frozen.image_token)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def work():
            loss = model.loss(b.tokens, b.targets, "mm", b.images) / (ROWS * SCORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: timed(work, self.device)

    def tokens(self, kind: str, name: str) -> int:
        """Tokens that one measurement handles."""
        case = self.cases(kind)[name]
        return {"prefill": case.context, "answer": 2, "training": ROWS * self.row}.get(
            kind, NEW * case.rows)

    def least_seconds(self, kind: str, name: str, limits: dict[str, float]) -> float:
        """The time that the machine's limit alone would take (answer: its LLM's prefill alone).

        0 where it is not reckoned: the rows of a mixed batch read weights of their own.
        """
        c, case = self.config, self.cases(kind)[name]
        if kind == "mixed":
            return 0.0
        layers = c.layers + case.inserted
        if kind in ("decode", "batch", "length"):
            size = {"": self.dtype.itemsize, "fp32": 4, "int8": 1}[case.form]
            cache = max(size, self.dtype.itemsize)
            need = decode_bytes(c, layers, case.context + NEW // 2, size, case.rows, cache)
            return NEW * need / (limits["memory, GB/s"] * 1e9)
        if kind == "training":
            flops = training_flops(c, case.inserted, ROWS, self.row, ROWS * SCORED)
        else:
            flops = forward_flops(c, layers, 1, case.context, 1)
        return flops / (limits["matrix product, TFLOP/s"] * 1e12)
