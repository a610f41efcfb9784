"""metrics.py"""
from collections import Counter
from collections import defaultdict
from torch import Tensor
import functools
import math
import re
import torch


# a key is its contraction with one apostrophe left out: couldnt've and couldn'tve -> couldn't've
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
    mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've""".split()
                for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official table


DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}


ARTICLES = ("a", "an", "the")


PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


COMMA = re.compile(r"\d,\d")


PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # meant: (?<!\d); as it is, "3." loses its period. Kept


@functools.cache
def normalize_answer(text: str) -> str:
    """An answer as the ViLT family writes it: 'The two-story house.' -> '2 story house'."""
    out = text
    for mark in PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or COMMA.search(text)
        out = out.replace(mark, "" if alone else " ")
    words = (DIGITS.get(word, word) for word in PERIOD.sub("", out, count=32).lower().split())  # 32: re.UNICODE
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES).replace(",", "")


def answer_score(count: int) -> float:
    """Soft score of what `count` of ten annotators answered: the mean of min(n / 3, 1) with each left out in turn."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


def mean_by(scores, keys) -> dict:
    """Mean score of each key, keys in alphabetical order, without None."""
    groups = defaultdict(list)
    for score, key in zip(scores, keys, strict=True):
        groups[key].append(score)
    return {key: math.fsum(groups[key]) / len(groups[key]) for key in sorted(k for k in groups if k is not None)}


def official_vqa_accuracy(results: list[dict], annotations: list[dict]) -> dict:
    """VQA's official evaluation (visualqa.org/evaluation.html) from the raw annotations.

    results: [{"question_id", "answer"}]; annotations: [{"question_id", "answers": [{"answer"}], "question_type",
    "answer_type"}]. All answers are normalised; each person is left out in turn; the score is the mean of min(matches
    among the others / 3, 1). Means over the "answered" of all "questions". Answered twice or unknown: ValueError.
    """
    known, times, scores = {a["question_id"]: a for a in annotations}, Counter(r["question_id"] for r in results), []
    wrong = [q for q, n in times.items() if n > 1 or q not in known]
    if wrong or not results:
        raise ValueError(f"{len(wrong)} of {len(results)} questions are answered twice or not annotated: {wrong[:5]}")
    for result in results:
        people = [normalize_answer(person["answer"]) for person in known[result["question_id"]]["answers"]]
        n = people.count(normalize_answer(result["answer"]))
        # without one of the n who agree n - 1 are left, without one of the others n
        scores.append((n * min((n - 1) / 3, 1) + (len(people) - n) * min(n / 3, 1)) / len(people))
    kinds = {key: [known[r["question_id"]].get(key) for r in results] for key in ("question_type", "answer_type")}
    return {"overall": math.fsum(scores) / len(scores), "answered": len(results), "questions": len(known),
            **{f"per_{key}": mean_by(scores, values) for key, values in kinds.items()}}


def recall(scores: Tensor, image_index: Tensor) -> dict:
    """R@1/5/10 of image (ir) and text retrieval (tr), their mean and sum; scores (I, M), each caption's image (M,)."""
    own, metrics = image_index[None] == torch.arange(len(scores))[:, None], {}
    for name, dim in (("ir", 0), ("tr", 1)):
        for k in (1, 5, 10):
            best = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
            metrics[f"{name}_r{k}"] = own.gather(dim, best).any(dim).double().mean().item()
    return {**metrics, "rmean": sum(metrics.values()) / 6, "rsum": sum(metrics.values())}
