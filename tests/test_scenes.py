"""scenes.py: what is said about the demo's pictures, read back from their pixels."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

import images
import scenes
from scenes import demo_source

PALETTE = {**scenes.COLORS, "gray": images.GRAY}
RELATIONS = {
    ("left of", 0): "left of",
    ("left of", 1): "right of",
    ("above", 0): "above",
    ("above", 1): "below",
}


def find_gap(ink):
    """(axis, first part, second part): the lines with ink, parted where some have none."""
    for axis in (0, 1):
        filled = np.flatnonzero(ink.any(axis))
        gaps = np.flatnonzero(np.diff(filled) > 1)
        if len(gaps):
            break
    return axis, filled[: gaps[0] + 1], filled[gaps[0] + 1 :]


def look(image):
    """The scene in a picture: (two (size, color, shape), relation), the left or top one first."""
    pixels = np.array(image).astype(int)
    distances = {name: np.abs(pixels - color).sum(-1) for name, color in PALETTE.items()}
    ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
    axis, first, second = find_gap(ink)
    things = []
    for part in (first, second):
        window = (slice(None), part) if axis == 0 else part
        mask = np.zeros_like(ink)
        mask[window] = ink[window]
        ys, xs = np.nonzero(mask)
        width = np.ptp(xs) + 1
        height = np.ptp(ys) + 1
        color = min(PALETTE, key=lambda name: distances[name][mask].sum())  # noqa: B023
        assert distances[color][int(ys.mean()), int(xs.mean())] == 0  # at the object's centre
        fill = mask.sum() / (width * height)
        shape = "square" if fill > 0.95 else "circle"
        if fill <= 0.65:
            shape = "triangle"
        size = "small" if width < 0.32 * len(ink) else "large"
        things.append((size, color, shape))
    return things, ("left of", "above")[axis]


def says(things, relation):
    """All true "A relation B" triples."""
    return {(things[i], RELATIONS[relation, i], things[1 - i]) for i in (0, 1)}


def claim(text):
    """'a large red circle is above a small blue square' -> the triple that `says` gives."""
    first, relation, second = text.replace(" is ", "|").replace(" a ", "|a ").split("|")
    return tuple(first.split()[1:]), relation, tuple(second.split()[1:])


def matching(things, relation, words):
    """Which of the two things a noun phrase fits: 'red circle', 'small object', 'left square'."""
    places = {"left of": ("left", "right"), "above": ("top", "bottom")}[relation]
    fitting = []
    for i, thing in enumerate(things):
        if all(word in (*thing, "object", places[i]) for word in words):
            fitting.append(i)
    return fitting


@pytest.mark.parametrize("split, size", [("train", 64), ("heldout", 64), ("heldout", 96)])
def test_captions_say_what_the_pixels_show(split, size):
    source = demo_source("captions", split, 120, image_size=size)
    for i in range(120):
        row = source[i]
        assert claim(row["text"]) in says(*look(row["images"][0])), row["text"]


def true_answer(text, things, relation):
    """The answer to a question of the demo, from what `look` saw."""
    words = text.rstrip("?").split()
    if words[0] == "what":
        (which,) = matching(things, relation, words[4:])  # the phrase is unambiguous
        size, color, shape = things[which]
        return {"size": size, "color": color, "shape": shape}[words[1]]
    if words[1] == "there":
        return "yes" if matching(things, relation, words[3:]) else "no"
    second_the = words.index("the", 2)
    middle = 3
    while words[middle] not in ("left", "right", "above", "below"):
        middle += 1
    (a,) = matching(things, relation, words[2:middle])
    (b,) = matching(things, relation, words[second_the + 1 :])
    told = (things[a], " ".join(words[middle:second_the]), things[b])
    return "yes" if told in says(things, relation) else "no"


def test_questions_have_the_answers_that_the_pixels_give():
    source = demo_source("questions", "heldout", 150)
    yes = []
    for i in range(450):
        row = source[i]
        (answer,) = row["answers"]
        things, relation = look(row["images"][0])
        assert answer == true_answer(row["text"], things, relation), row["text"]
        assert answer in scenes.DEMO_ANSWERS, row["text"]
        assert row["question_type"] in ("color", "size", "shape", "there", "the")
        if row["text"].startswith("is"):
            yes.append(answer == "yes")
    assert row["question_id"] == 449
    assert abs(np.mean(yes) - 0.5) < 0.1


def test_statements_about_pairs_follow_from_the_pixels():
    source = demo_source("statements", "heldout", 200)
    for i in range(200):
        row = source[i]
        told, place = row["text"].split(" in ")
        left, right = (claim(told) in says(*look(image)) for image in row["images"])
        truth = {
            "left image": left,
            "right image": right,
            "both images": left and right,
            "one image": left != right,
        }
        assert truth[place] == bool(row["label"]), row["text"]
    assert sum(row["label"] for row in source.texts()) == 100


def agrees(told, things, relation, hidden):
    """Whether what is told can be true of what is seen."""
    first, told_relation, second = told
    for i in (0, 1):
        first_fits = i in hidden or things[i] == first
        second_fits = 1 - i in hidden or things[1 - i] == second
        if RELATIONS[relation, i] == told_relation and first_fits and second_fits:
            return True
    return False


def test_hypotheses_follow_from_the_pixels():
    source = demo_source("hypotheses", "heldout", 210)
    covered = Counter()
    for i in range(210):
        row = source[i]
        things, relation = look(row["images"][0])
        hidden = [i for i, thing in enumerate(things) if thing[1] == "gray"]
        expected = 0
        if agrees(claim(row["text"]), things, relation, hidden):
            expected = 1 if hidden else 2
        assert row["label"] == expected, row["text"]
        covered[row["label"]] += len(hidden)
    assert covered[2] == 0
    assert covered[1] == 70
    assert 20 < covered[0] < 50
    assert Counter(row["label"] for row in source.texts()) == {0: 70, 1: 70, 2: 70}


def test_conversations_are_true():
    captions = demo_source("chat_captions", "heldout", 20)
    for i in range(20):
        row = captions[i]
        (first, second), relation = look(row["images"][0])
        human, gpt = row["conversation"]
        assert human == {"from": "human", "value": "<image>"}
        assert gpt["from"] == "gpt"
        assert gpt["value"] == f"a {' '.join(first)} is {relation} a {' '.join(second)}"
    questions = demo_source("chat", "heldout", 20)
    for i in range(20):
        row = questions[i]
        things, relation = look(row["images"][0])
        asked = [turn["value"] for turn in row["conversation"][::2]]
        answers = [turn["value"] for turn in row["conversation"][1::2]]
        assert len(asked) == len(answers) == len(set(asked)) == 3
        assert [text.startswith("<image>\n") for text in asked] == [True, False, False]
        for question, answer in zip(asked, answers, strict=True):
            question = question.removeprefix("<image>\n")
            assert answer == true_answer(question, things, relation)
            assert answer in scenes.DEMO_ANSWERS


def patterns_of(image):
    """The scene in a picture with patterns, as `look` gives it, and the patterns of its things."""
    pixels = np.array(image).astype(int)
    background = pixels[0, 0]
    ink = np.abs(pixels - background).sum(-1) > 0
    # what is between the lines of a pattern is filled: then it is a scene as any other
    mask = Image.fromarray(ink).convert("L").filter(ImageFilter.MaxFilter(3))
    whole = np.array(mask.filter(ImageFilter.MinFilter(3))) > 0
    axis, first, second = find_gap(whole)
    filled = np.full_like(pixels, background)
    patterns = []
    for part in (first, second):
        window = np.zeros_like(ink)
        window[(slice(None), part) if axis == 0 else part] = True
        ys, xs = np.nonzero(ink & window)
        colors, counts = np.unique(pixels[ys, xs], axis=0, return_counts=True)
        assert len(colors) == 1
        filled[whole & window] = colors[0]
        # which of the lines have no ink at all
        found = set()
        for name, values in (("rows", ys), ("columns", xs), ("checks", xs + ys)):
            if len(set(values % 2)) == 1:
                found.add(name)
        (pattern,) = found
        patterns.append(pattern)
    return *look(Image.fromarray(filled.astype(np.uint8))), patterns


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_questions_about_details_have_the_answers_that_the_pixels_give(split):
    source = demo_source("details", split, 30, image_size=128)
    kinds = []
    for i in range(30):
        (image,), rows = source.load(i)
        things, relation, patterns = patterns_of(image)
        assert things[0][1] != things[1][1]
        places = {"left of": ("left", "right"), "above": ("top", "bottom")}[relation]
        for row in rows:
            words = row["text"].rstrip("?").split()
            (which,) = matching(things, relation, words[-2:])
            size, color, shape = things[which]
            place = places[which]
            pattern = patterns[which]
            facts = {"size": size, "color": color, "shape": shape, "pattern": pattern}
            answer = place if words[0] == "where" else facts[words[1]]
            assert row["answers"] == {answer: 1.0}, row["text"]
            assert row["question_type"] == ("detail" if words[1] == "pattern" else "overview")
            kinds.append(row["question_type"])
    assert rows[-1]["question_id"] == 119
    assert Counter(kinds) == {"detail": 60, "overview": 60}
    # the conversations are the same, in the same order
    chats = demo_source("chat_details", split, 30, image_size=128)
    for i in (0, 29):
        turns = [turn["value"] for turn in chats[i]["conversation"]]
        rows = [source[4 * i + k] for k in range(4)]
        assert turns[0] == f"<image>\n{rows[0]['text']}"
        assert turns[2::2] == [row["text"] for row in rows[1:]]
        assert turns[1::2] == [next(iter(row["answers"])) for row in rows]


def test_details_say_where_the_things_are():
    part = scenes.Demo("details", "train", 12, 0, 128)
    for i in range(12):
        record = part.record(i)
        things, _, patterns = patterns_of(record["image"])
        pixels = np.array(record["image"]).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(-1) > 0
        for thing, seen, pattern in zip(record["things"], things, patterns, strict=True):
            assert (thing["size"], thing["color"], thing["shape"]) == seen
            assert thing["pattern"] == pattern
            # Pillow rounds outwards
            left, top, right, bottom = (round(value) for value in thing["box"])
            ink[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2] = False
        assert not ink.any()


def test_a_picture_of_half_the_size_does_not_show_the_patterns():
    """The three patterns of a scene differ in half of the pixels of its things; half as large, in
    none but those near an edge, by little.
    """
    scene = scenes.random_scene(random.Random(0), False)
    large = []
    small = []
    for name in scenes.PATTERNS:
        image, _ = scenes.paint_patterned(random.Random(1), scene, [name, name], 128)
        large.append(np.array(image).astype(int))
        small.append(np.array(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(int))
    ink = (large[0] != large[0][0, 0]).any(-1)
    # the things without their edges, half as large
    whole = Image.fromarray(ink).convert("L").filter(ImageFilter.MaxFilter(3))
    inside = np.array(whole.filter(ImageFilter.MinFilter(11)))[::2, ::2] > 0
    assert inside.sum() > 60
    for k in (1, 2):
        assert (large[0] != large[k]).any(-1).mean() > 0.9 * ink.mean()
        difference = np.abs(small[0] - small[k])
        assert difference.max() <= 48
        assert difference[inside].max() <= 1


def test_the_splits_are_disjoint_in_content():
    seen = {"train": set(), "heldout": set()}
    for seed, kind in enumerate(("captions", "questions", "statements", "hypotheses")):
        for split in ("train", "heldout"):
            source = demo_source(kind, split, 150, seed=seed)
            for i in range(150):
                for image in source.images(i):
                    things, relation = look(image)
                    if "gray" not in (things[0][1], things[1][1]):
                        seen[split].add((*things, relation))
    assert not seen["train"] & seen["heldout"]
    assert len(seen["train"]) > 400
    assert len(seen["heldout"]) > 150


@pytest.mark.parametrize(
    "kind, words, limit",
    [("questions", (0, 99), 0.5), ("statements", (-2, None), 0.6), ("hypotheses", (1, 3), 0.45)],
)
def test_texts_alone_do_not_tell_the_answers(kind, words, limit):
    """The commonest training answer to the same question, or the same two words, is often wrong."""

    def key(row):
        return tuple(row["text"].split()[slice(*words)])

    def truth(row):
        return str(row.get("answers", row.get("label")))

    counts = {}
    for row in demo_source(kind, "train", 1500).texts():
        counts.setdefault(key(row), Counter())[truth(row)] += 1
    hits = []
    for row in demo_source(kind, "heldout", 500).texts():
        if key(row) in counts:
            hits.append(counts[key(row)].most_common(1)[0][0] == truth(row))
    assert len(hits) > 300
    assert np.mean(hits) < limit


def test_the_demo_is_a_function_of_seed_and_index():
    one = demo_source("captions", "train", 40, 1)
    same = demo_source("captions", "train", 40, 1)
    other = demo_source("captions", "train", 40, 2)
    forward = [one[i]["text"] for i in range(40)]
    backward = [same[i]["text"] for i in reversed(range(40))]
    assert forward == backward[::-1]
    for i in range(40):
        assert np.array_equal(one.images(i)[0], same.images(i)[0])
    assert one.texts() == same.texts() != other.texts()
    with pytest.raises(AssertionError, match="val"):
        demo_source("captions", "val", 4)


def test_the_scenes_stay_what_they_were():
    """Golden texts and pixels: a change of the random draws, or of SEED_NAMES, would show here."""

    def first_row(kind):
        return demo_source(kind, "train", 1, seed=0).texts(1)[0]

    caption = "a small yellow square is right of a large black circle"
    assert first_row("captions")["text"] == caption
    assert first_row("questions")["text"] == "is the triangle left of the square?"
    statement = "a small blue circle is right of a small yellow square in right image"
    assert first_row("statements")["text"] == statement
    hypothesis = "a small green circle is above a small black circle"
    assert first_row("hypotheses")["text"] == hypothesis
    question, answer = first_row("chat")["conversation"][:2]
    assert question["value"] == "<image>\nis the square right of the circle?"
    assert answer["value"] == "yes"
    assert first_row("details")["text"] == "what pattern is on the yellow object?"
    told = first_row("chat_captions")["conversation"][1]["value"]
    assert told == "a large green circle is above a small black square"


def test_digests_of_drawn_data_tell_kind_split_size_and_seed():
    digest = demo_source("captions", "train", 40, 1).digest
    assert digest == demo_source("captions", "train", 40, 1).digest
    others = [
        demo_source("questions", "train", 40, 1),
        demo_source("captions", "heldout", 40, 1),
        demo_source("captions", "train", 41, 1),
        demo_source("captions", "train", 40, 2),
    ]
    assert len({digest, *(other.digest for other in others)}) == 5
