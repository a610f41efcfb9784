"""The built-in demo data: scenes of two coloured shapes, with texts that are true or false of them.

It needs no download: Pillow draws the scenes from a seed, for every kind of records in data.py.
Everything is a function of (seed, kind, split, index). The splits train and heldout share no scene.
What is said about a scene can be read off its pixels, and tests/test_scenes.py does that.

The order of the random draws in each function below makes the scenes what they are: leave it.
"""

import random
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import SNLI_LABELS, Part, Source
from images import GRAY
from tokenizer import Tokenizer, train_tokenizer

# ---------------------------------------------------------------- what a scene is
COLORS = {
    "red": (220, 0, 0),
    "green": (0, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (250, 200, 0),
    "black": (9, 9, 9),
}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 0.12, "large": 0.20}  # radius as a part of the picture's side
OPPOSITE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
PLACES = {
    "left of": ("left", "right"),
    "above": ("top", "bottom"),
}  # of the first, the second thing
DEMO_ANSWERS = ["yes", "no", *SIZES, *COLORS, *SHAPES]


class Thing(NamedTuple):
    size: str
    color: str
    shape: str


class Scene(NamedTuple):
    first: Thing
    second: Thing
    relation: str  # first is "left of" or "above" second


COVER = Thing("large", "gray", "square")  # hides what is behind it


def random_thing(draw: random.Random) -> Thing:
    size = draw.choice(list(SIZES))
    color = draw.choice(list(COLORS))
    shape = draw.choice(SHAPES)
    return Thing(size, color, shape)


def is_heldout(scene: Scene) -> bool:
    """Whether the scene belongs to the held-out fifth, by a hash of its description."""
    return zlib.crc32(describe(scene).encode()) % 5 == 0


def random_scene(draw: random.Random, heldout: bool) -> Scene:
    """Two different things. A training scene is never a held-out one, in no record of any kind."""
    while True:
        first = random_thing(draw)
        second = random_thing(draw)
        relation = draw.choice(list(PLACES))
        scene = Scene(first, second, relation)
        if first != second and is_heldout(scene) == heldout:
            return scene


# ---------------------------------------------------------------- what is said about it
def describe(scene: Scene, swap: bool = False) -> str:
    """ "a large red circle is above a small blue square"; swap: the second thing comes first."""
    first, second, relation = scene
    if swap:
        first, second = second, first
        relation = OPPOSITE[relation]
    return f"a {' '.join(first)} is {relation} a {' '.join(second)}"


def refer(scene: Scene, number: int, asked: str | None = None) -> str:
    """The shortest phrase that fits only thing `number`, and leaves its attribute `asked` out."""
    things = (scene.first, scene.second)
    thing = things[number]
    other = things[1 - number]
    if asked != "shape" and thing.shape != other.shape:
        return thing.shape
    noun = "object" if asked == "shape" else thing.shape
    if asked != "color" and thing.color != other.color:
        return f"{thing.color} {noun}"
    if asked != "size" and thing.size != other.size:
        return f"{thing.size} {noun}"
    return f"{PLACES[scene.relation][number]} {noun}"


def ask_attribute(scene: Scene, number: int, attribute: str) -> tuple[str, str]:
    answer = getattr(scene[number], attribute)  # Thing.size, Thing.color or Thing.shape
    return f"what {attribute} is the {refer(scene, number, attribute)}?", answer


def ask_existence(draw: random.Random, scene: Scene, number: int, answer: str) -> tuple[str, str]:
    """Color and shape of one of the things, or for "no" of a thing that is not there."""
    things = (scene.first, scene.second)
    looks = [(thing.color, thing.shape) for thing in things]
    thing = things[number]
    while answer == "no" and (thing.color, thing.shape) in looks:
        thing = random_thing(draw)
    return f"is there a {thing.color} {thing.shape}?", answer


