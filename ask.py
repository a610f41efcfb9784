"""One model and your pictures: a question, several texts, a folder to search, a conversation.

    python ask.py question --checkpoint out/vqav2 --image x.jpg --question "What animal is this?"
    python ask.py match --checkpoint out/demo --image x.jpg --text "a dog" --text "two cats"
    python ask.py search --checkpoint out/flickr30k --folder pictures --text "a dog on the beach"
    python ask.py chat --checkpoint LLAVA --image x.jpg       # a conversation, /help says how

`python ask.py -h` lists the commands, `python ask.py question -h` the flags of one. The first three
are for ManagerTower (ACL 2023), chat is for LLaVA-OV-Manager (TCSVT 2025, section IV). Texts are
padded and pictures transformed as in evaluation, so that a question alone gets the same answer as
in a batch.

Shapes: B texts, N experts, L tokens, D width.
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from chat import IMAGE_TAG, SYSTEM, TextStream, add_images, encode_prompt
from eval import check_finite, check_picture_output, load_vocabulary, retrieval_scores
from fields import Command, check_fields, option, run_command, show
from files import BadSample, save_picture
from images import Transform, load_image, name_of
from multigrid import ImageTiles, preprocess_image
from objectives import class_logits
from tasks import TASKS
from train import load_checkpoint
from weights import load_mllm
from world import evaluating, one_sentence, sentence_of_allocation, to_device

# ---------------------------------------------------------------- one picture and its texts
MOST_CHARACTERS = 2**20  # of a text, more than any model reads


def check_text(text: str, name: str = "the text") -> None:
    """Raises ValueError for a text that is empty, too long for any model, or no UTF-8."""
    if not text.strip():
        raise ValueError(f"{name} is empty; write a question or a sentence")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{name} has {len(text)} characters; it may have {MOST_CHARACTERS}, and the model "
            "reads fewer"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} has bytes that are not UTF-8: {show(text)}") from None


def check_words(text: str, reserved: Sequence[str], name: str = "the text") -> None:
    """Raises ValueError for a text with a word that the model would not read as a text.

    reserved: those of its tokenizer, as "</s>" and "<mask>".
    """
    for word in reserved:
        if word in text:
            raise ValueError(
                f"{name} has {word} in it, which is no text for the model; leave it out"
            )


def encode_texts(tokenizer: Any, texts: list[str], max_text_len: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, max_text_len), as in training; says what was cut. Raises ValueError for what
    is no text.
    """
    for text in texts:
        check_text(text)
        check_words(text, tokenizer.special_words())
        length = len(tokenizer.encode(text))
        if length > max_text_len:
            print(
                f"note: {text[:40]!r}... has {length} tokens and was cut to the model's text "
                f"length {max_text_len}"
            )
    return tokenizer(texts, max_text_len)


def open_picture(
    checkpoint: str, head: str, image: str, texts: list[str], device: str
) -> tuple[Any, dict[str, Tensor]]:
    """(model, a batch of one picture and B texts on the model's device)."""
    # what takes no time is tested before the model is loaded
    for text in texts:
        check_text(text)
    picture = load_image(image, upright=True)
    model, tokenizer, transform = load_checkpoint(checkpoint, head, device)
    assert transform is not None, "a two-tower model has a transform"
    input_ids, attention_mask = encode_texts(tokenizer, texts, model.config.max_text_len)
    pixels = transform(picture, None)[None]  # (1, 3, S, S)
    batch = {"pixels": pixels, "input_ids": input_ids, "attention_mask": attention_mask}
    return model, to_device(batch, next(model.parameters()).device)


# ---------------------------------------------------------------- question
@dataclass
class QuestionOptions:
    """Answer a question about a picture.

    Shows the best answers and their probabilities, which are sigmoids, as in the loss of VQA: they
    need not sum to one.
    """

    checkpoint: str = option(help="folder of a model with a head for questions")
    image: str = option(help="the picture", path=True)
    question: str = option(help="the question")
    top: int = option(5, "answers to show", least=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)


