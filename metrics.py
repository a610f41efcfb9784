"""Metrics: plain functions of predictions and their answers.

VQA's answer normaliser, its soft scores and its official accuracy (visualqa.org/evaluation.html;
ACL 2023, section 4), means by the type of question, BLEU of captions, the scores of the MLLM's
datasets that need no judge (TCSVT 2025, tables XII and XIII), and the recall of image and text
retrieval (ACL 2023, tables 1 and 3). Scores are fractions from 0 to 1, not percent.

The scores of the MLLM's datasets are those of lmms-eval 0.7.3, edge cases included, as other
people's numbers were made with it. Each takes what the model has said and strips it first.

Shapes: I images, M captions.
"""

import functools
import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

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
COMMAS_IN_NUMBER = re.compile(r"\d,+\d")  # what lmms-eval asks for instead
# The official code means (?<!\d), no digit before it. What it says asks for no "=" or digit behind
# "<", and so "3." loses its period. The papers' numbers were made with it, so it stays.
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
# The official code passes re.UNICODE where re.sub takes the number of replacements: 32 at most.
MOST_PERIODS = int(re.UNICODE)


@functools.cache
def normalize_answer(text: str, comma_in_number: re.Pattern[str] = COMMA_IN_NUMBER) -> str:
    """An answer as VQA's evaluation writes it: 'The two-story house.' -> '2 story house'.

    comma_in_number: how a number with commas looks.
    """
    # a mark of punctuation becomes a space, or nothing where it stands beside a space
    has_number = comma_in_number.search(text) is not None
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


# ---------------------------------------------------------------- the MLLM: short answers
NORMALISERS = ("vqav2", "okvqa_textvqa")


def normalize_for(normaliser: str, text: str) -> str:
    """An answer as lmms-eval writes it before it compares: "vqav2" is `normalize_answer`;
    "okvqa_textvqa" first lowers the text, drops its commas and question marks, and parts 's from
    its word.
    """
    if normaliser == "okvqa_textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    elif normaliser != "vqav2":
        raise ValueError(f"the normaliser is {normaliser!r}; it must be one of {NORMALISERS}")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return normalize_answer(text, COMMAS_IN_NUMBER)


def vqa_accuracy(prediction: str, answers: Sequence[str], normaliser: str = "vqav2") -> float:
    """VQAv2, OK-VQA and TextVQA: the mean over all people i of min(1, n_i / 3), where n_i of the
    people other than i gave the predicted answer. All are normalised before.

    Of ten people 1, 2, 3, 4 who agree give 0.3, 0.6, 0.9, 1. normaliser: "vqav2", or for the other
    two datasets "okvqa_textvqa". Without answers the score is 0.
    """
    predicted = normalize_for(normaliser, prediction.strip())
    people = [normalize_for(normaliser, answer) for answer in answers]
    if not people:
        return 0.0
    return leave_one_out_score(predicted, people)


PUNCTUATION_MARKS = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, answer: str) -> float:
    """GQA: 1 if both are equal in lower case without ASCII punctuation, else 0.

    Articles, numbers in words and inner spaces stay as they are.
    """
    predicted = prediction.strip().lower().translate(PUNCTUATION_MARKS)
    return float(predicted == answer.lower().translate(PUNCTUATION_MARKS))


def number_in(text: str) -> float | None:
    """A text as a number; 5% is 0.05. None if it is none."""
    try:
        if text.endswith("%"):
            return float(text.rstrip("%")) / 100
        return float(text)
    except ValueError:
        return None


def relaxed_accuracy(prediction: str, answer: str) -> float:
    """ChartQA: for numbers p and a != 0 it is 1 if |p - a| / |a| <= 0.05; for all else 1 if both
    are equal in lower case; else 0.
    """
    prediction = prediction.strip()
    predicted = number_in(prediction)
    expected = number_in(answer)
    if predicted is None or expected is None or expected == 0:
        return float(prediction.lower() == answer.lower())
    return float(abs(predicted - expected) / abs(expected) <= 0.05)


