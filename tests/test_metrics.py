"""metrics.py against values computed by hand, and against those of lmms-eval 0.7.3."""

import json
import math

import pytest
import torch
from helpers import ROOT, people

import metrics
from metrics import (
    answer_score,
    bleu,
    mean_by,
    normalize_answer,
    official_vqa_accuracy,
    recall,
)

PAIRS = json.loads((ROOT / "tests/golden/evaluation/metrics.json").read_text())


# ---------------------------------------------------------------- VQA
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("3.", "3"),
        ("1.5", "1.5"),
        ("u.s.a", "usa"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont", "don't"),
        ("The two-story house", "2 story house"),
        ("a cat, and the dog", "cat and dog"),
        ("1,000", "1000"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("what?", "what"),
        ("." * 40 + "x", "." * 8 + "x"),
        ("", ""),
        ("An", ""),
    ],
)
def test_the_answer_normaliser_on_hand_made_cases(text, expected):
    assert normalize_answer(text) == expected


def test_answer_score_is_the_mean_over_left_out_annotators():
    for count in range(11):
        given = [1] * count + [0] * (10 - count)
        leave_one_out = [min((sum(given) - own) / 3, 1) for own in given]
        assert answer_score(count) == pytest.approx(sum(leave_one_out) / 10)


def test_means_have_their_keys_in_alphabetical_order():
    means = mean_by([1.0, 0.0, 0.5, 0.7], ["what", "is", "is", None])
    assert list(means.items()) == [("is", 0.25), ("what", 1.0)]
    with pytest.raises(ValueError):
        mean_by([1.0], [])


def test_official_vqa_accuracy_by_hand():
    rows = [
        (1, people(("2", 1), ("3", 9)), "how many", "number"),
        (2, people(("Two", 2), ("3", 8)), "how many", "number"),
        (3, people(("the dog.", 3), ("cat", 7)), "what is", "other"),
        (4, people(("isnt", 4), ("no", 6)), "is it", "yes/no"),
        (5, people(("1,000", 10)), "how many", "number"),
        (6, people(("red", 10)), "what color", "other"),
        (7, people(("never asked", 10)), "what color", "other"),
    ]
    names = ("question_id", "answers", "question_type", "answer_type")
    annotations = [dict(zip(names, row, strict=True)) for row in rows]
    answers = {1: "2", 2: "2", 3: "dog", 4: "isn't", 5: "1000", 6: "blue"}
    results = [{"question_id": q, "answer": a} for q, a in answers.items()]
    # who agrees with 1, 2, 3 others: 9/10 * 1/3 = 0.3; (2 * 1/3 + 8 * 2/3) / 10 = 0.6;
    # (3 * 2/3 + 7) / 10 = 0.9; 4: 1
    found = official_vqa_accuracy(results, annotations)
    assert found["overall"] == pytest.approx((0.3 + 0.6 + 0.9 + 1 + 1 + 0) / 6)
    by_question = {"how many": 1.9 / 3, "is it": 1, "what color": 0, "what is": 0.9}
    assert found["per_question_type"] == pytest.approx(by_question)
    by_answer = {"number": 1.9 / 3, "other": 0.45, "yes/no": 1.0}
    assert found["per_answer_type"] == pytest.approx(by_answer)
    assert (found["answered"], found["questions"]) == (6, 7)
    for wrong in (
        [{"question_id": 1, "answer": "2"}] * 2,
        [{"question_id": 8, "answer": "2"}],
        [],
    ):
        with pytest.raises(ValueError, match="answered twice or not annotated"):
            official_vqa_accuracy(wrong, annotations)


# ---------------------------------------------------------------- the MLLM's datasets
def score_of(name, pair):
    """Our score of a pair of the golden file."""
    said = pair["prediction"]
    if name in metrics.NORMALISERS:
        return metrics.vqa_accuracy(said, pair["answers"], name)
    if name == "gqa_exact_match":
        return metrics.exact_match(said, pair["answer"])
    if name == "chartqa":
        return metrics.relaxed_accuracy(said, pair["answer"])
    if name == "anls":
        return metrics.anls(said, pair["answers"])
    if name == "ocrbench":
        return metrics.ocrbench(said, pair["answer"], pair["dataset"])
    if name == "scienceqa":
        return metrics.scienceqa(said, "ABCDE"[pair["answer_index"]])
    return getattr(metrics, name)(said, pair["answer"])


@pytest.mark.parametrize(
    "name",
    "vqav2 okvqa_textvqa gqa_exact_match ai2d seed_image scienceqa realworldqa chartqa anls "
    "ocrbench mmmu_open".split(),
)
@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_every_score_equals_lmms_evals(name, space):
    for pair in PAIRS[name]:
        expected = pair["score_official"] if name == "mmmu_open" else pair["score"]
        raw = {**pair, "prediction": space + pair["prediction"] + space}
        assert score_of(name, raw) == expected, pair


@pytest.mark.parametrize("pair", PAIRS["mmmu_multiple_choice"], ids=lambda pair: pair["prediction"])
def test_the_letter_of_mmmu_is_lmms_evals(pair):
    """Where lmms-eval draws one at random, no letter is right."""
    right = []
    for letter in "ABCD":
        if metrics.mmmu_choice(pair["prediction"], pair["options"], letter) == 1:
            right.append(letter)
    assert right == ([] if pair["letter"] == "random" else [pair["letter"]])


