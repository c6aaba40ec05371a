"""How much memory three workflows take: one frozen LLM with two adaptors beside separate models.

    python memory.py [--insertion 8] [--llama 3-8B] [--clip ViT-L/14-336]

The paper ("Efficiency in Deployment") counts text, multimodal and grounding on one GPU: about 30 GB
for IAA-8 against about 50 GB for a language model and two models of the usual kind, each of which
has an LLM of its own that was trained along. Weights in bf16, without caches and activations.

Models are built on the meta device: sizes without storage.
"""

import argparse

import torch
from torch import nn

import clip
import llama
from clip import Clip, ClipConfig
from common.files import one_line
from iaa import IAA, Adaptor, AdaptorConfig, spread
from llama import Llama, LlamaConfig

Rows = list[tuple[str, int]]  # what, bytes


def size(module: nn.Module) -> int:
    """Bytes of all its tensors in bf16."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() for t in tensors) * torch.bfloat16.itemsize


def model(language: LlamaConfig, vision: ClipConfig, adaptors: dict[str, AdaptorConfig]) -> IAA:
    """A model of these sizes with these adaptors, on torch's default device."""
    iaa = IAA(Llama(language), Clip(vision), image_token=0)
    for name, settings in adaptors.items():
        iaa.adaptors[name] = Adaptor(settings, language, vision.width)
    return iaa


def together(language: LlamaConfig, vision: ClipConfig, insertion: int) -> Rows:
    """The parts of one frozen LLM and CLIP that serve two adaptors, and their sum."""
    adaptor = AdaptorConfig(spread(insertion, language.layers))
    one = model(language, vision, {"mm": adaptor, "grounding": adaptor})
    parts = [("LLM", one.llama), ("CLIP", one.clip),
             *((f"adaptor {name}, {insertion} layers", a) for name, a in one.adaptors.items())]
    rows = [(name, size(part)) for name, part in parts]
    return [*rows, ("one LLM, one CLIP, two adaptors", size(one))]


def apart(language: LlamaConfig, vision: ClipConfig) -> Rows:
    """A language model, and two models with an LLM, a CLIP and a projector of their own."""
    projector = AdaptorConfig((), own_embedding=False, own_head=False)
    usual = size(model(language, vision, {"mm": projector}))
    rows = [("LLM", size(Llama(language))), ("model mm: LLM, CLIP, projector", usual),
            ("model grounding: the same", usual)]
    return [*rows, ("three separate models", sum(number for _, number in rows))]


@one_line("memory.py")
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Memory of three workflows, together and apart.", allow_abbrev=False)
    add = parser.add_argument
    add("--insertion", type=int, default=8, help="insertion layers of an adaptor [%(default)s]")
    add("--llama", choices=list(llama.SIZES), default="3-8B", help="[%(default)s]")
    add("--clip", choices=list(clip.SIZES), default="ViT-L/14-336", help="[%(default)s]")
    args = parser.parse_args()
    language, vision = llama.SIZES[args.llama], clip.SIZES[args.clip]
    with torch.device("meta"):
        rows = together(language, vision, args.insertion) + apart(language, vision)
    for name, number in rows:
        print(f"{name:<36}{number / 1e9:>7.2f} GB")


if __name__ == "__main__":
    main()
