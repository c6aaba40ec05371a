"""harness.py: lm-eval sees the workflow that plain calls of the model see. Needs lm-eval."""

import json

import pytest
import torch

from chat import render
from generate import generate
from iaa import IAA

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from harness import WorkflowLM, evaluate  # noqa: E402
from tokenizer import Tokenizer


@pytest.fixture
def parts(tiny_base, tmp_path):
    """A tiny model and its tokenizer, one token a byte."""
    llama, clip = tiny_base(tmp_path / "base")
    return IAA(llama, clip, 258).eval(), Tokenizer.load(tmp_path / "base" / "llama")


@pytest.fixture
def lm(parts):
    """The text workflow as lm-eval calls it."""
    return WorkflowLM(*parts, "text")


def requests(kind, *arguments):
    """Requests as lm-eval makes them."""
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_likelihoods(lm):
    """Sums of log-probabilities by a plain pass, whatever is batched with them; and greediness."""
    pairs = [("The sky is", " blue"), ("The sky is", " red"), ("A", "B"), ("", "xy"),
             ("The sky is", "A"), ("The sky is", "B")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (before, after), (total, greedy) in zip(pairs, got, strict=True):
        context = list(before.encode()) or [lm.eot_token_id]
        ids = torch.tensor([context + list(after.encode())])
        with torch.no_grad():
            log_probs = lm.model.logits(lm.model(ids))[0].log_softmax(-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        expected = sum(log_probs[i, ids[0, i + 1]].item() for i in places)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_probs[i].argmax() == ids[0, i + 1] for i in places)


def test_rolling_predicts_each_token_once(lm):
    """A text beyond the context, in pieces: all its tokens, none twice."""
    seen = []

    def note(requests, **kwargs):
        seen.extend(requests)
        return [(-1.0 * len(after), True) for _, _, after in requests]

    lm._loglikelihood_tokens = note
    text = "".join(chr(33 + i % 90) for i in range(1000))
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,))) == [-1000.0]
    assert bytes(token for _, _, after in seen for token in after).decode() == text
    assert all(len(before + after) <= 401 and len(before) == 1 for _, before, after in seen)


def test_answers_stop_and_are_cut(lm):
    """Cut ahead of the stop text, and no token is made once all answers hold one."""
    texts = ["one", "two two", "three three three"]
    free = lm.generate_until(requests("generate_until", *(
        (text, {"until": [], "max_gen_toks": 12}) for text in texts)))
    alone = [generate(lm.model, [list(t.encode())], None, "text", 12, lm.words.stop_ids)[0]
             for t in texts]
    assert free == [lm.words.decode(ids) for ids in alone]
    stop = free[0][1]
    cut = lm.generate_until(requests("generate_until", *(
        (text, {"until": [stop], "max_gen_toks": 12}) for text in texts)))
    assert cut == [text.split(stop)[0] for text in free]
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(requests("generate_until", ("x", {"do_sample": True, "temperature": 1})))


def test_the_chat_form_is_the_models_own(lm):
    """The text of a dialogue gives the ids that `render` gives."""
    turns = [("user", "Hi there"), ("assistant", "Hello."), ("user", "Bye")]
    history = [{"role": "system", "content": "Be brief."}]
    history += [{"role": role, "content": text} for role, text in turns]
    ids, _ = render(lm.words, turns, "chatml", "Be brief.")
    assert lm.tok_encode(lm.apply_chat_template(history)) == ids
    begun = [*history, {"role": "assistant", "content": "See"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(text) == ids + list(b"See")


def test_a_local_task_file(parts, tmp_path):
    """lm-eval itself, on a task and a data file of our own, without a network."""
    rows = [{"question": f"{i} + 1?", "choices": [str(i + 1), "no"], "answer": i % 2}
            for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    table = evaluate(*parts, "text", ["sums"], tmp_path)
    (name, row), = table.items()
    assert name == "sums (acc)" and row["asked"] == 6
    lm, right = WorkflowLM(*parts, "text"), 0
    for question in rows:
        prompt = lm.apply_chat_template([
            {"role": "system", "content": "You are a helpful AI assistant named SmolLM, "
                                          "trained by Hugging Face"},
            {"role": "user", "content": question["question"]}])
        scores = lm.loglikelihood(requests("loglikelihood", *(
            (prompt, choice) for choice in question["choices"])), disable_tqdm=True)
        right += max((0, 1), key=lambda i: scores[i][0]) == question["answer"]
    assert row["score"] == pytest.approx(100 * right / 6)
    with pytest.raises(ValueError, match="no task 'nothing'"):
        evaluate(*parts, "text", ["sums", "nothing"], tmp_path)