def question_head() -> str:
    """The name of the head that answers questions."""
    return next(task.heads[0] for task in TASKS.values() if task.kind == "questions")


def question(options: QuestionOptions) -> list[tuple[str, float]]:
    """The best answers and their probabilities, the best one first."""
    head = question_head()
    model, batch = open_picture(
        options.checkpoint, head, options.image, [options.question], options.device
    )
    answers = load_vocabulary(options.checkpoint, model)
    with evaluating(model):
        logits = class_logits(model, head, batch)[0].float()  # (answers,)
        check_finite(logits)
        best = logits.sigmoid().topk(min(options.top, len(answers)))
    result = []
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        result.append((answers[index], probability))
        print(f"{probability:8.2%}  {answers[index]}")
    return result


# ---------------------------------------------------------------- match
@dataclass
class MatchOptions:
    """Say how well texts fit a picture.

    ITM is the probability that text and picture belong together. ITC is the cosine similarity of
    the two encoders alone, where the model has a head for it.
    """

    checkpoint: str = option(help="folder of a model with an ITM head")
    image: str = option(help="the picture", path=True)
    text: list[str] = option(help="a text")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)


def match(options: MatchOptions) -> list[tuple[str, float, float]]:
    """(text, ITM probability, ITC similarity) of each text; nan for the similarity of a model
    without an ITC head.
    """
    model, batch = open_picture(
        options.checkpoint, "itm", options.image, options.text, options.device
    )
    mask = batch["attention_mask"]
    similarities = [math.nan] * len(options.text)
    has_itc = "itc" in model.heads
    with evaluating(model):
        texts = model.encode_text(batch["input_ids"], mask)  # (B, N, L, D)
        images = model.encode_image(batch["pixels"]).expand(len(texts), -1, -1, -1)
        logits = model.heads["itm"](model.fuse_pooled(texts, images, mask)).float()  # (B, 2)
        check_finite(logits)
        probabilities = logits.softmax(-1)[:, 1].tolist()
        if has_itc:
            text_vectors = model.contrast_text(texts, mask).float()  # (B, C)
            image_vectors = model.contrast_image(images).float()
            similarities = (text_vectors * image_vectors).sum(-1).tolist()

    result = list(zip(options.text, probabilities, similarities, strict=True))
    for text, probability, similarity in result:
        itc = f"   ITC {similarity:+.3f}" if has_itc else ""
        shown = text if len(text) <= 200 else f"{text[:200]}..."
        print(f"ITM {probability:8.2%}{itc}   {shown}")
    if not has_itc:
        print("note: this model has no ITC head, so there is no similarity of the encoders alone")
    return result


# ---------------------------------------------------------------- search
@dataclass
class SearchOptions:
    """Find the pictures of a folder that fit a text best.

    Prints their ITM scores, and draws them on a contact sheet.
    """

    checkpoint: str = option(help="folder of a model with an ITM head")
    text: str = option(help="what to look for")
    folder: str = option(help="the pictures; folders inside it are searched too", path=True)
    top: int = option(12, "pictures to show", least=1)
    out: str = option("search.png", "file of the contact sheet", path=True)
    k_test: int = option(128, "pictures to re-rank, where the model has an ITC head", least=1)
    batch_size: int = option(32, "pictures of a batch", least=1)
    memory_gb: float = option(4.0, "host memory for experts", least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)


MOST_BYTES_KEPT = 2**29  # of pictures, as the model takes them
MOST_ON_A_SHEET = 1000  # pictures
SIDE = 224  # pixels of a picture on a sheet
LINE_HEIGHT = 16  # of the text below it


def check_folder(folder: str) -> None:
    """Raises ValueError unless there is such a folder."""
    if os.path.isdir(folder):
        return
    found = "is a file" if os.path.exists(folder) else "does not exist"
    raise ValueError(f"--folder {name_of(folder)} {found}; it must be a folder of pictures")


