"""scenes.py"""
from PIL import Image
from PIL import ImageDraw
from collections import namedtuple
import random
import zlib
from data import FIELDS, Part, SNLI_LABELS, Source
from images import GRAY
from tokenizer import Tokenizer, train_tokenizer


COLORS = {"red": (220, 0, 0), "green": (0, 160, 60), "blue": (40, 80, 230), "yellow": (250, 200, 0), "black": (9, 9, 9)}


SHAPES, SIZES = ("circle", "square", "triangle"), {"small": 0.12, "large": 0.20}  # radius as a part of the side


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


PLACES = {"left of": ("left", "right"), "above": ("top", "bottom")}


DEMO_ANSWERS = ["yes", "no", *SIZES, *COLORS, *SHAPES]


Thing = namedtuple("Thing", "size color shape")


Scene = namedtuple("Scene", "first second relation")  # first is "left of" or "above" second


COVER = Thing("large", "gray", "square")  # SNLI-VE: hides what is behind it


def describe(scene: Scene, swap=False) -> str:
    first, second, relation = scene if not swap else (scene.second, scene.first, OPPOSITE[scene.relation])
    return f"a {' '.join(first)} is {relation} a {' '.join(second)}"


def random_thing(draw) -> Thing:
    return Thing(draw.choice(list(SIZES)), draw.choice(list(COLORS)), draw.choice(SHAPES))


def refer(scene, number, asked=None) -> str:
    """The shortest phrase that fits only one of the two things, without its attribute `asked`."""
    thing, other = scene[number], scene[1 - number]
    noun = "object" if asked == "shape" else thing.shape
    if noun not in ("object", other.shape):
        return noun
    differing = [name for name in ("color", "size") if name != asked and getattr(thing, name) != getattr(other, name)]
    return f"{getattr(thing, differing[0]) if differing else PLACES[scene.relation][number]} {noun}"


def ask(draw, scene) -> tuple[str, str]:
    """A question about a scene and its answer, one of DEMO_ANSWERS; yes and no are equally likely."""
    number, answer = draw.randrange(2), draw.choice(("yes", "no"))
    kind = draw.choice((*Thing._fields, "exists", "relation"))
    if kind in Thing._fields:
        return f"what {kind} is the {refer(scene, number, kind)}?", getattr(scene[number], kind)
    if kind == "exists":
        thing = scene[number]
        while answer == "no" and thing[1:] in (scene.first[1:], scene.second[1:]):
            thing = random_thing(draw)
        return f"is there a {thing.color} {thing.shape}?", answer
    true = scene.relation if number == 0 else OPPOSITE[scene.relation]
    relation = true if answer == "yes" else draw.choice([relation for relation in OPPOSITE if relation != true])
    return f"is the {refer(scene, number)} {relation} the {refer(scene, 1 - number)}?", answer


# what the random numbers of a kind are drawn from; older names, so that the scenes stay what they were
SEED_NAMES = {"captions": "captions", "questions": "vqa", "statements": "nlvr2", "hypotheses": "snli_ve",
              "chat": "chat", "chat_captions": "chat_captions"}


