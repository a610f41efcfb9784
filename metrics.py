"""Metrics: plain functions of predictions and their answers.

VQA's answer normaliser, its soft scores and its official accuracy (visualqa.org/evaluation.html;
ACL 2023, section 4), means by the type of question, BLEU of captions, and the recall of image and
text retrieval (ACL 2023, tables 1 and 3). Scores are fractions from 0 to 1, not percent.

Shapes: I images, M captions.
"""

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# ---------------------------------------------------------------- VQA's answer normaliser
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't
    hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've
""".split()


def contraction_table() -> dict[str, str]:
    """{what people type: the contraction}. Any one of the apostrophes may be missing: both
    couldnt've and couldn'tve are couldn't've.
    """
    table = {}
    for contraction in CONTRACTIONS:
        for i, letter in enumerate(contraction):
            if letter == "'":
                typed = contraction[:i] + contraction[i + 1 :]
                table[typed] = contraction
    table["somebody'd"] = "somebodyd"  # the official table has this pair the wrong way round
    return table


CONTRACTION_OF = contraction_table()
DIGIT_OF = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official code means (?<!\d), no digit before it. What it says asks for no "=" or digit behind
# "<", and so "3." loses its period. The papers' numbers were made with it, so it stays.
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# The official code passes re.UNICODE where re.sub takes the number of replacements: 32 at most.
MOST_PERIODS = int(re.UNICODE)


@functools.cache
def normalize_answer(text: str) -> str:
    """An answer as VQA's evaluation writes it: 'The two-story house.' -> '2 story house'."""
    # a mark of punctuation becomes a space, or nothing where it stands beside a space
    has_number = COMMA_IN_NUMBER.search(text) is not None
    unpunctuated = text
    for mark in PUNCTUATION:
        stands_alone = f"{mark} " in text or f" {mark}" in text
        replacement = "" if stands_alone or has_number else " "
        unpunctuated = unpunctuated.replace(mark, replacement)
    unpunctuated = PERIOD.sub("", unpunctuated, count=MOST_PERIODS)

    # numbers up to ten as digits, no articles, contractions with their apostrophes
    words = []
    for word in unpunctuated.lower().split():
        word = DIGIT_OF.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTION_OF.get(word, word))
    return " ".join(words).replace(",", "")


# ---------------------------------------------------------------- VQA's scores
def answer_score(count: int) -> float:
    """The soft score of what `count` of ten annotators answered: the mean of min(n / 3, 1) with
    each of the ten left out in turn.
    """
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(count, 4)]


def mean_by(scores: Iterable[float], keys: Iterable[str | None]) -> dict[str, float]:
    """The mean score of each key, keys in alphabetical order; scores of the key None are left out.

    Raises ValueError if there are not as many keys as scores.
    """
    scores_of = defaultdict(list)
    for score, key in zip(scores, keys, strict=True):
        if key is not None:
            scores_of[key].append(score)
    means = {}
    for key in sorted(scores_of):
        means[key] = math.fsum(scores_of[key]) / len(scores_of[key])
    return means


def leave_one_out_score(answer: str, people: list[str]) -> float:
    """The mean over all people of min(how many of the others agree with the answer / 3, 1).

    Answer and people's answers are normalised.
    """
    agree = people.count(answer)
    others = len(people) - agree
    # without one of those who agree, agree - 1 of them are left; without one of the others, all
    score_without_one_who_agrees = min((agree - 1) / 3, 1)
    score_without_another = min(agree / 3, 1)
    return (agree * score_without_one_who_agrees + others * score_without_another) / len(people)


def official_vqa_accuracy(results: list[dict], annotations: list[dict]) -> dict:
    """VQA's official evaluation, from the raw annotations.

    results: [{"question_id", "answer"}]; annotations: [{"question_id", "answers": [{"answer"}],
    "question_type", "answer_type"}], the types may be missing. Returns the means over the
    "answered" of all "questions": "overall", "per_question_type", "per_answer_type". Raises
    ValueError for a question that is answered twice or has no annotation.
    """
    annotation_of = {annotation["question_id"]: annotation for annotation in annotations}
    times_answered = Counter(result["question_id"] for result in results)
    wrong = []
    for question_id, times in times_answered.items():
        if times > 1 or question_id not in annotation_of:
            wrong.append(question_id)
    if wrong or not results:
        raise ValueError(
            f"{len(wrong)} of {len(results)} questions are answered twice or not annotated: "
            f"{wrong[:5]}"
        )

    scores = []
    question_types = []
    answer_types = []
    for result in results:
        annotation = annotation_of[result["question_id"]]
        people = [normalize_answer(person["answer"]) for person in annotation["answers"]]
        scores.append(leave_one_out_score(normalize_answer(result["answer"]), people))
        question_types.append(annotation.get("question_type"))
        answer_types.append(annotation.get("answer_type"))
    overall = math.fsum(scores) / len(scores)
    return {
        "overall": overall,
        "answered": len(results),
        "questions": len(annotation_of),
        "per_question_type": mean_by(scores, question_types),
        "per_answer_type": mean_by(scores, answer_types),
    }


# ---------------------------------------------------------------- captions
def count_sequences(words: list[str], order: int) -> Counter:
    """How often each sequence of `order` words is in a text."""
    starts = range(len(words) - order + 1)
    return Counter(tuple(words[i : i + order]) for i in starts)


def closest_length(length: int, references: list[list[str]]) -> int:
    """The length of the reference that is closest, the shorter one of two."""
    lengths = sorted(len(words) for words in references)
    return min(lengths, key=lambda other: abs(other - length))


def bleu(candidates: list[str], references: list[list[str]], orders: int = 4) -> float:
    """BLEU of all candidates together (Papineni et al., ACL 2002), without smoothing.

        BLEU = min(1, exp(1 - r / c)) * (p_1 * ... * p_n)^(1/n)

    p_k: of the sequences of k words in the candidates, the part that is in their references too,
    where a sequence counts at most as often as in one reference; c: words of all candidates; r: of
    the references of the closest lengths. Words are what spaces separate. references: the texts
    that are right for each candidate, at least one.
    """
    found = [0] * orders
    total = [0] * orders
    candidate_length = 0
    reference_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        words = candidate.split()
        reference_words = [text.split() for text in texts]
        candidate_length += len(words)
        reference_length += closest_length(len(words), reference_words)
        for k in range(orders):
            counts = count_sequences(words, k + 1)
            most: Counter = Counter()
            for other in reference_words:
                most |= count_sequences(other, k + 1)
            total[k] += counts.total()
            found[k] += (counts & most).total()
    if min(found) == 0:
        return 0.0
    logarithms = [math.log(part / whole) for part, whole in zip(found, total, strict=True)]
    brevity = min(0.0, 1 - reference_length / candidate_length)
    return math.exp(brevity + math.fsum(logarithms) / orders)


# ---------------------------------------------------------------- retrieval
def recall(scores: Tensor, image_index: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 of image retrieval (ir) and text retrieval (tr), their mean and sum.

    scores: (I, M), the higher the better the caption fits the image; image_index: (M,), the image
    that each caption belongs to.
    """
    image_numbers = torch.arange(len(scores))
    belongs = image_index[None] == image_numbers[:, None]  # (I, M)
    metrics = {}
    for name, dim in (("ir", 0), ("tr", 1)):
        for k in (1, 5, 10):
            best = scores.topk(min(k, scores.shape[dim]), dim=dim).indices
            found = belongs.gather(dim, best).any(dim)
            metrics[f"{name}_r{k}"] = found.double().mean().item()
    total = sum(metrics.values())
    return {**metrics, "rmean": total / 6, "rsum": total}