def list_files(folder: str) -> list[Path]:
    """All files of a folder and of those inside it, in alphabetical order; says what is left out.

    Links are followed, and each folder is read once, so that a link may lead back.
    """
    files = []
    seen = set()
    waiting = [Path(folder)]
    while waiting:
        current = waiting.pop()
        real_path = os.path.realpath(current)
        if real_path in seen:
            continue
        seen.add(real_path)
        try:
            names = os.listdir(current)
        except OSError as error:
            print(f"left out: {name_of(current)}: cannot be read ({error.strerror or error})")
            continue
        for name in sorted(names, reverse=True):
            path = current / name
            if os.path.isdir(path):
                waiting.append(path)
            else:
                files.append(path)
    return sorted(files)


class FoundPictures:
    """The pictures of a folder, and what the model sees of them.

    files: those that can be read, in alphabetical order; the others are said, but for `sheet`,
    the file to write to. Raises ValueError if there are none.
    """

    def __init__(self, folder: str, transform: Transform, sheet: str):
        self.transform = transform
        self.files: list[Path] = []
        self.kept: dict[int, Tensor] = {}  # the first ones, so that most are decoded once
        self.bytes_kept = 0
        extensions = Image.registered_extensions()
        for file in list_files(folder):
            if file.suffix.lower() in extensions and not is_old_sheet(file, sheet):
                self.add(file)
        if not self.files:
            raise ValueError(f"there is no readable picture in {name_of(folder)}")

    def add(self, file: Path) -> None:
        """Take a picture, or say why it is left out."""
        if not os.path.isfile(file):  # a pipe would never end
            print(f"left out: {name_of(file)}: it is no file")
            return
        try:
            pixels = self.transform(load_image(file, upright=True), None)
        except BadSample as error:
            print(f"left out: {error}")
            return
        except OSError as error:  # a strange entry of a system's folder
            print(f"left out: {name_of(file)}: cannot be read ({error.strerror or error})")
            return
        if self.bytes_kept + pixels.nbytes <= MOST_BYTES_KEPT:
            self.kept[len(self.files)] = pixels
            self.bytes_kept += pixels.nbytes
        self.files.append(file)

    def load(self, index: int) -> Tensor:
        """Picture number `index`, (3, S, S)."""
        if index in self.kept:
            return self.kept[index]
        return self.transform(load_image(self.files[index], upright=True), None)


def is_old_sheet(file: Path, sheet: str) -> bool:
    """Whether a file is the contact sheet of an earlier search, which is written anew."""
    return os.path.isfile(sheet) and os.path.isfile(file) and os.path.samefile(file, sheet)


