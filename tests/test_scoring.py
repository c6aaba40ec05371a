"""scoring.py: each rule of the official scorers, on answers that a reader can judge by hand."""

import pytest

from evaluation.scoring import (
    box_verdict,
    choice_letter,
    key_parts,
    normalised,
    open_right,
    option_letter,
    score_easy_vqa,
    score_mmbench,
    score_mme,
    score_mmmu,
    score_refcoco,
    yes_or_no,
)


@pytest.mark.parametrize("answer, word", [
    ("Yes", "yes"), ("yes.", "yes"), ("No, it is not", "no"), ("NO\n", "no"),
    ("not sure", "no"),  # "no" within the first four characters
    ("a yes", "other"), ("is no", "other"),  # " yes" and "no" come too late
    ("it is no", "other"), ("unknown", "other"), ("", "other"), ("  yes", "other"),
    (" no", "no"), ("yeno", "no"), ("noyes", "no"), ("I no", "no"),
])
def test_mme_reads_four_characters(answer, word):
    """Exactly yes or no, or the first four characters of the lower-cased answer hold it."""
    assert yes_or_no(answer) == word


def test_mme_score():
    """Two pictures, right/right and right/wrong: acc 75, acc+ 50, together 125. Then the sums."""
    def line(subtask, picture, expected, answer):
        return {"subtask": subtask, "picture": picture, "expected": expected, "answer": answer}

    pair = [line("existence", "1", "Yes", "Yes"), line("existence", "1", "No", "no"),
            line("existence", "2", "Yes", "yes"), line("existence", "2", "No", "other words")]
    assert score_mme(pair)["existence"] == {"score": 125.0, "asked": 4}
    more = [line("OCR", "1", "Yes", "Yes"), line("OCR", "1", "No", "No"),
            line("code_reasoning", "1", "Yes", "no"), line("code_reasoning", "1", "No", "no")]
    table = score_mme(more + pair)
    assert table["perception"] == {"score": 325.0, "asked": 6}
    assert table["cognition"] == {"score": 50.0, "asked": 2}
    assert list(table) == ["perception", "cognition", "existence", "OCR", "code_reasoning"]


OPTIONS = {"A": "a kettle", "B": "a hat", "C": "None"}


@pytest.mark.parametrize("answer, letter", [
    ("A", "A"), ("(B)", "B"), ("B.", "B"), ("A. a kettle", "A"), ("{C}", "C"), ("b", None),
    ("Answer: B", "B"), ("A or B", None),  # two letters, and no option's text
    ("B is my answer here", None),  # the letter is the fifth token from the end
    ("so B is my answer", "B"),  # the fourth
    ("D", None), ("Z", "Z"),
    ("The answer is A, not B", "A"), ("The correct answer is **B** (A is wrong)", "B"),
    ("The answer is D, not A or B", None),
    ("it is A HAT", "A"),  # a letter comes ahead of a text, even where it is an article
    ("it is a HAT", "B"), ("a hat, a kettle", None), ("none", "C"),
    ("it is a hat because of all that I see on it, and more", None),  # twice as long as all options
    ("Cannot determine the answer. A", "Z"), ("", None),
])
def test_mmbench_reads_letters_then_texts(answer, letter):
    """VLMEvalKit's exact matching, unresolved answers being wrong."""
    assert option_letter(answer, OPTIONS) == letter


def bench(index, expected, answer, category="c"):
    return {"index": index, "options": {"A": "x", "B": "y"}, "expected": expected,
            "answer": answer, "category": category, "l2-category": "l2"}


