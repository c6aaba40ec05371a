"""IAA, the Inner-Adaptor Architecture (arXiv 2408.12902): a frozen Llama learns to see.

    picture -> CLIP (frozen) -> projector -+    P image features replace the P placeholder tokens
    tokens -> own embedding (EL_mm) -------+-> x
    x -> [frozen layer 0 -> insertion layer] -> [frozen layer 1] -> ... -> x
    x -> own norm and LM head (LH_mm) -> logits

- An *adaptor* holds everything that is trained: projector, embedding, insertion layers, gates,
  norm, LM head. One frozen Llama and one frozen CLIP serve any number of adaptors. Each adaptor
  gives one *workflow*, which has its name ("mm", "grounding", ...).
- The workflow "text" uses no adaptor: the frozen embedding, no hook, the frozen LM head. Its logits
  are those of plain Llama, bit for bit, whatever adaptors are loaded or trained.
- There are three structures (Fig. 3, Table 5). In c, an insertion layer reads its frozen layer's
  output and replaces it by its own (Eq. 2). In b, it reads the same; its own output goes through a
  gate, a linear layer that starts at zero, and is added. In a, the output is added as in b, but the
  input is the previous insertion layer's output (Eq. 1), for the first its frozen layer's input.
- An adaptor may bring its own trained copy of the whole LLM (`own_llm`). That is the LLaVA-1.5
  baseline of Tables 2, 3 and 8.

Letters: B batch, T tokens, D width, V vocabulary, N images of S x S pixels, P tokens of an image.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip import Clip
from common import files
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

TEXT = "text"
LOSS_ROWS = 1024  # positions with a target at once: at V = 128K, logits and gradients of 1.6 GB


def official_layers(layers: int) -> tuple[int, ...]:
    """The frozen layers that the official release's insertion layers follow: 0, 1, 5, 6, 10, ..."""
    return tuple(i for i in range(layers) if i % 5 < 2)


def evenly_spaced_layers(number: int, layers: int) -> tuple[int, ...]:
    """The frozen layers that `number` insertion layers follow, evenly from the first to the last.

    8 of 30 are 0, 4, 8, 12, 17, 21, 25, 29. 14 of 32 are the official release's.
    """
    if not 0 <= number <= layers:
        raise ValueError(f"insertion = {number}: from 0 to {layers}, the number of frozen layers")
    if (number, layers) == (14, 32):  # as in the released weights
        return official_layers(layers)
    return tuple(round(n * (layers - 1) / max(number - 1, 1)) for n in range(number))


@dataclass(frozen=True)
class AdaptorConfig:
    """What an adaptor is made of. Raises ValueError for an impossible combination."""

    insertion: tuple[int, ...] = ()  # frozen layers that an insertion layer follows, ascending
    structure: str = "c"  # "a", "b" or "c" of Fig. 3
    own_embedding: bool = True  # EL_mm
    own_head: bool = True  # LH_mm, with its norm
    own_llm: bool = False  # a trained copy of the whole LLM (LLaVA baseline)

    def __post_init__(self):
        if self.structure not in ("a", "b", "c"):
            raise ValueError(f"structure = {self.structure!r}: a, b or c (Fig. 3)")
        insertion = list(self.insertion)
        if insertion != sorted(set(insertion)) or any(i < 0 for i in insertion):
            raise ValueError(f"insertion = {insertion}: layer indices, ascending, each once")
        if self.own_llm and (self.insertion or self.own_embedding or self.own_head):
            raise ValueError("own_llm has its own embedding and head, takes no insertion layers: "
                             "set insertion = 0, own_embedding = false, own_head = false")