def ask_relation(draw: random.Random, scene: Scene, number: int, answer: str) -> tuple[str, str]:
    relation = scene.relation if number == 0 else OPPOSITE[scene.relation]
    if answer == "no":
        relation = draw.choice([other for other in OPPOSITE if other != relation])
    return f"is the {refer(scene, number)} {relation} the {refer(scene, 1 - number)}?", answer


def ask(draw: random.Random, scene: Scene) -> tuple[str, str]:
    """A question about a scene and its answer, one of DEMO_ANSWERS; yes is as likely as no."""
    number = draw.randrange(2)
    answer = draw.choice(("yes", "no"))
    subject = draw.choice(("size", "color", "shape", "exists", "relation"))
    if subject == "exists":
        return ask_existence(draw, scene, number, answer)
    if subject == "relation":
        return ask_relation(draw, scene, number, answer)
    return ask_attribute(scene, number, subject)


# ---------------------------------------------------------------- how it is drawn
def draw_thing(
    canvas: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float
) -> None:
    """A thing around the point (x, y), all in pixels."""
    fill = COLORS.get(thing.color, GRAY)
    short = 0.9 * radius
    if thing.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    elif thing.shape == "square":
        canvas.rectangle((x - short, y - short, x + short, y + short), fill)
    else:
        top = (x, y - radius)
        left = (x - radius, y + short)
        right = (x + radius, y + short)
        canvas.polygon((top, left, right), fill)


def paint(draw: random.Random, scene: Scene, size: int) -> Image.Image:
    """A picture of size x size pixels.

    `draw` jitters tone and places, never so far that relation, size or colour are in doubt.
    """
    across = draw.uniform(0.3, 0.7)  # of both things, at right angles to their relation
    background = draw.randint(235, 255)
    image = Image.new("RGB", (size, size), (background, background, background))
    canvas = ImageDraw.Draw(image)
    for thing, middle in ((scene.first, 0.25), (scene.second, 0.75)):
        thing_along = size * (middle + draw.uniform(-0.03, 0.03))
        thing_across = size * (across + draw.uniform(-0.06, 0.06))
        radius = SIZES[thing.size] * size
        if scene.relation == "left of":
            draw_thing(canvas, thing, thing_along, thing_across, radius)
        else:
            draw_thing(canvas, thing, thing_across, thing_along, radius)
    return image


# ---------------------------------------------------------------- records, one painter a kind
class Brush(NamedTuple):
    """What a painter draws a record with."""

    draw: random.Random  # of this record alone
    heldout: bool
    image_size: int

    def scene(self) -> Scene:
        return random_scene(self.draw, self.heldout)

    def paint(self, scene: Scene) -> Image.Image:
        return paint(self.draw, scene, self.image_size)

    def coin(self) -> bool:
        return self.draw.random() < 0.5


def paint_caption(brush: Brush, number: int) -> dict:
    """For pre-training in both directions, for the MLLM in one, as it has to know what to say."""
    scene = brush.scene()
    image = brush.paint(scene)
    caption = describe(scene, swap=brush.coin())
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": describe(scene)}]
    return {"image": image, "captions": [caption], "conversations": turns}


def paint_questions(brush: Brush, number: int) -> dict:
    """Three different questions, and the same ones as a conversation."""
    scene = brush.scene()
    asked: dict[str, str] = {}
    while len(asked) < 3:
        question, answer = ask(brush.draw, scene)
        asked[question] = answer
    image = brush.paint(scene)

    turns = []
    questions = []
    for k, (question, answer) in enumerate(asked.items()):
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
        questions.append(
            {
                "id": 3 * number + k,
                "question": question,
                "answers": {answer: 1.0},
                "question_type": question.split()[1],
            }
        )
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": image, "conversations": turns, "questions": questions}


def where_it_is_shown(place: str, label: bool, other: bool) -> tuple[bool, bool]:
    """Whether the left, the right image show what is told, if "... in <place>" has this label.

    other: a coin for what the label leaves open.
    """
    if place == "left image":
        return label, other
    if place == "right image":
        return other, label
    if place == "both images":
        return (True, True) if label else (other, not other)
    # one image: exactly one of them
    return label == other, not other


