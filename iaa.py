"""IAA, the Inner-Adaptor Architecture (arXiv 2408.12902): a frozen Llama learns to see.

    pixels -> CLIP (frozen) -> projector -+    P image features stand where the P placeholders stood
    tokens -> EL_mm (own embedding) ------+-> x
    x -> [frozen layer 0 -> insertion layer] -> [frozen layer 1] -> ... -> x
    x -> LH_mm (own norm and head) -> logits

- An *adaptor* holds all that is trained: projector, embedding, insertion layers, gates, norm, head.
  One frozen Llama and one frozen CLIP serve any number of adaptors, each a *workflow* by its name
  ("mm", "grounding", ...).
- The workflow "text" uses none of it: same code path, no hook, the frozen embedding and head. Its
  logits are those of plain Llama, bit for bit, whatever adaptors are loaded or trained.
- Structures (Fig. 3, Table 5): c puts insertion layers in series (Eq. 2), b adds their gated
  output, a runs them as a side stream (Eq. 1). A gate starts at zero, so a and b start as the
  frozen model, exactly.
- An adaptor may bring its own trained copy of the whole LLM (`own_llm`): the LLaVA-1.5 baseline of
  Tables 2, 3 and 8.

Letters: B batch, T tokens, D width, V vocabulary, N images, P image tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import Clip
from llama import (
    AfterLayer,
    DecoderLayer,
    KVCache,
    Linear,
    Llama,
    LlamaConfig,
    RMSNorm,
    Rope,
    attention_mask,
    new_embedding,
)
from mixed import Mixed, rows_by_name

TEXT = "text"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that users type
LOSS_ROWS = 1024  # scored positions whose logits are held at once: 2 GB in training, at 128K words
OFFICIAL_14_OF_32 = (0, 1, 5, 6, 10, 11, 15, 16, 20, 21, 25, 26, 30, 31)  # as released: i mod 5 < 2


def spread(number: int, layers: int) -> tuple[int, ...]:
    """The frozen layers that `number` insertion layers follow: evenly from first to last.

    >>> spread(8, 30)
    (0, 4, 8, 12, 17, 21, 25, 29)
    """
    if not 0 <= number <= layers:
        raise ValueError(f"insertion = {number}: 0 to {layers} layers can be inserted in {layers}")
    if (number, layers) == (14, 32):
        return OFFICIAL_14_OF_32
    return tuple(round(n * (layers - 1) / max(number - 1, 1)) for n in range(number))


@dataclass(frozen=True)
class AdaptorConfig:
    """What an adaptor is made of. Raises ValueError for an impossible combination."""

    insertion: tuple[int, ...] = ()  # frozen layers that an insertion layer follows, ascending
    structure: str = "c"  # "a", "b" or "c" of Fig. 3
    own_embedding: bool = True  # EL_mm
    own_head: bool = True  # LH_mm, with its norm
    own_llm: bool = False  # a trained copy of the whole LLM (LLaVA baseline), nothing inserted

    def __post_init__(self):
        object.__setattr__(self, "insertion", tuple(self.insertion))
        if self.structure not in ("a", "b", "c"):
            raise ValueError(f"structure = {self.structure!r}: a, b or c (Fig. 3)")
        places = list(self.insertion)
        if places != sorted(set(places)) or any(i < 0 for i in places):
            raise ValueError(f"insertion = {places}: layer indices, ascending, each once")
        if self.own_llm and (self.insertion or self.own_embedding or self.own_head):
            raise ValueError("own_llm has its own embedding and head, takes no insertion layers: "
                             "set insertion = 0, own_embedding = false, own_head = false")


class Projector(nn.Module):
    """Vision features to the LLM's width: the two-layer MLP of LLaVA-1.5."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.up = Linear(vision_width, width, bias=True)
        self.down = Linear(width, width, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, D_vision) -> (N, P, D)."""
        return self.down(F.gelu(self.up(features)))


class Adaptor(nn.Module):
    """All that one workflow adds to the frozen models."""

    def __init__(self, config: AdaptorConfig, llama: LlamaConfig, vision_width: int):
        super().__init__()
        if config.insertion and config.insertion[-1] >= llama.layers:
            raise ValueError(f"insertion layer after layer {config.insertion[-1]}, "
                             f"but the LLM ends at {llama.layers - 1}")
        self.config = config
        vocab, width = llama.vocab_size, llama.width
        self.projector = Projector(vision_width, width)
        self.embedding = new_embedding(vocab, width) if config.own_embedding else None
        self.layers = nn.ModuleList(DecoderLayer(llama) for _ in config.insertion)
        gates = len(config.insertion) if config.structure in "ab" else 0
        self.gates = nn.ModuleList(Linear(width, width) for _ in range(gates))
        self.norm = RMSNorm(width, llama.norm_eps) if config.own_head else None
        self.head = Linear(width, vocab) if config.own_head else None
        self.llm = Llama(llama) if config.own_llm else None
        self.places = config.insertion

    @torch.no_grad()
    def copy_frozen(self, llama: Llama) -> None:
        """Start every part as its frozen counterpart, gates at zero; the projector stays random."""
        if self.embedding is not None:
            self.embedding.weight.copy_(llama.embedding.weight)
        for index, layer in zip(self.config.insertion, self.layers, strict=True):
            layer.load_state_dict(llama.layers[index].state_dict())  # values, not storage
        for gate in self.gates:
            gate.weight.zero_()
        if self.head is not None:
            self.norm.load_state_dict(llama.norm.state_dict())
            self.head.weight.copy_((llama.embedding if llama.head is None else llama.head).weight)
        if self.llm is not None:
            self.llm.load_state_dict(llama.state_dict())

    def after_layer(
        self, rope: Rope, mask: Tensor | None, cache: KVCache | None, last_only: bool = False
    ) -> AfterLayer:
        """The hook that `Llama.forward` calls: insertion layers at their places (Eqs. 1, 2).

        last_only: the last one returns its last token alone, as `DecoderLayer`.
        """
        number = {index: n for n, index in enumerate(self.places)}
        structure, side = self.config.structure, None

        def hook(i: int, x_in: Tensor, x_out: Tensor) -> Tensor:
            nonlocal side
            if i not in number:
                return x_out
            n = number[i]
            layer, last = self.layers[n], last_only and n + 1 == len(self.layers)
            if structure == "c":
                return layer(x_out, rope, mask, cache, last)  # Eq. 2
            x = x_out if structure == "b" else x_in if side is None else side
            side = layer(x, rope, mask, cache, last)  # a: its own stream (Eq. 1)
            return (x_out[:, -1:] if last else x_out) + self.gates[n](side)

        return hook


def is_workflow(name: str) -> bool:
    """Whether an adaptor may have this name: no method of the ModuleDict that holds it has it."""
    return name.isidentifier() and name != TEXT and not hasattr(nn.ModuleDict(), name)


def check_workflow(name: str, adaptors: Iterable[str]) -> None:
    """ValueError that lists the known names, unless `name` is "text" or one of `adaptors`."""
    known = [TEXT, *adaptors]
    if name not in known:
        raise ValueError(f"no adaptor named {name!r}; there are: {', '.join(known)}")


class IAA(nn.Module):
    """One frozen Llama, one frozen CLIP; `self.adaptors["mm"] = adaptor` adds a workflow."""

    def __init__(self, llama: Llama, clip: Clip, image_token: int):
        super().__init__()
        if not (isinstance(llama, Llama) and isinstance(clip, Clip)):
            raise ValueError(f"the LLM is a {type(llama).__name__}, the vision tower a "
                             f"{type(clip).__name__}: they should be a Llama and a Clip")
        self.llama = llama.requires_grad_(False)
        self.clip = clip.requires_grad_(False)
        self.image_token = image_token  # the placeholder's id
        self.adaptors = nn.ModuleDict()

    def adaptor(self, workflow: str | Sequence[str]) -> Adaptor | Mixed | None:
        """The named adaptor; None for "text". Raises ValueError that lists the known names.

        A sequence names one workflow for each row of a batch, rows of one workflow side by side.
        """
        if workflow == TEXT:
            return None
        if not isinstance(workflow, str):
            parts = [(self.adaptor(name), rows) for name, rows in rows_by_name(workflow)]
            return Mixed(parts, self.llama)
        check_workflow(workflow, self.adaptors)
        return self.adaptors[workflow]

    def llm(self, adaptor: Adaptor | Mixed | None) -> Llama:
        """The LLM that runs under an adaptor, or None: the frozen one, unless it brings its own."""
        return self.llama if adaptor is None or adaptor.llm is None else adaptor.llm

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64, each image as P placeholders
        workflow: str | Sequence[str] = TEXT,  # of the batch, or of each row
        images: Tensor | None = None,  # (N, 3, S, S), in order of their placeholders; or (N, P,
        # D_vision), what `self.clip` made of them: the tower then does not run
        positions: Tensor | None = None,  # (B, T), default 0 .. T - 1 after the cache
        mask: Tensor | None = None,  # from `attention_mask`, default causal
        cache: KVCache | None = None,
        last_only: bool = False,  # whoever wants the next token alone: less for the last layer
    ) -> Tensor:  # (B, T, D), last_only: (B, 1, D) hidden states for `logits`
        """The workflow's hidden states (Fig. 2).

        Raises ValueError for images that do not fit their placeholders: not in training on a GPU,
        where looking would wait for it, and rows come from `data.collate`, which has looked.
        """
        adaptor = self.adaptor(workflow)
        llama = self.llm(adaptor)
        own_embedding = None if adaptor is None else adaptor.embedding
        embedding = llama.embedding if own_embedding is None else own_embedding
        x = embedding(tokens).to(self.llama.dtype)  # (B, T, D)
        if images is not None and not isinstance(adaptor, Adaptor):
            raise ValueError('the workflow "text" takes no image, nor does a batch of several')
        if images is not None:
            x = self.place_images(x, tokens, images, adaptor)
        past, new = 0 if cache is None else cache.length, tokens.shape[1]
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)[None]  # (1, T)
        if mask is None:
            mask = attention_mask(new, past, device=tokens.device)
        rope = llama.rope(positions, x.dtype)
        if adaptor is None:
            return llama(x, rope, mask, cache, None, last_only)
        inserted_last = len(llama.layers) - 1 in adaptor.places  # then it ends the pass
        hook = adaptor.after_layer(rope, mask, cache, last_only and inserted_last)
        return llama(x, rope, mask, cache, hook, last_only and not inserted_last)

    def place_images(self, x: Tensor, tokens: Tensor, images: Tensor, adaptor: Adaptor) -> Tensor:
        """x (B, T, D) with the projected features of `images` where their placeholders stand."""
        slots = tokens == self.image_token  # (B, T)
        wanted = len(images) * self.clip.config.patches
        training_on_gpu = torch.is_grad_enabled() and tokens.device.type != "cpu"
        if not training_on_gpu and slots.sum() != wanted:
            raise ValueError(f"{int(slots.sum())} image placeholders for {len(images)} images "
                             f"of {self.clip.config.patches} tokens ({wanted})")
        if images.ndim == 4:
            with torch.no_grad():
                images = self.clip(images)  # (N, P, D_vision)
        return x.masked_scatter(slots[..., None], adaptor.projector(images.to(x.dtype)))

    def logits(self, x: Tensor, workflow: str | Sequence[str] = TEXT) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) by the workflow's norm and head."""
        norm, head = self.norm_and_head(workflow)
        return head(norm(x))

    def norm_and_head(
        self, workflow: str | Sequence[str]
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """What makes logits of the workflow's hidden states, one after the other."""
        adaptor = self.adaptor(workflow)
        if adaptor is not None and adaptor.head is not None:
            return adaptor.norm, adaptor.head
        llama = self.llm(adaptor)
        return llama.norm, llama.words

    def loss(
        self,
        tokens: Tensor,  # (B, T)
        targets: Tensor,  # (B, T), -100 if not scored; kept on the CPU, no wait for a GPU
        workflow: str,
        images: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,  # (B, T), see `attention_mask`
    ) -> Tensor:  # scalar fp32
        """Sum, not mean, of the cross-entropy over scored positions; only these have logits.

        Beyond LOSS_ROWS of them logits come in pieces, each computed again in the backward pass.
        """
        mask = attention_mask(tokens.shape[1], segments=segments, device=tokens.device)
        x = self(tokens, workflow, images, positions, mask)  # (B, T, D)
        scored = (targets != -100).flatten().nonzero()[:, 0]  # counted on the targets' device
        wanted = targets.flatten()[scored].to(x.device, non_blocking=True)  # (scored,)
        norm, head = self.norm_and_head(workflow)
        x = norm(x.flatten(0, 1).index_select(0, scored.to(x.device, non_blocking=True)))

        def piece(x: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(head(x).float(), wanted, reduction="sum")

        if len(x) <= LOSS_ROWS:
            return piece(x, wanted)
        pieces = zip(x.split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
        return sum(checkpoint(piece, *rows, use_reentrant=False) for rows in pieces)

    def places(self, workflow: str | Sequence[str]) -> Sequence[int]:
        """The frozen layers that the workflow's insertion layers follow, ascending."""
        adaptor = self.adaptor(workflow)
        return () if adaptor is None else adaptor.places

    def new_cache(
        self, batch: int, length: int, workflow: str | Sequence[str] = TEXT
    ) -> KVCache:
        """An empty cache for `length` tokens: a slot for each frozen and each inserted layer."""
        llama = self.llama
        slots = llama.config.layers + len(self.places(workflow))
        return KVCache(llama.config, slots, batch, length, llama.dtype, llama.device)
