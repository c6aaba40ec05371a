"""The stages of a run: where their adaptors lie, what each starts from, which are finished.

A finished adaptor keeps the settings that made it, and those of the one it began with. A run that
finds it there goes on from it where they are still the same, and says which are not.
"""

import os
from dataclasses import asdict
from pathlib import Path

from tokenization.templates import render
from training.checkpoint import check_settings, remove
from training.config import Config, StageConfig, adaptor_config
from common.files import read_json
from training.plan import meta_model
from storage import Index, read_base, read_index, write_index
from tokenization.tokenizer import Tokenizer

SHARED = ("seed", "system", "max_tokens", "dtype")  # settings of the run that stages depend on


def adaptor_folder(config: Config, stage: str) -> Path:
    """Where the finished adaptor of the stage of that name lies."""
    return Path(config.out, stage, "adaptor")


def is_finished(config: Config, stage: StageConfig) -> bool:
    """Whether the stage has been trained to its end in this run."""
    return (adaptor_folder(config, stage.name) / "config.json").is_file()


def source_folder(config: Config, stage: StageConfig) -> Path | None:
    """Where the adaptor lies that the stage starts from; None for the frozen model."""
    names = [s.name for s in config.stage]
    before = names.index(stage.name) - 1
    source = stage.start or (names[before] if before >= 0 else "none")
    return None if source == "none" else adaptor_folder(config, source)


def settings_of(config: Config, stage: StageConfig) -> dict:
    """All that the stage's result depends on, but for the data themselves.

    What it starts from, by that one's settings: those it was trained with, or will be.
    """
    (sizes, llama), (_, clip) = read_base(config.llm), read_base(config.vision)
    found = {**asdict(stage), **{key: getattr(config, key) for key in SHARED},
             "adaptor's configuration": asdict(adaptor_config(config, stage, sizes.layers)),
             "base model": {"llama": llama, "clip": clip}}
    source = source_folder(config, stage)
    before = next((s for s in config.stage if adaptor_folder(config, s.name) == source), None)
    if source is not None and source.is_dir():
        found["beginning"] = read_json(source / "config.json").get("settings")
    elif before is not None:
        found["beginning"] = settings_of(config, before)
    return found


def check_finished(config: Config, stage: StageConfig) -> None:
    """Raise ValueError where a finished stage was trained with other settings than these."""
    folder = adaptor_folder(config, stage.name)
    was = read_json(folder / "config.json").get("settings")
    if was is not None:  # not of this trainer
        check_settings(folder.parent, was, settings_of(config, stage))


def check_ahead(config: Config, stages: list[StageConfig]) -> None:
    """Raise ValueError or FileNotFoundError now for what a later stage would stumble over."""
    for folder in (config.llm, config.vision):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; convert_weights.py makes it")
    tokenizer, ready = Tokenizer.load(config.llm), []
    for stage in stages:
        ready.append(adaptor_folder(config, stage.name))
        if is_finished(config, stage):
            check_finished(config, stage)
            continue
        source = source_folder(config, stage)
        if source not in (None, *ready) and not source.is_dir():
            raise ValueError(f"stage {stage.name} starts from stage {source.parent.name!r}, "
                             f"which is not finished in {config.out}")
        meta_model(config, stage)  # sizes, places, structure
        render(tokenizer, [("user", "?"), ("assistant", "!")], stage.template or None)
        for path in (*stage.data, *stage.held_out):
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such data file")


def came_from(settings: dict, source: dict) -> bool:
    """Whether a stage of these settings began, at however many removes, with one of `source`."""
    before = settings.get("beginning")
    return bool(before) and (before == source or came_from(before, source))


def after_stage(config: Config, stage: StageConfig) -> None:
    """Note the finished adaptors in `iaa.json`, drop the stage's checkpoints.

    Of those of one name the newest counts, unless it is what another began with (a copied run may
    have lost the ages of its files); also where this run leaves their stages out.
    """
    out = Path(config.out)
    noted = read_index(out).adaptors if (out / "iaa.json").is_file() else {}
    places = {place: name for name, place in noted.items()}
    places |= {f"{s.name}/adaptor": s.adaptor for s in config.stage}
    files = {place: out / place / "config.json" for place in places}
    ages = {place: file.stat().st_mtime_ns for place, file in files.items() if file.is_file()}
    made = {place: read_json(files[place]).get("settings") or {} for place in ages}
    counts = {}
    for place in sorted(ages, key=ages.get):
        before = counts.get(places[place])
        if before is None or not came_from(made[before], made[place]):
            counts[places[place]] = place
    index = Index(os.path.relpath(config.llm, out), os.path.relpath(config.vision, out),
                  Tokenizer.load(config.llm).image_id, counts)
    write_index(out, index)
    for old in (out / stage.name).glob("step-*"):
        remove(old)