def paint_statement(brush: Brush, number: int) -> dict:
    """The label and the place are drawn before the scenes: the text alone tells nothing."""
    label = number % 2 == 0
    place = ("left image", "right image", "both images", "one image")[brush.draw.randrange(4)]
    told = brush.scene()
    shown = where_it_is_shown(place, label, brush.coin())
    others = [brush.scene(), brush.scene()]
    while told in others:
        others = [brush.scene(), brush.scene()]
    images = []
    for is_shown, other in zip(shown, others, strict=True):
        images.append(brush.paint(told if is_shown else other))
    sentence = f"{describe(told, swap=brush.coin())} in {place}"
    return {"images": images, "label": label, "id": f"demo-{number}", "sentence": sentence}


def paint_hypothesis(brush: Brush, number: int) -> dict:
    """Entailment: all is seen. Neutral: what is not covered agrees. Contradiction: it disagrees."""
    label = SNLI_LABELS[number % 3]
    told = brush.scene()
    covered = brush.draw.randrange(2)  # which thing may be covered
    seen = 1 - covered
    is_covered = label == "neutral" or (label == "contradiction" and brush.coin())
    scene = told
    if label == "contradiction":
        # what stays visible has to differ
        while scene[seen] == told[seen] and scene.relation == told.relation:
            scene = brush.scene()
    if is_covered and covered == 0:
        scene = scene._replace(first=COVER)
    elif is_covered:
        scene = scene._replace(second=COVER)
    image = brush.paint(scene)
    return {"image": image, "hypothesis": describe(told, swap=brush.coin()), "label": label}


# ---------------------------------------------------------------- scenes with details
# Which pixels of a thing have its colour: every second one. Half as large, all patterns look alike,
# as each pixel is the mean of two coloured and two empty ones.
PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "rows": lambda x, y: y % 2 == 0,
    "columns": lambda x, y: x % 2 == 0,
    "checks": lambda x, y: (x + y) % 2 == 0,
}
OVERVIEW = "overview"  # kinds of questions: a picture of half the size answers them,
DETAIL = "detail"  # and these it does not


def paint_patterned(
    draw: random.Random, scene: Scene, patterns: list[str], size: int
) -> tuple[Image.Image, list[list[float]]]:
    """A picture of size x size pixels, and the boxes (left, top, right, bottom) of its two things.

    As `paint`, but each thing is filled with a pattern.
    """
    across = draw.uniform(0.3, 0.7)
    background = draw.randint(235, 255)
    image = Image.new("RGB", (size, size), (background, background, background))
    y, x = np.mgrid[:size, :size]
    boxes = []
    things = (scene.first, scene.second)
    for thing, pattern, middle in zip(things, patterns, (0.25, 0.75), strict=True):
        thing_x = size * (middle + draw.uniform(-0.03, 0.03))
        thing_y = size * (across + draw.uniform(-0.06, 0.06))
        if scene.relation == "above":
            thing_x, thing_y = thing_y, thing_x
        radius = SIZES[thing.size] * size
        filled = image.copy()
        draw_thing(ImageDraw.Draw(filled), thing, thing_x, thing_y, radius)
        image.paste(filled, mask=Image.fromarray(PATTERNS[pattern](x, y)))
        boxes.append([thing_x - radius, thing_y - radius, thing_x + radius, thing_y + radius])
    return image, boxes


def ask_overview(draw: random.Random, scene: Scene) -> tuple[str, str]:
    """Of a thing that is named by its colour, or by its place if its colour is asked."""
    number = draw.randrange(2)
    things = (scene.first, scene.second)
    thing = things[number]
    place = PLACES[scene.relation][number]
    asked = draw.choice(("color", "size", "shape", "place"))
    if asked == "color":
        return f"what color is the {place} object?", thing.color
    if asked == "place":
        return f"where is the {thing.color} object?", place
    return f"what {asked} is the {thing.color} object?", getattr(thing, asked)


