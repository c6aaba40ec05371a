"""The order in which a training pass runs the model's parts: what ZeRO gathers, and when.

`zero.py` knows nothing of IAA; this file tells it which weights are needed together, from the call
of which module on, and whether the backward pass reads them once more. The list mirrors
`IAA.loss`; a test holds the two together by watching the calls.
"""

from dataclasses import dataclass

from torch import nn

from iaa import IAA


@dataclass(frozen=True)
class Part:
    """Weights that are needed together, from the call of `first` to the end of `last`."""

    first: nn.Module
    last: nn.Module
    weights: list[nn.Parameter]
    again: bool  # whether the backward pass reads them: not where only looked up, nor below no_grad


def part(*modules: nn.Module, again: bool = True) -> Part:
    """All weights of modules that run one after the other."""
    weights = dict.fromkeys(w for module in modules for w in module.parameters())
    return Part(modules[0], modules[-1], list(weights), again)


def parts(model: IAA, workflow: str) -> list[Part]:
    """The parts of the workflow's loss in the order of the forward pass, a decoder layer each.

    Weights that come up twice (a tied head is the embedding) stand in two parts.
    """
    adaptor, clip = model.adaptors[workflow], model.clip
    llama = model.llm(adaptor)
    found = [part(llama.embedding if adaptor.embedding is None else adaptor.embedding, again=False)]
    stem = [w for name, w in clip.named_parameters()
            if not name.startswith(("layers.", "feature_norm."))]
    found.append(Part(clip, clip, stem, again=False))
    used = clip.config.layers + clip.config.feature_layer + 1  # the layers above do not run
    found += [part(layer, again=False) for layer in clip.layers[:used]]
    if clip.config.feature_norm:
        found.append(part(clip.feature_norm, again=False))
    found.append(part(adaptor.projector))
    places = adaptor.config.insertion
    for i, layer in enumerate(llama.layers):
        found.append(part(layer))
        if i in places:
            n = places.index(i)
            found.append(part(adaptor.layers[n], *adaptor.gates[n : n + 1]))
    if adaptor.head is not None:
        found.append(part(adaptor.norm, adaptor.head))
    else:
        found.append(part(llama.norm, llama.embedding if llama.head is None else llama.head))
    return found