@pytest.mark.parametrize("pair", PAIRS["vqa_normaliser"], ids=lambda pair: pair["text"])
def test_answers_are_normalised_as_lmms_eval_does(pair):
    for name in metrics.NORMALISERS:
        assert metrics.normalize_for(name, pair["text"]) == pair[name]
    with pytest.raises(ValueError, match="must be one of"):
        metrics.normalize_for("vqa", pair["text"])


def test_vqa_accuracy_is_the_mean_over_those_left_out():
    answers = ["yes", "yes", "no", "a yes", "Yes!"]
    # each of the four sees three others who agree, the fifth four
    assert metrics.vqa_accuracy(" YES ", answers) == 1
    # the two who say no see one other, the three others two of them
    assert metrics.vqa_accuracy("no", ["no", "no", "a b", "c", "d"]) == pytest.approx(2.666667 / 5)
    assert metrics.vqa_accuracy("no", []) == 0


def test_relaxed_accuracy_ends_at_five_percent():
    for said, answer, score in (
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-2.1", "-2.05", 1),
        ("5%", "0.05", 1),
        ("0", "0.0", 0),
        ("YES", "yes", 1),
    ):
        assert metrics.relaxed_accuracy(said, answer) == score, (said, answer)


def test_edit_distance_on_known_pairs():
    known = (("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0))
    for one, other, distance in known:
        assert metrics.edit_distance(one, other) == distance
        assert metrics.edit_distance(other, one) == distance


def test_anls_keeps_what_is_half_right_and_nothing_below():
    assert metrics.anls("ab", ["axxx", "abxx"]) == 0.5
    assert metrics.anls("ab", ["axxxx"]) == 0
    assert metrics.anls("", [""]) == 1
    assert metrics.anls("Two  Words", ["two words"]) == 1
    with pytest.raises(ValueError, match="at least one answer"):
        metrics.anls("a", [])


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The answer is (B).", "B"),
        ("the answer is c", ""),
        ("B: it is larger", "B"),
        ("I think (A) or (C)", "C"),
        ("Both. A", "A"),
        ("Cars", "C"),
        ("正解ではないが答えはD", "D"),
        ("?!", ""),
    ],
)
def test_a_letter_is_found_by_the_first_rule(said, letter):
    """Also computed by lmms-eval 0.7.3."""
    assert metrics.extract_letter(said) == letter


def test_an_open_answer_is_right_as_number_or_inside_a_text():
    assert metrics.mmmu_open("The cost is 1,234 dollars", "1234") == 1
    assert metrics.mmmu_open("The cost is 12.345 dollars", "12.35") == 1
    assert metrics.mmmu_open("about 1e3", "1000") == 1
    assert metrics.mmmu_open("relax", "x") == 0, "one letter inside a word is no match"
    assert metrics.mmmu_open("12", "1") == 0
    assert metrics.mmmu_open("It is red\nso it is Mars", ["venus", "mars"]) == 1


# ---------------------------------------------------------------- retrieval
def test_recall_by_hand():
    # two images with two captions each, and one with one
    scores = torch.tensor([[9.0, 1, 5, 2, 7], [3, 4, 8, 6, 1], [2, 5, 4, 3, 0]])
    image_index = torch.tensor([0, 0, 1, 1, 2])
    metrics = recall(scores, image_index)
    assert metrics["ir_r1"] == 3 / 5  # right for captions 0, 2, 3
    assert metrics["tr_r1"] == 2 / 3  # image 2's best caption is 1, which is image 0's
    assert metrics["ir_r5"] == metrics["tr_r5"] == metrics["tr_r10"] == 1
    assert metrics["rsum"] == pytest.approx(3 / 5 + 2 / 3 + 4)
    assert metrics["rmean"] == pytest.approx(metrics["rsum"] / 6)


# ---------------------------------------------------------------- captions
def test_bleu_is_its_formula():
    """Papineni et al.: clipped parts, their geometric mean, and the brevity penalty."""
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; lengths are equal
    written = ["the cat sat on a mat"]
    right = [["the cat sat on the mat"]]
    closed_form = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu(written, right) == pytest.approx(closed_form)
    assert bleu(right[0], right) == 1
    # a word counts as often as in one reference: 2 of 7
    assert bleu(["the " * 7], [["the cat is on the mat"]], orders=1) == pytest.approx(2 / 7)
    # too short: exp(1 - 6 / 4) times a perfect precision
    short = bleu(["the cat sat on"], right)
    assert short == pytest.approx(math.exp(1 - 6 / 4))
    # of two references that are as close, the shorter one counts: no penalty for 5 words
    assert bleu(["a b c d e"], [["a b c d e f", "a b c d"]]) == pytest.approx(1)
    # all captions together: sums, not a mean of means
    both = bleu(["a b c d", "x y z w"], [["a b c d"], ["a b c d"]])
    assert both == pytest.approx((1 / 2) ** (1 / 4 * 4))
    assert bleu(["x"], [["y"]]) == 0