def paint_details(brush: Brush, number: int) -> dict:
    """Two questions about what is seen from afar and two about patterns, in any order, and the same
    ones as a conversation; "things" says what is where, for who learns to see.
    """
    draw = brush.draw
    scene = brush.scene()
    while scene.first.color == scene.second.color:
        scene = brush.scene()
    patterns = [draw.choice(list(PATTERNS)), draw.choice(list(PATTERNS))]
    asked: dict[str, tuple[str, str]] = {}  # question -> its answer and its kind
    while len(asked) < 2:
        question, answer = ask_overview(draw, scene)
        asked[question] = (answer, OVERVIEW)
    for thing, pattern in zip((scene.first, scene.second), patterns, strict=True):
        asked[f"what pattern is on the {thing.color} object?"] = (pattern, DETAIL)
    order = list(asked)
    draw.shuffle(order)
    image, boxes = paint_patterned(draw, scene, patterns, brush.image_size)

    turns = []
    questions = []
    for k, question in enumerate(order):
        answer, kind = asked[question]
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
        questions.append(
            {
                "id": 4 * number + k,
                "question": question,
                "answers": {answer: 1.0},
                "question_type": kind,
            }
        )
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    things = []
    for thing, pattern, box in zip((scene.first, scene.second), patterns, boxes, strict=True):
        things.append({**thing._asdict(), "pattern": pattern, "box": box})
    return {"image": image, "conversations": turns, "questions": questions, "things": things}


Painter = Callable[[Brush, int], dict]  # the brush and the number of the record

PAINTERS: dict[str, Painter] = {
    "captions": paint_caption,
    "chat_captions": paint_caption,
    "questions": paint_questions,
    "chat": paint_questions,
    "statements": paint_statement,
    "hypotheses": paint_hypothesis,
    "details": paint_details,
    "chat_details": paint_details,
}
# kinds that are read as others
READ_AS = {"details": "questions", "chat_details": "chat"}
ROWS_EACH = {"questions": 3, "details": 4}  # of a record; else 1
# what the random numbers of a kind are drawn from: older names, so that the scenes stay the same
SEED_NAMES = {
    "captions": "captions",
    "questions": "vqa",
    "statements": "nlvr2",
    "hypotheses": "snli_ve",
    "chat": "chat",
    "chat_captions": "chat_captions",
    # the same scenes, as questions and as conversations
    "details": "details",
    "chat_details": "details",
}


# ---------------------------------------------------------------- the source
class Demo(Part):
    """`size` drawn records of one kind; image_size in pixels."""

    def __init__(self, kind: str, split: str, size: int, seed: int = 0, image_size: int = 64):
        assert split in ("train", "heldout"), split
        self.path = f"demo {SEED_NAMES.get(kind, kind)} {split}"
        self.places = range(size)
        self.rows_each = ROWS_EACH.get(kind, 1)
        self.description = f"{self.path}, {size} records, seed {seed}"
        self.painter = PAINTERS[kind]
        self.heldout = split == "heldout"
        self.seed = seed
        self.image_size = image_size

    def record(self, index: int) -> Any:
        draw = random.Random(f"{self.seed} {self.name(index)}")
        return self.painter(Brush(draw, self.heldout, self.image_size), index)

    def picture_key(self, kind: str, index: int) -> Any:
        """Every record is drawn anew, and so its name is that of its picture."""
        return self.name(index)


def demo_source(kind: str, split: str, size: int, seed: int = 0, image_size: int = 64) -> Source:
    """`size` records of a kind, a key of PAINTERS; questions have 3 rows each, details 4.

    split: train or heldout. image_size: pixels a side.
    """
    return Source(READ_AS.get(kind, kind), [Demo(kind, split, size, seed, image_size)])


def demo_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE in which every word of the demo data is one token."""
    texts = []
    for kind in ("captions", "hypotheses", "statements", "questions"):
        for row in demo_source(kind, "train", 300).texts():
            texts.append(row["text"])
    return train_tokenizer(texts, vocab_size)
