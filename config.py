"""The typed configuration of a training run: defaults, a TOML file, then `--set` overrides.

Every value is checked: an unknown key, a wrong type or an impossible value is one line that says
what is accepted.
"""

import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from iaa import DTYPES, TEXT


@dataclass(frozen=True)
class StageConfig:
    """One `[[stage]]`. Defaults are Table 1's."""

    name: str
    data: list[str]  # JSONL files
    steps: int
    held_out: list[str] = ()  # JSONL files for the held-out loss
    adaptor: str = "mm"  # the workflow that it trains
    start: str = ""  # stage to start from; "" the one before, "none" the frozen model
    trains: str = "adaptor"  # "projector" (text embedding and head, nothing inserted) or "adaptor"
    template: str = ""  # "" the tokenizer's own, "plain" picture then caption
    lr: float = 2e-5
    lr_projector: float = 0.0  # 0 = lr
    batch: int = 128  # rows a step, over all ranks
    micro_batch: int = 8  # rows a forward pass of one rank
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
        where = f"stage {self.name}"
        ranges = {"steps": 1, "batch": 1, "micro_batch": 1, "save_every": 1, "eval_every": 1,
                  "eval_rows": 1, "lr": 0, "lr_projector": 0, "warmup": 0, "eps": 0,
                  "weight_decay": 0, "clip_norm": 0}
        for key, low in ranges.items():
            if not getattr(self, key) >= low:  # NaN is not
                raise ValueError(f"{where}: {key} = {getattr(self, key)}: must be {low} or more")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"{where}: beta1, beta2 = {self.beta1}, {self.beta2}: "
                             "0 or more, below 1")
        if self.trains not in ("projector", "adaptor"):
            raise ValueError(f'{where}: trains = {self.trains!r}: "projector" or "adaptor"')
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"{where}: zero = {self.zero}: 0, 1, 2 or 3")
        if not self.name.isidentifier() or not self.adaptor.isidentifier() or self.adaptor == TEXT:
            raise ValueError(f"stage {self.name!r}, adaptor {self.adaptor!r}: "
                             f"letters, digits and _, and not {TEXT!r}")
        if self.batch % self.micro_batch:
            raise ValueError(f"{where}: batch = {self.batch} is not a multiple of "
                             f"micro_batch = {self.micro_batch}")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    out: str  # folder of the run
    llm: str  # folder of the frozen Llama, from convert_weights.py
    vision: str  # folder of the frozen vision tower
    images: str  # root of the pictures that rows name
    stage: list[StageConfig]
    features: str = ""  # folder that keeps what the vision tower made of pictures; "": it runs anew
    insertion: int | list[int] = 8  # how many layers (spread evenly), or after which frozen ones
    structure: str = "c"
    own_embedding: bool = True
    own_head: bool = True
    own_llm: bool = False  # the LLaVA baseline: insertion = 0, own_embedding = own_head = false
    system: str | None = None  # system message; left out: the template's own, "": none
    max_tokens: int = 2048  # longer rows are cut
    dtype: str = "bf16"
    recompute: bool = False  # activation checkpointing
    shard_frozen: bool = True  # ZeRO-3 also shares out the frozen models; false: each rank has them
    reduce_fp32: bool = False  # ZeRO sends gradients in fp32, not in dtype
    timeout_s: int = 600  # without an answer from another rank; then all stop
    seed: int = 0
    threads: int = 0  # of the processor; 0 = as torch chooses
    workers: int = 1  # processes that load data

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: one of {', '.join(DTYPES)}")
        if self.timeout_s < 1:
            raise ValueError(f"timeout_s = {self.timeout_s}: must be 1 or more")
        if not self.stage:
            raise ValueError("no [[stage]] given")
        names = [s.name for s in self.stage]
        if len(set(names)) < len(names):
            raise ValueError(f"two stages have the same name: {names}")


def checked(where: str, value, kind):
    """`value` if it is of `kind` (an int counts as a float). Raises ValueError that names it."""
    if isinstance(kind, types.UnionType):
        for option in typing.get_args(kind):
            if option is not type(None) and isinstance(value, typing.get_origin(option) or option):
                return checked(where, value, option)
    elif typing.get_origin(kind) is list:
        if isinstance(value, list):
            (inner,) = typing.get_args(kind)
            return [checked(f"{where}[{i}]", v, inner) for i, v in enumerate(value)]
    elif isinstance(kind, type) and issubclass(kind, (StageConfig, Config)):
        return build(kind, value, where)
    elif type(value) is kind:
        return value
    elif kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where} = {value!r}: expected {getattr(kind, '__name__', kind)}")


def build(kind, values: dict, where: str = ""):
    """A `kind` from a TOML table. Raises ValueError for what is unknown, missing or impossible."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} = {values!r}: expected a table")
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        place, known = f" in {where}" if where else "", ", ".join(sorted(hints))
        raise ValueError(f"unknown key {unknown[0]!r}{place}; known: {known}")
    try:
        return kind(**{key: checked(f"{where}.{key}".lstrip("."), value, hints[key])
                       for key, value in values.items()})
    except TypeError as error:
        message = str(error).replace(f"{kind.__name__}.__init__()", where or "the config")
        raise ValueError(message) from None


def read_config(path: str, settings: list[str]) -> Config:
    """The TOML file, then overrides: key=value, STAGE.key=value, stage.key=value for all stages."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: not TOML ({error})") from None
    stages = values.get("stage", [])
    if not isinstance(stages, list):
        raise ValueError(f"{path}: write [[stage]], with two brackets, for each stage")
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except ValueError:
            value = text  # a bare word is a string
        name, dot, key = key.rpartition(".")
        tables = [s for s in stages if name in ("stage", s.get("name"))] if dot else [values]
        if not tables:
            known = ", ".join(s.get("name", "?") for s in stages)
            raise ValueError(f"--set {setting}: no stage {name!r}; there are: {known}")
        for table in tables:
            table[key] = value
    try:
        return build(Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
