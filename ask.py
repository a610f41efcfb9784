"""One model and your pictures: a question, several texts, a folder to search, a conversation.

    python ask.py question --checkpoint out/vqav2 --image x.jpg --question "What animal is this?"
    python ask.py match --checkpoint out/demo --image x.jpg --text "a dog" --text "two cats"
    python ask.py search --checkpoint out/flickr30k --folder pictures --text "a dog on the beach"
    python ask.py chat --checkpoint LLAVA --image x.jpg       # a conversation, line by line

`python ask.py -h` lists the commands, `python ask.py question -h` the flags of one. The first three
are for ManagerTower (ACL 2023), chat is for LLaVA-OV-Manager (TCSVT 2025, section IV). Texts are
padded and pictures transformed as in evaluation, so that a question alone gets the same answer as
in a batch.

Shapes: B texts, N experts, L tokens, D width.
"""

import inspect
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from chat import encode_prompt
from eval import check_output, load_vocabulary, retrieval_scores, unit_vectors
from fields import FlagError, check_fields, option, parse_flags
from files import BadSample, save_picture
from images import load_image
from multigrid import ImageTiles, preprocess_image
from objectives import class_logits
from tasks import TASKS
from weights import load_mllm, load_two_tower
from world import evaluating, one_sentence, to_device


# ---------------------------------------------------------------- a script with commands
class Command(NamedTuple):
    """One command of a script: the dataclass of its flags, and what it does with them."""

    options: type
    run: Callable[[Any], Any]


def describe(command: Command) -> str:
    """What a command does: the docstring of its options."""
    return inspect.getdoc(command.options) or ""


def list_commands(commands: dict[str, Command], description: str) -> str:
    """The help page of a script with commands."""
    script = Path(sys.argv[0]).name
    lines = [
        f"usage: {script} COMMAND [--FLAG VALUE ...]",
        "",
        description,
        "",
        f"commands, whose flags `python {script} COMMAND -h` lists:",
    ]
    for name, command in commands.items():
        first_line = describe(command).partition("\n")[0]
        lines.append(f"  {name:<12}{first_line}")
    return "\n".join(lines)


def forgive_encodings() -> None:
    """A letter that the terminal cannot show is shown as "?": no result is lost for it."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_command(commands: dict[str, Command], argv: list[str], description: str) -> None:
    """The main function of a script with commands. Raises FlagError for a command that is none."""
    forgive_encodings()
    script = Path(sys.argv[0]).name
    if not argv:
        raise FlagError(f"{script} needs a command, one of {', '.join(commands)}")
    name = argv[0]
    if name in ("-h", "--help"):
        print(list_commands(commands, description))
        return
    if name not in commands:
        raise FlagError(
            f"{script} has no command {name!r}; it must be one of {', '.join(commands)}"
        )
    command = commands[name]
    options = parse_flags(command.options, argv[1:], describe(command), name)
    command.run(options)


# ---------------------------------------------------------------- one picture and its texts
def encode_texts(tokenizer: Any, texts: list[str], max_text_len: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, max_text_len), as in training; says what was cut. Raises ValueError for an
    empty text.
    """
    for text in texts:
        if not text.strip():
            raise ValueError("the text is empty; write a question or a sentence")
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
    model, tokenizer, transform = load_two_tower(checkpoint, head, device)
    assert transform is not None, "a two-tower model has a transform"
    input_ids, attention_mask = encode_texts(tokenizer, texts, model.config.max_text_len)
    pixels = transform(load_image(image), None)[None]  # (1, 3, S, S)
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
    image: str = option(help="the picture")
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
    image: str = option(help="the picture")
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
        logits = model.heads["itm"](model.fuse(texts, images, mask).pooled).float()  # (B, 2)
        probabilities = logits.softmax(-1)[:, 1].tolist()
        if has_itc:
            text_vectors = unit_vectors(model, "text", texts)  # (B, C)
            image_vectors = unit_vectors(model, "image", images)
            similarities = (text_vectors * image_vectors).sum(-1).tolist()

    result = list(zip(options.text, probabilities, similarities, strict=True))
    for text, probability, similarity in result:
        itc = f"   ITC {similarity:+.3f}" if has_itc else ""
        print(f"ITM {probability:8.2%}{itc}   {text}")
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
    folder: str = option(help="the pictures; folders inside it are searched too")
    top: int = option(12, "pictures to show", least=1)
    out: str = option("search.png", "file of the contact sheet")
    k_test: int = option(128, "pictures to re-rank, where the model has an ITC head", least=1)
    batch_size: int = option(32, "pictures of a batch", least=1)
    memory_gb: float = option(4.0, "host memory for experts", least=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)


def find_pictures(folder: str) -> list[Path]:
    """All files of a folder that open as pictures, in alphabetical order; says which are left out.

    Raises ValueError if there are none.
    """
    extensions = Image.registered_extensions()
    files = []
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix.lower() not in extensions:
            continue
        try:
            load_image(file)
        except BadSample as error:
            print(f"left out: {error}")
        else:
            files.append(file)
    if not files:
        raise ValueError(f"there is no readable picture in {folder}")
    return files