def test_mmbench_is_circular():
    """One question, rotations right and wrong: vanilla 100, circular 0; by ability too."""
    rotated = [bench(3, "A", "A"), bench(1_000_003, "B", "A")]
    table = score_mmbench(rotated)
    assert table["vanilla"] == {"score": 100.0, "asked": 1}
    assert table["circular"] == {"score": 0.0, "asked": 1}
    more = [*rotated, bench(4, "B", "B", "d"), bench(1_000_004, "A", "A", "d")]
    table = score_mmbench(more)
    assert table["circular"] == {"score": 50.0, "asked": 2} == table["l2"]
    assert (table["c"]["score"], table["d"]["score"]) == (0.0, 100.0)


@pytest.mark.parametrize("answer, letter", [
    ("A", "A"), ("B.", "B"), ("(A) or (B)", "B"), ("(B), then (A)", "A"), ("(A) B", "A"),
    ("A B", "B"),  # " A " is found, " B " too: the last of several
    ("both A and C ", "C"), ("a", None), ("'B'", "B"), ("a hat", None),
    ("I would say that it is a hat", "B"), ("this is a hat and also a KETTLE, I think", "A"),
    ("B) is it", None), ("", None), ("I", None),
])
def test_mmmu_reads_choices(answer, letter):
    """(X), then X between spaces, then texts in answers of more than five words; the last wins."""
    options = {"A": "a kettle", "B": "a hat", "C": "12%"}
    assert choice_letter(answer, options) == letter


def test_mmmu_up_to_nine_options():
    """Letters beyond D are options where there are so many."""
    options = dict(zip("ABCDEFGHI", "abcdefghi", strict=True))
    assert choice_letter("(I)", options) == "I" and choice_letter("H", options) == "H"
    assert choice_letter("(I)", {"A": "x"}) is None


@pytest.mark.parametrize("answer, parts", [
    ("The answer is 12.", ["12"]), ("x = 3 so it is 4", ["4"]), ("a=5", ["5"]),
    ("a=5\nb", ["a=5\nb"]),  # "=" counts in the last line only; no tail at all: the whole
    ("This is 7\nthus 8", ["7", "8"]), ("It is ,", ["it is ,"]), ("Blue", ["blue"]),
])
def test_mmmu_key_parts(answer, parts):
    """The shortest tail of each line."""
    assert key_parts(answer) == parts


def test_mmmu_normalised():
    """Numbers to two places, single characters with a space, words in lower case."""
    assert normalised("1,234.567") == [1234.57] and normalised(" X ") == [" x", "x "]
    assert normalised("Blue") == ["blue"] and normalised("-2e3") == [-2000.0]


@pytest.mark.parametrize("answer, expected, right", [
    ("The answer is 1,234.", ["1234"], True), ("about 3.14159", ["3.14"], True),
    ("3.2", ["3.14"], False), ("It is blue-green", ["Blue"], True), ("red", ["blue"], False),
    ("x", ["x"], True), ("ax", ["x"], False),  # a single character needs a space beside it
    ("the value is -2e3 volts", ["-2000"], True), ("24/7", ["24"], True),
    ("it is 0.5", ["1/2", "0.5"], True), ("", ["5"], False),
])
def test_mmmu_open_answers(answer, expected, right):
    """Contains an expected text, or equals an expected number; any of several will do."""
    assert open_right(answer, expected) is right


def test_mmmu_score_draws_what_is_unresolved():
    """Micro average; the draw depends on the question alone, and is counted."""
    def line(key, answer, options, expected):
        return {"key": key, "subject": "Art", "discipline": "Art & Design", "answer": answer,
                "options": options, "expected": expected}

    lines = [line("1", "B", OPTIONS, ["B"]), line("2", "12", None, ["12"]),
             line("3", "?", {"A": "x"}, ["A"]), line("4", "?", OPTIONS, ["none of these"])]
    table = score_mmmu(lines)
    assert table["all"] == {"score": 75.0, "asked": 4, "drawn": 2} and table == score_mmmu(lines)
    assert table["Art"] == table["Art & Design"] == {"score": 75.0, "asked": 4}
    many = [line(str(number), "?", OPTIONS, ["A"]) for number in range(400)]
    table = score_mmmu(many)
    assert table["all"]["drawn"] == 400 and 15 < table["all"]["score"] < 35  # a quarter, by chance
    assert table == score_mmmu(many) == score_mmmu(many[::-1])


