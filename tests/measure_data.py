"""What converting and opening large data sets costs; no test needs it.

    python tests/measure_data.py FOLDER 2000000 3000000

FOLDER is new. In it are written a mix665k of so many rows and annotations in COCO's form with so
many boxes (10 in a picture, in a random order). Both are converted, and the rows opened as training
does. Seconds are those of the processor, so that other work on the machine does not count.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "a", "cat", "dog", "table", "of", "in", "red", "what", "is", "how", "many"]


def make_mix(path: Path, rows: int) -> None:
    """Conversations of 1 to 5 questions, every sixteenth row without a picture."""
    draw = random.Random(0)

    def said(speaker: str, words: int) -> dict:
        return {"from": speaker, "value": " ".join(draw.choices(WORDS, k=words))}

    talks = [json.dumps([said(*turn) for _ in range(draw.randint(1, 5)) for turn in (
        ("human", 12), ("gpt", draw.choice((2, 20, 60))))]) for _ in range(10_000)]
    with open(path, "w") as file:
        for number in range(rows):
            talk, image = talks[number % len(talks)], ""
            if number % 16:
                talk = talk.replace('"value": "', '"value": "<image>\\n', 1)
                image = f', "image": "coco/train2017/{number:012}.jpg"'
            file.write(f'{", " if number else "["}{{"id": "{number:012}"{image}, '
                       f'"conversations": {talk}}}')
        file.write("]")


def make_boxes(path: Path, boxes: int) -> None:
    """An annotation file as Objects365's."""
    draw, images = random.Random(0), boxes // 10
    with open(path, "w") as file:
        file.write(json.dumps({"categories": [{"id": n, "name": f"thing {n}"} for n in range(365)],
                               "images": [{"id": n, "width": 640, "height": 480,
                                           "file_name": f"images/v1/patch0/{n:08}.jpg"}
                                          for n in range(images)]})[:-1] + ', "annotations": [')
        for number in range(boxes):
            box = [draw.randint(0, 300) + 0.25, draw.randint(0, 200) + 0.5, 40.5, 60.25]
            entry = {"id": number, "image_id": draw.randrange(images), "bbox": box,
                     "category_id": draw.randrange(365), "iscrowd": 0, "isfake": 0, "area": 2440.1}
            file.write((", " if number else "") + json.dumps(entry))
        file.write("]}")


def convert(name: str, source: Path, out: Path, items: int) -> None:
    """Run a command of prepare_data and print what it took."""
    process = subprocess.Popen([sys.executable, "-m", "prepare_data", name, source, out], cwd=ROOT,
                               stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    seconds = usage.ru_utime + usage.ru_stime
    print(f"{name}: {items:,} in {seconds:.1f} s, {items / seconds:,.0f}/s, "
          f"at most {usage.ru_maxrss * 1024 / 1e6:,.0f} MB, {out.stat().st_size / 1e6:,.0f} MB out")


def main(folder: Path, rows: int, boxes: int) -> None:
    """Make, convert, open."""
    folder.mkdir(parents=True)
    make_mix(folder / "mix.json", rows)
    convert("llava-mix665k", folder / "mix.json", folder / "mix.jsonl", rows)
    sys.path.insert(0, str(ROOT))
    from data import JsonlDataset

    began, wall = time.process_time(), time.perf_counter()
    opened = len(JsonlDataset([folder / "mix.jsonl"], folder))
    print(f"opening {opened:,} rows: {time.process_time() - began:.2f} s "
          f"({time.perf_counter() - wall:.2f} s on the clock)")
    make_boxes(folder / "zhiyuan_objv2_train.json", boxes)
    convert("objects365", folder / "zhiyuan_objv2_train.json", folder / "boxes.jsonl", boxes)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *map(int, sys.argv[2:]))
