"""The typed configuration of a training run: defaults, a TOML file, then `--set` overrides.

- `base = "iaa8.toml"`, a path relative to the file: the file overrides its base key by key, and a
  `[[stage]]` overrides the base's stage of the same name.
- `stages = [...]` removes all other stages. One without `start` then starts from the previous one
  that remains, else from the frozen model. `train.py --stage` trains one and removes none.
- Every value is checked: an unknown key, a wrong type or an impossible value is one line that says
  what is accepted.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from common.device import CHOICES
from common.files import parse_dataclass
from iaa import AdaptorConfig, check_adaptor_name, evenly_spaced_layers

RULES = (  # keys of a stage or of the run, what is accepted, and the test
    ("name", 'letters, digits (not first) and _, not "none"',
     lambda value: value.isidentifier() and value != "none"),
    ("data", "at least one JSONL file", len),
    ("stage", "at least one [[stage]]", len),
    ("steps batch micro_batch save_every eval_every eval_rows max_tokens timeout_s",
     "must be 1 or more, below 2^31", lambda value: 1 <= value < 2**31),
    ("lr lr_projector weight_decay seed workers", "must be 0 or more, below 2^31",
     lambda value: 0 <= value < 2**31),
    ("beta1 beta2", "0 or more, below 1", lambda value: 0 <= value < 1),
    ("clip_norm eps", "must be above 0", lambda value: value > 0),
    ("warmup", "a share of the steps, 1 at most", lambda value: 0 <= value <= 1),
    ("trains", '"projector", "layers" or "adaptor"',
     ("projector", "layers", "adaptor").__contains__),
    ("zero", "0, 1, 2 or 3", range(4).__contains__),
    ("dtype", f"one of {', '.join(CHOICES)}", CHOICES.__contains__),
    ("frozen_dtype", 'leave it out, or "int8"', (None, "int8").__contains__),
    ("tracker", 'leave it out, or "tensorboard"', (None, "tensorboard").__contains__),
)


def check_rules(config: "StageConfig | Config", where: str) -> None:
    """Raise ValueError, with `where` at its start, for a value that breaks a rule."""
    for keys, accepted, test in RULES:
        for key in keys.split():
            if hasattr(config, key) and not test(getattr(config, key)):
                raise ValueError(f"{where}{key} = {getattr(config, key)!r}: {accepted}")


@dataclass(frozen=True)
class StageConfig:
    """One `[[stage]]`. Defaults are Table 1's."""

    name: str
    data: list[str]  # JSONL files
    steps: int
    held_out: list[str] = ()  # JSONL files for the held-out loss
    adaptor: str = "mm"  # the workflow that it trains
    start: str = ""  # stage to start from; "" the one before, "none" the frozen model
    # "projector": that alone, with the text embedding and head and no insertion layers. "layers":
    # projector, insertion layers, gates; embedding, norm, head stay as the start left them.
    # "adaptor": all of it.
    trains: str = "adaptor"
    template: str = ""  # "" the tokenizer's own, "plain" picture then caption
    lr: float = 2e-5
    lr_projector: float = 0.0  # 0 = lr
    batch: int = 128  # rows per step, over all ranks
    micro_batch: int = 8  # rows per forward pass of one rank
    warmup: float = 0.03  # share of the steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    save_every: int = 100  # steps
    eval_every: int = 100  # steps
    eval_rows: int = 64
    zero: int = 0  # ZeRO stage where there are several ranks, see zero.py

    def __post_init__(self):
        check_rules(self, f"stage {self.name}: ")
        check_adaptor_name(self.adaptor)
        if self.batch % self.micro_batch:
            raise ValueError(f"stage {self.name}: batch = {self.batch} is not a multiple of "
                             f"micro_batch = {self.micro_batch}")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    out: str  # folder of the run
    llm: str  # folder of the frozen Llama, from convert_weights.py
    vision: str  # folder of the frozen vision tower
    images: str  # root of the pictures that rows name
    stage: list[StageConfig]
    stages: list[str] | None = None  # names of those that the run has; left out: all
    insertion: int | list[int] = 8  # how many layers (spread evenly), or after which frozen ones
    structure: str = "c"
    own_embedding: bool = True
    own_head: bool = True
    own_llm: bool = False  # the LLaVA baseline: insertion = 0, own_embedding = own_head = false
    system: str | None = None  # system message; left out: the template's own, "": none
    max_tokens: int = 2048  # longer rows are cut
    dtype: str = "auto"  # the faster of bf16 and fp32 on the machine, or one of them by name
    frozen_dtype: str | None = None  # "int8": the frozen LLM's matrices; else in dtype
    recompute: bool = False  # activation checkpointing
    shard_frozen: bool = True  # ZeRO-3 also shares out the frozen models; false: each rank has them
    reduce_fp32: bool = False  # ZeRO sends gradients in fp32, not in dtype
    timeout_s: int = 600  # without an answer from another rank or a loader; then all stop
    seed: int = 0
    workers: int = 1  # processes that load data
    tracker: str | None = None  # "tensorboard": it shows the log's numbers, too

    def __post_init__(self):
        check_rules(self, "")
        names = [s.name for s in self.stage]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {names}")
        if self.stages is not None:
            if not self.stages or set(self.stages) - set(names):
                raise ValueError(f"stages = {self.stages}: one or more of {', '.join(names)}")
            kept = [s for s in self.stage if s.name in self.stages]
            object.__setattr__(self, "stage", kept)  # past `frozen`
            names = [s.name for s in kept]
        for place, stage in enumerate(self.stage):
            if stage.start not in ("", "none", *names[:place]):
                raise ValueError(f'stage {stage.name}: start = {stage.start!r}: "", "none" or a '
                                 f"stage before it in the run ({', '.join(names[:place])})")
            source = stage.start or (names[place - 1] if place else "none")
            if stage.trains == "projector" and source != "none" and (
                    self.stage[names.index(source)].trains != "projector"):
                raise ValueError(f'stage {stage.name}: a stage that trains = "projector" cannot '
                                 f'start from {source}, which trains more: start = "none"')
        if self.frozen_dtype and self.shard_frozen and any(s.zero == 3 for s in self.stage):
            raise ValueError("frozen_dtype = 'int8': zero = 3 cannot shard int8 weights: "
                             "set shard_frozen = false, or zero = 2")