TRUTH = {"box": [100, 50, 300, 250], "width": 640, "height": 480}
HIT, MISS = "[0.16, 0.2, 0.47, 0.52]", "[0.0, 0.12, 0.1, 0.3]"


@pytest.mark.parametrize("answer, any_box, first, malformed, lenient", [
    (HIT, 1, 1, 0, 1), (HIT.replace(" ", ""), 1, 1, 0, 1), (MISS, 0, 0, 0, 0),
    (f"{MISS}; {HIT}", 1, 0, 0, 0),  # any of several boxes
    (f"{MISS}; {MISS}", 0, 0, 0, 0),
    (f"{HIT}; what?", 1, 1, 0, 1),  # what comes behind a hit is not looked at
    (f"what?; {HIT}", 0, 0, 1, 1),  # a malformed piece ahead of it ends the reading
    (f"The box is {HIT}", 0, 0, 1, 1), (f"{HIT}.", 0, 0, 1, 1), (f"{HIT}; ", 1, 1, 0, 1),
    (f"{MISS}; ", 0, 0, 1, 0), (f"{MISS};{HIT}", 0, 0, 1, 0),  # joined without a space: one piece
    ('{"bbox": [0.16, 0.2, 0.47, 0.52]}', 0, 0, 1, 1), ("{}", 0, 0, 1, 0),
    ("", 0, 0, 1, 0), ("[0.16, 0.2, 0.47]", 0, 0, 1, 0), ("[a, b, c, d]", 0, 0, 1, 0),
    ("0.16, 0.2, 0.47, 0.52", 1, 1, 0, 0), ("[0.16, 0.2, 0.47, 0.52, 9]", 1, 1, 0, 0),
    ("[0.47, 0.52, 0.16, 0.2]", 0, 0, 0, 0), ("__import__('os')", 0, 0, 1, 0),
    ("[1, 1.0, 1, 1]", 0, 0, 0, 0), ("[" * 5000, 0, 0, 1, 0),
])
def test_refcoco_rules(answer, any_box, first, malformed, lenient):
    """The official rule (any), the first box, what stopped the reading, the first box in text."""
    verdict = box_verdict(TRUTH | {"answer": answer})
    expected = {"any": any_box, "first": first, "malformed": malformed, "lenient": lenient}
    assert verdict == {rule: bool(flag) for rule, flag in expected.items()}


def test_refcoco_score():
    """A table by set and split: the official figure, two others, and malformed answers."""
    def line(split, answer):
        return TRUTH | {"set": "refcoco", "split": split, "answer": answer}

    table = score_refcoco([line("val", f"{MISS}; {HIT}"), line("val", "?"), line("testA", HIT)])
    assert table["refcoco val"] == {"score": 50.0, "first": 0.0, "malformed": 50.0, "lenient": 0.0,
                                    "asked": 2}
    assert table["refcoco testA"]["score"] == 100.0


def test_easy_vqa_score():
    """Exactly the word, by kind, beside the commonest answer; boxes by the first in the text."""
    def line(expected, answer, commonest):
        return {"expected": expected, "answer": answer, "commonest": commonest}

    words = [line("red", "red", "blue"), line("yes", "yes.", "yes"), line("no", "no", "yes")]
    table = score_easy_vqa([*words, TRUTH | {"answer": f"It is {HIT}."}])
    assert table["colour"] == {"score": 100.0, "commonest answer": 0.0, "asked": 1}
    assert table["yes/no"] == {"score": 50.0, "commonest answer": 50.0, "asked": 2}
    assert table["all"]["asked"] == 3 and "shape" not in table
    assert table["grounding, IoU 0.5"] == {"score": 100.0, "asked": 1}
