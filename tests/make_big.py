"""Large synthetic inputs, for README's figures of memory and speed; no test needs them.

    python tests/make_big.py llama FOLDER            a Hugging Face Llama of 4.4 GB in bf16
    python tests/make_big.py mix665k FILE ROWS       rows in the form of LLaVA's mix665k
    python tests/make_big.py run COMMAND...          seconds and peak memory of a command
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file

VOCABULARY, WIDTH, FFN, LAYERS, HEADS, KV_HEADS, HEAD = 128256, 3072, 8192, 14, 24, 8, 128
WORDS = ["the", "a", "cat", "dog", "table", "of", "in", "red", "what", "is", "how", "many"]


def make_llama(folder: Path) -> None:
    """Half of Llama 3.2 3B's layers, untied, in four files; a small sentencepiece tokenizer."""
    folder.mkdir(parents=True)
    queries, keys = HEADS * HEAD, KV_HEADS * HEAD
    layer = {"self_attn.q_proj": (queries, WIDTH), "self_attn.k_proj": (keys, WIDTH),
             "self_attn.v_proj": (keys, WIDTH), "self_attn.o_proj": (WIDTH, queries),
             "mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH),
             "mlp.down_proj": (WIDTH, FFN), "input_layernorm": (WIDTH,),
             "post_attention_layernorm": (WIDTH,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape
              for i in range(LAYERS) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,),
               "lm_head.weight": (VOCABULARY, WIDTH)}
    home, each = {}, list(shapes)
    for number, names in enumerate((each[part::4] for part in range(4)), 1):
        file = f"model-{number:05}-of-00004.safetensors"
        save_file({name: torch.randn(shapes[name]).bfloat16() for name in names}, folder / file)
        home |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN,
        "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False}))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.repeat(" ".join(WORDS), 50), minloglevel=2, vocab_size=280,
        model_prefix=str(folder / "tokenizer"), byte_fallback=True)


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


def run(command: list[str]) -> None:
    """Run it, print what it took; ends as it ends."""
    began, process = time.perf_counter(), subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    print(f"{time.perf_counter() - began:.1f} s, at most {usage.ru_maxrss * 1024 / 1e6:,.0f} MB")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["llama", folder]:
            make_llama(Path(folder))
        case ["mix665k", file, rows]:
            make_mix(Path(file), int(rows))
        case ["run", *command] if command:
            run(command)
        case _:
            sys.exit(__doc__)