def contact_sheet(
    items: list[tuple[Image.Image, str]], columns: int = 4, side: int = 224
) -> Image.Image:
    """(picture, label) pairs, `columns` of them in a row; each has side x side pixels and a line of
    text.
    """
    line_height = 16
    num_rows = math.ceil(len(items) / columns)
    size = (min(columns, len(items)) * side, num_rows * (side + line_height))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(items):
        x = i % columns * side
        y = i // columns * (side + line_height)
        sheet.paste(ImageOps.contain(picture, (side - 8, side - 8)), (x + 4, y + 4))
        drawable = label[:36].encode("utf-8", errors="replace").decode()  # names need not be UTF-8
        draw.text((x + 4, y + side - 2), drawable, fill="black")
    return sheet


def search(options: SearchOptions) -> list[tuple[float, Path]]:
    """(ITM score, file) of the best pictures, the best one first."""
    check_output("--out", options.out)
    model, tokenizer, transform = load_two_tower(options.checkpoint, "itm", options.device)
    assert transform is not None, "a two-tower model has a transform"
    input_ids, mask = encode_texts(tokenizer, [options.text], model.config.max_text_len)
    files = find_pictures(options.folder)

    def load(index: int) -> Tensor:
        return transform(load_image(files[index]), None)  # (3, S, S)

    scores = retrieval_scores(
        model,
        load,
        len(files),
        input_ids,
        mask,
        options.k_test,
        0,  # the text looks for pictures, no picture looks for a text
        options.batch_size,
        options.memory_gb,
    )[:, 0]  # (I,)
    best = scores.topk(min(options.top, options.k_test, len(files)))

    result = []
    items = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        file = files[index]
        result.append((score, file))
        items.append((load_image(file), f"{score:.2f}: {file.name}"))
        print(f"{score:8.3f}  {file}")
    save_picture(options.out, contact_sheet(items))
    return result


# ---------------------------------------------------------------- chat
@dataclass
class ChatOptions:
    """Talk with a LLaVA-OV-Manager about pictures.

    Without --question line by line, until an empty one.
    """

    checkpoint: str = option(help="folder of the model, ours or an official one")
    image: list[str] = option((), "a picture")
    question: str | None = option(None, "a single question; none = a conversation")
    temperature: float = option(0.0, "of sampling; 0 = always the likeliest token", least=0)
    top_p: float = option(1.0, "sample from the likeliest tokens of this mass", above=0, most=1)
    max_new_tokens: int = option(256, "most tokens of an answer", least=1, most=32_768)
    tokenizer: str = option("", "folder or file; none = the one beside the model")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.question is not None and not self.question.strip():
            raise ValueError("the question is empty")


def load_tiles(files: Sequence[str], config: Any) -> list[ImageTiles]:
    """What the model sees of each picture."""
    pictures = [load_image(file) for file in files]
    has_several = len(pictures) > 1
    return [preprocess_image(picture, config, has_several) for picture in pictures]


def encode_turns(
    model: Any, tokenizer: Any, turns: list[str], files: Sequence[str]
) -> tuple[list[int], list[ImageTiles]]:
    """Input ids and tiles of a conversation about pictures. turns: user, assistant, user, ..."""
    tiles = load_tiles(files, model.config)
    return encode_prompt(turns, tokenizer, len(tiles)), tiles


def reply(
    model: Any, tokenizer: Any, turns: list[str], tiles: list[ImageTiles], options: ChatOptions
) -> str:
    """The model's answer to a conversation that ends with a turn of the user."""
    input_ids = torch.tensor([encode_prompt(turns, tokenizer, len(tiles))])  # (1, L)
    new_ids = model.generate(
        input_ids, None, tiles, options.max_new_tokens, options.temperature, options.top_p
    )[0].tolist()
    spoken = [token for token in new_ids if token not in model.config.eos_ids]
    return tokenizer.decode(spoken).strip()


def read_line() -> str:
    """The user's next line; blank if there is none any more, or where it has only spaces."""
    try:
        return input("> ")
    except EOFError:
        return ""


def converse(
    model: Any, tokenizer: Any, tiles: list[ImageTiles], options: ChatOptions
) -> list[str]:
    """A conversation, until a blank line. What the model cannot take is said, and is no end."""
    turns: list[str] = []
    line = read_line()
    while line.strip():
        try:
            answer = reply(model, tokenizer, [*turns, line], tiles, options)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            turns += [line, answer]
            print(answer)
        line = read_line()
    return turns


def chat(options: ChatOptions) -> list[str]:
    """The turns of the conversation: user, assistant, user, ..."""
    model, tokenizer, _ = load_mllm(options.checkpoint, options.tokenizer, options.device)
    tiles = load_tiles(options.image, model.config)
    if options.question is None:
        return converse(model, tokenizer, tiles, options)
    answer = reply(model, tokenizer, [options.question], tiles, options)
    print(answer)
    return [options.question, answer]


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