def fit_into(picture: Image.Image, side: int) -> Image.Image:
    """The picture with `side` pixels along its longer side, and at least one along the other."""
    scale = side / max(picture.size)
    width = max(round(picture.width * scale), 1)
    height = max(round(picture.height * scale), 1)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def contact_sheet(items: list[tuple[Image.Image, str]], columns: int = 4) -> Image.Image:
    """(picture, label) pairs, `columns` of them in a row; each has SIDE x SIDE pixels and a line of
    text.
    """
    row_height = SIDE + LINE_HEIGHT
    num_rows = math.ceil(len(items) / columns)
    size = (min(columns, len(items)) * SIDE, num_rows * row_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(items):
        x = i % columns * SIDE
        y = i // columns * row_height
        fitted = fit_into(picture, SIDE - 8)
        left = x + (SIDE - fitted.width) // 2
        top = y + (SIDE - fitted.height) // 2
        sheet.paste(fitted, (left, top))
        one_line = " ".join(label.split())[:36]
        drawable = one_line.encode("utf-8", errors="replace").decode()  # names need not be UTF-8
        draw.text((x + 4, y + SIDE - 2), drawable, fill="black")
    return sheet


def draw_sheet(found: list[tuple[float, Path]]) -> Image.Image:
    """The contact sheet of (score, file) pairs, of the first ones where there are too many."""
    if len(found) > MOST_ON_A_SHEET:
        print(f"note: the first {MOST_ON_A_SHEET} pictures are drawn")
    items = []
    for score, file in found[:MOST_ON_A_SHEET]:
        small = fit_into(load_image(file, upright=True), SIDE)  # so that a thousand fit into memory
        items.append((small, f"{score:.2f}: {file.name}"))
    return contact_sheet(items)


def search(options: SearchOptions) -> list[tuple[float, Path]]:
    """(ITM score, file) of the best pictures, the best one first."""
    check_picture_output("--out", options.out)
    check_folder(options.folder)
    check_text(options.text)
    model, tokenizer, transform = load_checkpoint(options.checkpoint, "itm", options.device)
    assert transform is not None, "a two-tower model has a transform"
    input_ids, mask = encode_texts(tokenizer, [options.text], model.config.max_text_len)
    pictures = FoundPictures(options.folder, transform, options.out)

    scores = retrieval_scores(
        model,
        pictures.load,
        len(pictures.files),
        input_ids,
        mask,
        options.k_test,
        0,  # the text looks for pictures, no picture looks for a text
        options.batch_size,
        options.memory_gb,
    )[:, 0]  # (I,)
    best = scores.topk(min(options.top, options.k_test, len(pictures.files)))

    # the result is printed before anything else can fail
    result = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        file = pictures.files[index]
        result.append((score, file))
        print(f"{score:8.3f}  {name_of(file)}", flush=True)
    save_picture(options.out, draw_sheet(result))
    return result


# ---------------------------------------------------------------- chat
@dataclass
class ChatOptions:
    """Talk with a LLaVA-OV-Manager about pictures.

    Without --question line by line, until an empty one; /help says what else a line may be. A
    terminal also shows how fast the answer came.
    """

    checkpoint: str = option(help="folder of the model, ours or an official one")
    image: list[str] = option((), "a picture", path=True)
    question: str | None = option(None, "a single question; none = a conversation")
    system_prompt: str = option(SYSTEM, "what the model is told before the conversation")
    temperature: float = option(0.0, "of sampling; 0 = always the likeliest token", least=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this mass", above=0, most=1)
    max_new_tokens: int = option(256, "most tokens of an answer", least=1, most=32_768)
    tokenizer: str = option("", "folder or file; none = the one beside the model")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.question is not None:
            check_text(self.question, "the question")


def make_tiles(pictures: Sequence[Image.Image], config: Any) -> list[ImageTiles]:
    """What the model sees of each picture. Of several in a conversation it sees one tile each."""
    has_several = len(pictures) > 1
    return [preprocess_image(picture, config, has_several) for picture in pictures]


def load_pictures(files: Sequence[str]) -> list[Image.Image]:
    """The pictures of these files, upright."""
    return [load_image(file, upright=True) for file in files]


def encode_turns(
    model: Any, tokenizer: Any, turns: list[str], files: Sequence[str]
) -> tuple[list[int], list[ImageTiles]]:
    """Input ids and tiles of a conversation about pictures. turns: user, assistant, user, ..."""
    tiles = make_tiles(load_pictures(files), model.config)
    return encode_prompt(turns, tokenizer, len(tiles)), tiles


def reserved_words(tokenizer: Any) -> list[str]:
    """What stands for a picture or for the end of a turn, and is no text."""
    return [IMAGE_TAG, *tokenizer.special_words()]


def say(remark: str) -> None:
    """Something beside the answers, for somebody who reads along: programs do not get it."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(remark, file=sys.stderr, flush=True)


class Speed:
    """How fast tokens come. The first one also takes the time of reading the prompt."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first = self.start
        self.last = self.start
        self.tokens = 0

    def count(self) -> None:
        self.last = time.perf_counter()
        if self.tokens == 0:
            self.first = self.last
        self.tokens += 1

    def __str__(self) -> str:
        words = f"{self.tokens} tokens, the first one after {self.first - self.start:.2f} s"
        if self.last > self.first:
            rate = (self.tokens - 1) / (self.last - self.first)
            words += f", then {rate:.1f} tokens/s"
        return words


def without_outer_spaces(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text; white space in front of it and behind it is left out."""
    is_begun = False
    spaces = ""  # that may be the last ones
    for piece in pieces:
        text = spaces + piece
        if not is_begun:
            text = text.lstrip()
        spoken = text.rstrip()
        spaces = text[len(spoken) :]
        if spoken:
            is_begun = True
            yield spoken


def reply(
    model: Any, tokenizer: Any, turns: list[str], tiles: list[ImageTiles], options: ChatOptions
) -> Iterator[str]:
    """The model's answer to a conversation that ends with a turn of the user, in pieces, each as
    soon as it is known. Raises ValueError for a turn that the model cannot take.
    """
    input_ids = torch.tensor([encode_prompt(turns, tokenizer, 0, options.system_prompt)])  # (1, L)
    stream = TextStream(tokenizer)
    speed = Speed()

    def pieces() -> Iterator[str]:
        for token in model.generate_steps(
            input_ids, None, tiles, options.max_new_tokens, options.temperature, options.top_p
        ):
            speed.count()
            if int(token) not in model.config.eos_ids:
                yield stream.add(int(token))
        yield stream.rest()

    yield from without_outer_spaces(pieces())
    say(f"\n[{speed}]")


def speak(pieces: Iterable[str]) -> str:
    """Print an answer while it comes, then the end of its line. Returns all of it."""
    answer = ""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            answer += piece
    except BaseException:
        if answer:  # what is said next begins a line of its own
            print(flush=True)
        raise
    print(flush=True)
    return answer


MOST_CHARACTERS_OF_A_LINE = 16 * 2**20  # that are read at all
MOST_FAILURES = 5  # lines of a pipe in a row


def is_terminal() -> bool:
    """Whether somebody types the conversation, who reads what is said and may type again."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_line() -> str:
    """The user's next line; blank if there is none any more, or where it has only spaces.

    Raises ValueError for a line without an end.
    """
    if sys.stdin is None:  # it was closed before the script began
        return ""
    if is_terminal():
        try:
            return input("> ")
        except EOFError:
            return ""
    line = sys.stdin.readline(MOST_CHARACTERS_OF_A_LINE + 1)
    if len(line) > MOST_CHARACTERS_OF_A_LINE:
        raise ValueError(
            f"a line of the input has more than {MOST_CHARACTERS_OF_A_LINE} characters; a question "
            f"may have {MOST_CHARACTERS}"
        )
    return line.removesuffix("\n")


HELP = """/image FILE   show a picture with the next question; several, and dragged ones, will do
/reset        begin anew, with the pictures of --image
/help         this list
/quit         the end, as is an empty line"""
LINE_COMMANDS = ("/image", "/reset", "/help", "/quit")


def split_paths(text: str) -> list[str]:
    """The files behind /image. A name may be quoted, or have escaped spaces, as terminals write
    files that are dragged into them; or it is all of the text as it is. Raises ValueError for none.
    """
    if not text:
        raise ValueError("/image needs the file of a picture, as /image cat.png")
    if os.path.exists(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote without its end may be a letter of the name
        return [text]


class Conversation:
    """What was said, and the pictures that were shown. turns: user, assistant, user, ..."""

    def __init__(self, model: Any, tokenizer: Any, options: ChatOptions):
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        self.first_pictures = load_pictures(options.image)
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the pictures of --image."""
        self.turns: list[str] = []
        self.num_shown = 0  # pictures of past turns; the others go with the next question
        self.set_pictures(list(self.first_pictures))

    def set_pictures(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures
        self.tiles = make_tiles(pictures, self.model.config)

    def obey(self, line: str) -> None:
        """Do what a line asks for that begins with a slash. Raises ValueError where that fails."""
        command, _, rest = line.strip().partition(" ")
        if command not in LINE_COMMANDS or (rest and command != "/image"):
            raise ValueError(
                f"{show(line)} is none of {', '.join(LINE_COMMANDS)}; a question may begin with a "
                "space before the slash"
            )
        if command == "/help":
            print(HELP, flush=True)
        elif command == "/reset":
            self.reset()
        else:
            added = load_pictures(split_paths(rest.strip()))
            self.set_pictures(self.pictures + added)
            for picture in added:
                say(f"[a picture of {picture.width} x {picture.height} goes with what you ask now]")

    def answer(self, question: str) -> str:
        """The model's answer, which is printed while it comes, and is then a part of the
        conversation. Raises ValueError for what is no question, or is too long.
        """
        check_text(question, "the question")
        check_words(question, reserved_words(self.tokenizer), "the question")
        asked = add_images(question, len(self.pictures) - self.num_shown)
        turns = [*self.turns, asked]
        answer = speak(reply(self.model, self.tokenizer, turns, self.tiles, self.options))
        # a model may spell such a word, and would then be asked for another picture
        kept = answer
        for word in reserved_words(self.tokenizer):
            kept = kept.replace(word, "")
        self.turns += [asked, kept]
        self.num_shown = len(self.pictures)
        return answer

    def take(self, line: str) -> bool:
        """Answer a line, or do what it asks for. False, and a sentence that says why, for one that
        the model cannot take: it is as if it had not been.
        """
        try:
            if line.startswith("/"):
                self.obey(line)
            else:
                self.answer(line)
            return True
        except (ValueError, MemoryError, RuntimeError) as error:
            sentence = sentence_of_allocation(error)
            if sentence is None and isinstance(error, ValueError):
                sentence = " ".join(str(error).split())
            if sentence is None:
                raise
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        return False


def converse(conversation: Conversation) -> list[str]:
    """A conversation, until a blank line, /quit or Ctrl-C. What the model cannot take is said, and
    is no end.

    From a pipe it is one, where no line could be answered, or too many in a row could not; then
    ValueError is raised.
    """
    say("[/help says what else a line may be; an empty line is the end]")
    num_failures = 0  # in a row
    try:
        line = read_line()
        while line.strip() and line.strip() != "/quit":
            if conversation.take(line):
                num_failures = 0
            else:
                num_failures += 1
                if num_failures == MOST_FAILURES and not is_terminal():
                    raise ValueError(f"{MOST_FAILURES} lines in a row could not be answered")
            line = read_line()
    except KeyboardInterrupt:
        print()
        return conversation.turns
    if num_failures > 0 and not conversation.turns and not is_terminal():
        raise ValueError("none of the lines could be answered")
    return conversation.turns


def has_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself; others imitate it, and are slower."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def choose_precision(model: Any) -> Any:
    """The model in bf16 where the processor has it, and says which it is."""
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and has_bf16():
        model = model.to(torch.bfloat16)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    say(f"[{dtype} on {parameter.device}]")
    return model


def chat(options: ChatOptions) -> list[str]:
    """The turns of the conversation: user, assistant, user, ...

    A turn that shows pictures begins with a tag for each of them.
    """
    model, tokenizer, _ = load_mllm(options.checkpoint, options.tokenizer, options.device)
    check_words(options.system_prompt, reserved_words(tokenizer), "--system_prompt")
    model = choose_precision(model)
    model.eval()
    conversation = Conversation(model, tokenizer, options)
    if options.question is None:
        return converse(conversation)
    conversation.answer(options.question)
    return conversation.turns


COMMANDS = {
    "question": Command(QuestionOptions, question),
    "match": Command(MatchOptions, match),
    "search": Command(SearchOptions, search),
    "chat": Command(ChatOptions, chat),
}


def main(argv: list[str]) -> None:
    run_command(COMMANDS, argv, "Ask one model about your pictures.")


if __name__ == "__main__":
    one_sentence(main)