def edit_distance(one: str, other: str) -> int:
    """How many characters must be put in, taken out or replaced to make one text the other
    (Levenshtein).
    """
    previous = list(range(len(other) + 1))  # from nothing to each beginning of the other
    for i, letter in enumerate(one, 1):
        current = [i]
        for j, other_letter in enumerate(other, 1):
            replaced = previous[j - 1] + (letter != other_letter)
            current.append(min(replaced, previous[j] + 1, current[j - 1] + 1))
        previous = current
    return previous[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """DocVQA and InfoVQA, average normalised Levenshtein similarity: s = 1 - min over the answers a
    of lev(p, a) / max(|p|, |a|), and 0 where s < 0.5.

    The distance is that of the texts in lower case with single spaces; the lengths are those
    before. Two empty texts have s = 1. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("anls needs at least one answer")
    prediction = prediction.strip()
    predicted = " ".join(prediction.lower().split())
    distances = []
    for answer in answers:
        expected = " ".join(answer.lower().split())
        # lmms-eval counts capitals, and those of some letters are two
        length = max(len(prediction.upper()), len(answer.upper()))
        distance = edit_distance(expected, predicted)
        distances.append(distance / length if length > 0 else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= 0.5 else 0.0


# full-width forms of ASCII, as Chinese texts have them -> ASCII
HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
HALF_WIDTH[0x3000] = ord(" ")


def ocrbench(prediction: str, answers: str | Sequence[str], dataset: str = "") -> float:
    """OCRBench: 1 if the prediction contains any of the answers, else 0; its 1000 scores are added.

    Both are in lower case, with half-width letters and with spaces for newlines. dataset: that of
    the question; for the formulas of "HME100k" letters keep their case, and all spaces are removed.
    """
    if isinstance(answers, str):
        answers = [answers]

    def clean(text: str) -> str:
        if dataset == "HME100k":
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(HALF_WIDTH).lower().strip().replace("\n", " ")

    predicted = clean(prediction.strip())
    return float(any(clean(answer) in predicted for answer in answers))


# ---------------------------------------------------------------- the MLLM: choices
def scienceqa(prediction: str, letter: str) -> float:
    """ScienceQA: 1 if the prediction is the letter, in any case, or begins with it as a capital and
    a full stop ("B. rock"); else 0.
    """
    prediction = prediction.strip()
    letter = letter.strip().lower()
    if prediction.lower() == letter:
        return 1.0
    begins_with_capital = prediction[:1].isupper() and prediction[1:2] == "."
    return float(begins_with_capital and prediction[0].lower() == letter)


def seed_image(prediction: str, letter: str) -> float:
    """SEED: 1 if the first character of the prediction is the letter, in any case; else 0."""
    first = prediction.strip()[:1]
    return float(first.lower() == letter.strip().lower())


AI2D_CHOICE = re.compile(r"\s*([A-Z])\.")


def ai2d(prediction: str, letter: str) -> float:
    """AI2D: `exact_match` of the letter and the prediction, or of its beginning where that is a
    capital and a full stop.
    """
    match = AI2D_CHOICE.match(prediction)
    if match is not None:
        prediction = match.group(1)
    return exact_match(prediction, letter)


def strip_marks(text: str, marks: str) -> str:
    """The text without each of these marks at its ends, one mark after the other."""
    text = text.strip()
    for mark in marks:
        text = text.strip(mark)
    return text


def last_letter(places: Iterable[tuple[int, str]]) -> str:
    """The letter of the last place; the first of those that share it. Empty without any."""
    best_place = -1
    best_letter = ""
    for place, letter in places:
        if place > best_place:
            best_place = place
            best_letter = letter
    return best_letter


REALWORLDQA_LETTERS = "ABCD"
ANSWER_PHRASES = (
    "answer is",
    "the answer is",
    "correct answer is",
    "the correct answer is",
    "best answer is",
    "the best answer is",
    "my answer is",
    "correct option is",
    "the correct option is",
    "best option is",
    "the best option is",
    "choice is",
    "the choice is",
    "correct choice is",
    "the correct choice is",
    "my choice is",
    "i choose",
    "i select",
    "i pick",
    # Korean, Chinese, Japanese
    "옵션",
    "정답은",
    "답은",
    "답:",
    "答案是",
    "答案为",
    "选",
    "答えは",
)


def letter_after_phrases(text: str) -> str:
    """The letter that comes last among the first A, first B ... behind the first "the answer is",
    the first "my choice is" and so on. Empty without any.
    """
    lowered = text.lower()
    places = []
    for phrase in ANSWER_PHRASES:
        start = lowered.find(phrase)
        if start >= 0:
            for letter in REALWORLDQA_LETTERS:
                places.append((text.find(letter, start + len(phrase)), letter))
    return last_letter(places)


def extract_letter(prediction: str) -> str:
    """The choice of A, B, C, D that a text means; empty if it has none of these capitals.

    The first rule that finds a letter decides: the text begins with it, or ends with it, and no
    other letter is beside it; it follows a phrase of `letter_after_phrases`; it stands as (A), A.,
    A:, A), A with a space behind it, anywhere. The last of several counts.
    """
    text = strip_marks(prediction, ",.!?;:'\"")
    inner = text.strip()
    if not inner:
        return ""
    if inner[0] in REALWORLDQA_LETTERS and not inner[1:2].isalpha():
        return inner[0]
    if inner[-1] in REALWORLDQA_LETTERS and not inner[-2:-1].isalpha():
        return inner[-1]
    spaced = f" {text} "
    after_phrase = letter_after_phrases(spaced)
    if after_phrase:
        return after_phrase
    for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}"):
        places = []
        for letter in REALWORLDQA_LETTERS:
            places.append((spaced.rfind(form.format(letter)), letter))
        found = last_letter(places)
        if found:
            return found
    return ""


def realworldqa(prediction: str, answer: str) -> float:
    """RealWorldQA: for the answers A to D it is 1 if `extract_letter` finds the letter; for others
    1 if the prediction, in lower case and without full stops at its end, is the answer; else 0.
    """
    answer = answer.strip()
    if answer.upper() in tuple(REALWORLDQA_LETTERS):
        return float(extract_letter(prediction) == answer.upper())
    return float(prediction.lower().strip().rstrip(".") == answer.lower())


# ---------------------------------------------------------------- the MLLM: MMMU
MMMU_MARKS = ",.!?;:'"


def mmmu_candidates(text: str, options: Sequence[str]) -> list[tuple[int, str]]:
    """(place, letter) of the choices that a text may mean, by the first rule that finds one: (A);
    A and a space; A. ; of more than five words, the text of the option.

    The place is that of the last (A), of the last A between spaces, or of the option's last text;
    -1 where there is none.
    """
    letters = [chr(ord("A") + i) for i in range(len(options))]
    for form, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = []
        for letter in letters:
            if form.format(letter) in text:
                found.append((text.rfind(placed.format(letter)), letter))
        if found:
            return found

    found = []
    if len(text.split()) > 5:
        lowered = text.lower()
        for letter, option in zip(letters, options, strict=True):
            place = lowered.rfind(option.lower())
            if place >= 0:
                found.append((place, letter))
    return found


def mmmu_choice(prediction: str, options: Sequence[str], letter: str) -> float:
    """MMMU's questions with options: 1 if the last of `mmmu_candidates` is the letter, else 0.

    A prediction that means no option is wrong here; lmms-eval draws one of the letters for it, so
    that its score depends on the order of the questions.
    """
    text = f" {strip_marks(prediction, MMMU_MARKS)} "
    candidates = mmmu_candidates(text, options)
    if not candidates:
        return 0.0
    best = max(candidates, key=lambda candidate: candidate[0])  # the first of several
    return float(best[1] == letter)


MMMU_INDICATORS = (
    "could be ",
    "so ",
    "is ",
    "thus ",
    "therefore ",
    "final ",
    "answer ",
    "result ",
)
MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # all others
)


def mmmu_values(text: str) -> list[str | float]:
    """What is compared of a text: a number, rounded to two places; or itself in lower case. One
    character alone gets a space in front or behind, as it would be in any text.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    text = text.lower()
    if len(text) == 1:
        return [f" {text}", f"{text} "]
    return [text]