class Adaptor(nn.Module):
    """What one workflow adds to the frozen models."""

    def __init__(self, config: AdaptorConfig, llama: LlamaConfig, vision_width: int):
        super().__init__()
        if config.insertion and config.insertion[-1] >= llama.layers:
            raise ValueError(f"insertion layer after layer {config.insertion[-1]}, "
                             f"but the LLM ends at {llama.layers - 1}")
        self.config = config
        vocab, width = llama.vocab_size, llama.width
        # The two-layer MLP of LLaVA-1.5: features (N, P, D_vision) -> (N, P, D)
        self.projector = nn.Sequential(OrderedDict(
            up=Linear(vision_width, width, bias=True), gelu=nn.GELU(),
            down=Linear(width, width, bias=True)))
        self.embedding = new_embedding(vocab, width) if config.own_embedding else None
        self.layers = nn.ModuleList(DecoderLayer(llama) for _ in config.insertion)
        gates = len(config.insertion) if config.structure in "ab" else 0
        self.gates = nn.ModuleList(Linear(width, width) for _ in range(gates))
        self.norm = RMSNorm(width, llama.norm_eps) if config.own_head else None
        self.head = Linear(width, vocab) if config.own_head else None
        self.llm = Llama(llama) if config.own_llm else None
        self.prompt = {"template": None, "system": None}  # of the rows that it was trained on

    @torch.no_grad()
    def init_from_frozen(self, llama: Llama) -> None:
        """Copy every part from its frozen counterpart. Gates become zero. The projector stays
        random: it has no counterpart."""
        if self.embedding is not None:
            self.embedding.weight.copy_(llama.embedding.weight)
        for index, layer in zip(self.config.insertion, self.layers, strict=True):
            layer.load_state_dict(llama.layers[index].state_dict())  # copies values, not storage
        for gate in self.gates:
            gate.weight.zero_()
        if self.head is not None:
            self.norm.load_state_dict(llama.norm.state_dict())
            self.head.weight.copy_((llama.embedding if llama.head is None else llama.head).weight)
        if self.llm is not None:
            self.llm.load_state_dict(llama.state_dict())

    def freeze_embedding_and_head(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Leave embedding, norm and head out of training, in `dtype`, on `device`."""
        owner = self if self.llm is None else self.llm
        for part in filter(None, (owner.embedding, owner.norm, owner.head)):
            part.requires_grad_(False).to(device, dtype)

    def after_layer(self, rope: Rope, mask: Tensor | None, cache: KVCache | None) -> AfterLayer:
        """The hook for `Llama.forward`: insertion layer n runs after frozen layer insertion[n]."""
        number = {index: n for n, index in enumerate(self.config.insertion)}
        structure, side = self.config.structure, None

        def hook(i: int, x_in: Tensor, x_out: Tensor) -> Tensor:  # (B, T, D) each
            nonlocal side
            if i not in number:
                return x_out
            n = number[i]
            if structure == "c":
                return self.layers[n](x_out, rope, mask, cache)  # Eq. 2
            if side is None:  # only a reads this: its first one takes the frozen layer's input
                side = x_in
            x = x_out if structure == "b" else side  # b reads the frozen layer's output
            side = self.layers[n](x, rope, mask, cache)  # in a, this is Eq. 1
            return x_out + self.gates[n](side)  # gates start at zero: at first this is x_out

        return hook

    def save(self, folder: Path, base: dict[str, str], settings: dict, dtype: torch.dtype) -> None:
        """Write `adaptor.safetensors`, in `dtype`, and `config.json` into an existing folder.

        base: the SHA-256 of the frozen "llama" and "clip". settings: those of the training run.
        """
        path = folder / "adaptor.safetensors"
        save_file({name: t.to("cpu", dtype) for name, t in self.state_dict().items()}, path)
        meta = {"adaptor": asdict(self.config), "base": base, "prompt": self.prompt,
                "settings": settings}
        # `load_tensors` compares this digest: a damaged file must not change answers in silence.
        meta["sha256"] = files.sha256_of(meta, sorted(files.read_tensors(path).items()))
        files.write_json(folder / "config.json", meta)


class IAA(nn.Module):
    """One frozen Llama and one frozen CLIP; `self.adaptors["mm"] = adaptor` adds a workflow."""

    def __init__(self, llama: Llama, clip: Clip, image_token: int):
        super().__init__()
        self.llama = llama.requires_grad_(False)
        self.clip = clip.requires_grad_(False)
        self.image_token = image_token  # the id of the placeholder
        self.adaptors = nn.ModuleDict()

    def adaptor(self, workflow: str) -> Adaptor | None:
        """The adaptor of a workflow, None for "text". ValueError for an unknown name."""
        if workflow == TEXT:
            return None
        check_workflow(workflow, self.adaptors)
        return self.adaptors[workflow]

    def llm(self, adaptor: Adaptor | None) -> Llama:
        """The LLM that an adaptor (None: "text") runs on: the frozen one, or the adaptor's own."""
        return self.llama if adaptor is None or adaptor.llm is None else adaptor.llm

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64, each image as P placeholders
        workflow: str = TEXT,
        images: Tensor | None = None,  # (N, 3, S, S), in order of their placeholders
        positions: Tensor | None = None,  # (B, T), default: the T positions after the cache
        mask: Tensor | None = None,  # from `attention_mask`, default causal
        cache: KVCache | None = None,
    ) -> Tensor:  # (B, T, D) hidden states for `logits`
        """The workflow's hidden states (Fig. 2). ValueError: images do not fit the placeholders."""
        adaptor = self.adaptor(workflow)
        llama = self.llm(adaptor)
        embedding = getattr(adaptor, "embedding", None) or llama.embedding
        x = embedding(tokens).to(self.llama.dtype)  # (B, T, D); a trained embedding is fp32
        past, new = 0 if cache is None else cache.length, tokens.shape[1]
        if adaptor is None and images is not None:
            raise ValueError('the workflow "text" takes no image')
        # While decoding, the input is a token that the model generated. It stands for no picture.
        decoding = past > 0 and new == 1 and images is None
        if adaptor is not None and not decoding:
            x = self.place_images(x, tokens, images, adaptor)
        if positions is None:
            positions = torch.arange(past, past + new, device=tokens.device)[None]  # (1, T)
        if mask is None:
            mask = attention_mask(new, past, device=tokens.device)
        rope = llama.rope(positions, x.dtype)
        hook = None if adaptor is None else adaptor.after_layer(rope, mask, cache)
        return llama(x, rope, mask, cache, hook)

    def place_images(self, x: Tensor, tokens: Tensor, images: Tensor | None, adaptor: Adaptor):
        """x (B, T, D) with the features of picture n in place of the n-th P placeholders."""
        is_image = tokens == self.image_token  # (B, T)
        pictures, each = 0 if images is None else len(images), self.clip.config.patches
        found = int(is_image.sum())
        if found != pictures * each:  # else the model would answer about what it never saw
            raise ValueError(f"{found} image placeholders for {pictures} images "
                             f"of {each} tokens ({pictures * each})")
        if images is None:  # without a picture no projector runs, and it gets no gradient
            return x
        with torch.no_grad():  # the tower is frozen: no activations are kept
            features = self.clip(images)  # (N, P, D_vision)
        return x.masked_scatter(is_image[..., None], adaptor.projector(features.to(x.dtype)))

    def logits(self, x: Tensor, workflow: str = TEXT) -> Tensor:
        """Hidden states (..., D) -> logits (..., V), by the workflow's norm and LM head."""
        norm, head = self.norm_and_head(workflow)
        return head(norm(x))

    def norm_and_head(self, workflow: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The workflow's final norm and LM head: its own, or the LLM's."""
        adaptor = self.adaptor(workflow)
        if adaptor is not None and adaptor.head is not None:
            return adaptor.norm, adaptor.head
        llama = self.llm(adaptor)
        return llama.norm, llama.lm_head

    def loss(
        self,
        tokens: Tensor,  # (B, T)
        targets: Tensor,  # (B, T), the next token, -100 where it is not scored
        workflow: str,
        images: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,  # (B, T), see `attention_mask`
    ) -> Tensor:  # scalar fp32
        """The sum, not the mean, of the cross-entropy over the scored positions.

        Only scored positions have logits. More than LOSS_ROWS of them are split into pieces. A
        piece is computed again in the backward pass, so that memory holds the logits of one.
        """
        mask = attention_mask(tokens.shape[1], segments=segments, device=tokens.device)
        x = self(tokens, workflow, images, positions, mask)  # (B, T, D)
        scored = targets != -100  # (B, T)
        norm, head = self.norm_and_head(workflow)
        # Select before the head, as V is far larger than D.
        x, wanted = norm(x[scored]), targets[scored]  # (scored, D), (scored,)

        def piece_loss(x: Tensor, wanted: Tensor) -> Tensor:
            return F.cross_entropy(head(x).float(), wanted, reduction="sum")

        if len(x) <= LOSS_ROWS:
            return piece_loss(x, wanted)
        pieces = zip(x.split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
        return sum(checkpoint(piece_loss, *piece, use_reentrant=False) for piece in pieces)

    def new_cache(self, batch: int, length: int, workflow: str = TEXT) -> KVCache:
        """An empty cache for `length` tokens: a slot for each frozen and each inserted layer."""
        llama, adaptor = self.llama, self.adaptor(workflow)
        slots = llama.config.layers + (0 if adaptor is None else len(adaptor.layers))
        return KVCache(llama.config, slots, batch, length, llama.dtype, llama.device)

    @property
    def base(self) -> dict[str, str]:
        """The SHA-256 of the frozen models: an adaptor loads onto the ones it was trained on."""
        return {"llama": self.llama.sha256, "clip": self.clip.sha256}


def check_adaptor_name(name: str) -> None:
    """Raise ValueError where an adaptor cannot be called `name`."""
    # The names of torch's own attributes, such as "train", cannot be keys of an `nn.ModuleDict`.
    if not name.isidentifier() or name == TEXT or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adaptor cannot be named {name!r}: letters, digits and _, "
                         f"not {TEXT!r}, and no name that torch uses, such as 'train'")


def check_workflow(name: str, adaptors: Iterable[str]) -> None:
    """Raise ValueError that lists the known names, unless `name` is "text" or in `adaptors`."""
    known = [TEXT, *adaptors]
    if name not in known:
        raise ValueError(f"no adaptor named {name!r}; there are: {', '.join(known)}")


def read_adaptor_config(folder: Path, base: dict[str, str]) -> dict:
    """An adaptor's config.json, with an `AdaptorConfig` under "adaptor".

    Raises ValueError where the adaptor was trained on other frozen models than `base`.
    """
    meta = files.read_json(folder / "config.json", adaptor=AdaptorConfig, base=dict[str, str],
                           prompt=dict[str, str | None])
    for part, sha256 in base.items():
        trained = meta["base"].get(part, "unknown")
        if trained != sha256:
            raise ValueError(f"{folder} was trained on {part} {trained[:16]}..., "
                             f"but this {part} is {sha256[:16]}...")
    return meta


def load_tensors(adaptor: Adaptor, folder: Path, dtype: torch.dtype, device, strict: bool = True):
    """Fill an adaptor from `adaptor.safetensors`. Raises ValueError where that does not fit.

    strict: every tensor of the adaptor must be in the file. If False, the others stay unchanged.
    All bytes are checked, which takes about 1 s per GB.
    """
    path = folder / "adaptor.safetensors"
    tensors, meta = files.read_tensors(path), files.read_json(folder / "config.json")
    written = meta.pop("sha256", None)  # None: saved before there were digests
    if written is not None and written != files.sha256_of(meta, sorted(tensors.items())):
        raise ValueError(f"{path}, or config.json beside it, has changed since it was saved: its "
                         "SHA-256 does not fit. To load it unchecked, delete \"sha256\" there")
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    unknown = files.fill(adaptor, tensors, path, strict).unexpected_keys
    if unknown:
        raise ValueError(f"{path}: no such tensor in this adaptor: {unknown[0]}")


def load_adaptor(model: IAA, folder: Path) -> Adaptor:
    """What `Adaptor.save` wrote, frozen, in the model's dtype. Raises as `load_iaa`."""
    meta = read_adaptor_config(folder, model.base)
    with torch.device("meta"):  # shapes without storage: the values come from the file
        adaptor = Adaptor(meta["adaptor"], model.llama.config, model.clip.config.width)
    load_tensors(adaptor, folder, model.llama.dtype, model.llama.device)
    adaptor.prompt = adaptor.prompt | meta["prompt"]
    return adaptor.requires_grad_(False).eval()


@dataclass(frozen=True)
class Index:
    """`iaa.json`: where the parts of a model are, as paths from its folder."""

    llm: str
    vision: str
    image_token: int  # the id of the placeholder
    adaptors: dict[str, str]  # workflow -> folder

    @classmethod
    def read(cls, folder: str | Path) -> "Index":
        """What `iaa.json` in `folder` says. Raises FileNotFoundError, ValueError."""
        path = Path(folder, "iaa.json")
        return files.parse_dataclass(cls, files.read_json(path), str(path))


def load_iaa(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    workflows: Sequence[str] | None = None,  # None: all
) -> tuple[IAA, Path]:
    """Load a model by its `iaa.json`. Returns it and the folder of its tokenizer.

    Raises FileNotFoundError, or ValueError for an unknown workflow, a broken file or an adaptor
    that was trained on another base.
    """
    folder, index = Path(folder), Index.read(folder)
    for name in workflows or ():
        check_workflow(name, index.adaptors)
    llama = files.load_frozen(Llama, folder / index.llm, dtype, device)
    if not 0 <= index.image_token < llama.config.vocab_size:
        raise ValueError(f"{folder / 'iaa.json'}: image_token = {index.image_token}: the LLM has "
                         f"tokens 0 to {llama.config.vocab_size - 1}")
    clip = files.load_frozen(Clip, folder / index.vision, dtype, device)
    model = IAA(llama, clip, index.image_token)
    for name, path in index.adaptors.items():
        if workflows is None or name in workflows:
            check_adaptor_name(name)
            model.adaptors[name] = load_adaptor(model, folder / path)
    return model.eval(), folder / index.llm