class Demo(Part):
    """The built-in data, drawn at need from (seed, kind, split, index). The splits train and heldout share no scene."""

    def __init__(self, kind, split, size, seed=0, image_size=64):
        assert split in ("train", "heldout"), split
        self.path, self.places, self.rows_each = f"demo {SEED_NAMES[kind]} {split}", range(size), 3 if kind == "questions" else 1
        self.kind, self.heldout, self.seed, self.image_size = kind, split == "heldout", seed, image_size

    def parse(self, raw):
        return getattr(self, self.kind)(raw, random.Random(f"{self.seed} {self.name(raw)}"))

    def scene(self, draw) -> Scene:
        """Held out is a fifth of all scenes, by a hash of the description: no training picture ever shows one."""
        while True:
            scene = Scene(random_thing(draw), random_thing(draw), draw.choice(list(PLACES)))
            if scene.first != scene.second and (zlib.crc32(describe(scene).encode()) % 5 == 0) == self.heldout:
                return scene

    def paint(self, draw, scene) -> Image.Image:
        """`draw` jitters tone and places, never so far that relation, size or colour are in doubt."""
        size, across = self.image_size, draw.uniform(0.3, 0.7)
        image = Image.new("RGB", (size, size), (draw.randint(235, 255),) * 3)
        for thing, middle in ((scene.first, 0.25), (scene.second, 0.75)):
            place = middle + draw.uniform(-0.03, 0.03), across + draw.uniform(-0.06, 0.06)
            x, y = (size * side for side in (place if scene.relation == "left of" else place[::-1]))
            canvas, fill, r = ImageDraw.Draw(image), COLORS.get(thing.color, GRAY), SIZES[thing.size] * size
            if thing.shape == "circle":
                canvas.ellipse((x - r, y - r, x + r, y + r), fill)
            elif thing.shape == "square":
                canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
            else:
                canvas.polygon(((x, y - r), (x - r, y + 0.9 * r), (x + r, y + 0.9 * r)), fill)
        return image

    def captions(self, number, draw):
        """In both directions for pre-training, in one for the MLLM, which has to know what to say."""
        scene = self.scene(draw)
        return {"image": self.paint(draw, scene), "captions": [describe(scene, swap=draw.random() < 0.5)],
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": describe(scene)}]}

    def questions(self, number, draw):
        scene, asked = self.scene(draw), {}
        while len(asked) < 3:
            asked |= [ask(draw, scene)]
        turns = [{"from": role, "value": text} for turn in asked.items() for role, text in zip(("human", "gpt"), turn)]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        return {"image": self.paint(draw, scene), "conversations": turns, "questions": [
            {"id": 3 * number + k, "question": question, "answers": {answer: 1.0}, "question_type": question.split()[1]}
            for k, (question, answer) in enumerate(asked.items())]}

    def statements(self, number, draw):
        """The label and the kind are drawn first, then the scenes: the text alone tells nothing."""
        label, kind, told, other = number % 2 == 0, draw.randrange(4), self.scene(draw), draw.random() < 0.5
        left, right = ((label, other), (other, label), (label or other, label or not other),
                       (label == other, not other))[kind]  # which images show what is told
        scenes = [self.scene(draw) for _ in range(2)]
        while told in scenes:
            scenes = [self.scene(draw) for _ in range(2)]
        scenes = [told if shown else scene for shown, scene in zip((left, right), scenes)]
        place = ("left image", "right image", "both images", "one image")[kind]
        return {"images": [self.paint(draw, scene) for scene in scenes], "label": label, "id": f"demo-{number}",
                "sentence": f"{describe(told, swap=draw.random() < 0.5)} in {place}"}

    def hypotheses(self, number, draw):
        """Entailment: it is seen. Neutral: what is seen agrees, the rest is covered. Contradiction: it disagrees."""
        label, told, k = SNLI_LABELS[number % 3], self.scene(draw), draw.randrange(2)  # thing k may be covered
        covered, scene = label == "neutral" or (label == "contradiction" and draw.random() < 0.5), told
        while label == "contradiction" and scene[1 - k] == told[1 - k] and scene.relation == told.relation:
            scene = self.scene(draw)
        shown = scene._replace(**{Scene._fields[k]: COVER}) if covered else scene
        return {"image": self.paint(draw, shown), "hypothesis": describe(told, draw.random() < 0.5), "label": label}

    chat_captions, chat = captions, questions


def demo_source(kind: str, split: str, size: int, seed: int = 0, image_size: int = 64) -> Source:
    """`size` records of captions, vqa (3 questions each), nlvr2, snli_ve, chat_captions or chat; train or heldout."""
    return Source(kind, [Demo(kind, split, size, seed, image_size)])


def demo_tokenizer(vocab_size=512) -> Tokenizer:
    """A byte-level BPE in which every word of the demo data is one token."""
    texts = [row["text"] for kind in FIELDS for row in demo_source(kind, "train", 300).texts()]
    return train_tokenizer(texts, vocab_size)