def shortest_tail(line: str, indicators: Sequence[str]) -> str:
    """What stands behind the last "so", "is", "answer" ... of a line, the shortest of them. Empty
    without any.
    """
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            tail = line.split(indicator)[-1].strip()
            # as in the official code, an empty tail gives way to any that comes after it
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def mmmu_parts(prediction: str) -> list[str]:
    """The parts of a prediction that may hold the answer: the shortest tail of each line, or where
    no line has one, the whole in lower case. In the last line "=" begins a tail too.
    """
    text = prediction.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines, 1):
        indicators: Sequence[str] = MMMU_INDICATORS
        if number == len(lines):
            indicators = (*MMMU_INDICATORS, "=")
        tail = shortest_tail(line, indicators)
        if tail and tail not in tuple(MMMU_MARKS):
            parts.append(tail)
    return parts or [text]


def mmmu_open(prediction: str, answer: str | Sequence[str]) -> float:
    """MMMU's questions without options: 1 if a number of the prediction is an answer, or a text of
    it contains one; else 0.

    The texts are `mmmu_parts`, the numbers all those in them, to two places. answer: one or
    several, any of which is right.
    """
    # what the prediction says
    parts = mmmu_parts(prediction)
    predicted: list[str | float] = []
    for part in parts:
        predicted += mmmu_values(part)
        for pattern in MMMU_NUMBERS:
            for number in pattern.findall(part):
                predicted += mmmu_values(number)

    # what would be right
    expected: list[str | float] = []
    for text in [answer] if isinstance(answer, str) else answer:
        expected += mmmu_values(text)
    texts = [value for value in expected if isinstance(value, str)]
    for value in predicted:
        if isinstance(value, str):
            is_right = any(text in value for text in texts)
        else:
            is_right = value in expected
        if is_right:
            return 1.0
    return 0.0


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