def adaptor_config(config: Config, stage: StageConfig, layers: int) -> AdaptorConfig:
    """The stage's adaptor: a bare projector where `trains` says so, else the whole adaptor."""
    if stage.trains == "projector":
        return AdaptorConfig((), own_embedding=False, own_head=False)
    number = config.insertion  # or a list of layers
    insertion = evenly_spaced_layers(number, layers) if isinstance(number, int) else number
    return AdaptorConfig(tuple(insertion), config.structure, config.own_embedding, config.own_head,
                         config.own_llm)


def named_stages(stages: list[dict], name: str | None, where: str) -> list[dict]:
    """The stage of that name, or all for "stage". Raises ValueError that lists the names."""
    found = [stage for stage in stages if name in ("stage", stage.get("name"))]
    if not found:
        known = ", ".join(str(stage.get("name")) for stage in stages)
        raise ValueError(f"{where}: no stage {name!r}; there are: {known}")
    return found


def read_values(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The TOML file's values over those of its `base`. `above`: the files that lead here."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    stages, above = values.setdefault("stage", []), (*above, path.resolve())
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path}: write [[stage]], with two brackets, for each stage")
    if "base" not in values:
        return values
    base = values.pop("base")
    if not isinstance(base, str) or (path.parent / base).resolve() in above:
        raise ValueError(f"{path}: base = {base!r}: a path, and no cycle, is expected")
    below = read_values(path.parent / base, above)
    for stage in values.pop("stage"):
        for same in named_stages(below["stage"], stage.get("name"), str(path)):
            same.update(stage)
    return below | values


def read_config(path: str, settings: list[str]) -> Config:
    """The TOML file, then overrides: key=value, STAGE.key=value, stage.key=value for all stages."""
    values = read_values(Path(path))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key == "stage":
            raise ValueError(f"--set {setting}: write key=value or STAGE.key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except ValueError:
            value = text  # a bare word is a string
        name, dot, key = key.rpartition(".")
        tables = named_stages(values["stage"], name, f"--set {setting}") if dot else [values]
        for table in tables:
            table[key] = value
    try:
        return parse_dataclass(Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
