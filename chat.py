"""Conversations -> token ids, labels and image placeholders, for the MLLM.

Paper: Manager (TCSVT 2025), section V, which trains as LLaVA-OneVision does. Official counterpart:
`preprocess_qwen` and `preprocess_plain` of LLaVA-NeXT's train.py, and its `tokenizer_image_token`.

A text holds one tag <image> for each picture. Its ids hold the placeholder IMAGE_TOKEN in that
place; llava_manager.py expands it to as many tokens as the picture has. A label is the token
itself, or IGNORE where there is no loss.

Shapes: B rows of a batch, L ids of the longest one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fields import show
from files import BadSample, need

IMAGE_TOKEN = -200  # the id of an image's placeholder, and of each of its tokens
IGNORE = -100  # the label of a token without loss
IMAGE_TAG = "<image>"
SYSTEM = "You are a helpful assistant."
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
ROLES = {"human": "user", "gpt": "assistant"}  # in LLaVA's JSON, and in Qwen's chats


def tokenize(text: str, tokenizer: Any, has_image: bool = True) -> list[int]:
    """Token ids of a text. Every <image> becomes a placeholder, unless has_image is False; the
    pieces around it are encoded one by one.

    tokenizer: one of tokenizer.py, or a tokenizers.Tokenizer. Raises ValueError if the text needs
    the special tokens of chats and the tokenizer lacks them.
    """
    backend = getattr(tokenizer, "backend", tokenizer)
    if TURN_START in text:
        for special in (TURN_START, TURN_END):
            if backend.token_to_id(special) is None:
                raise ValueError(
                    f"the tokenizer lacks {TURN_START} or {TURN_END}, which chats need; Qwen2's "
                    "has both"
                )
    # between two pieces stood a tag
    pieces = text.split(IMAGE_TAG) if has_image else [text]
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            ids.append(IMAGE_TOKEN)
        ids.extend(backend.encode(piece, add_special_tokens=False).ids)
    return ids


# ---------------------------------------------------------------- conversations to train on
def read_turns(conversation: list[dict]) -> list[tuple[str, str]]:
    """The turns of LLaVA's JSON as (role, text); the role is "user" or "assistant", and of the
    first one it may be "system". Raises ValueError for anything else.
    """
    turns = []
    for number, turn in enumerate(conversation):
        place = f"turn {number}"
        speaker = need(turn, "from", str, place)
        text = need(turn, "value", str, place)
        if speaker == "system" and number == 0:
            turns.append(("system", text))
        elif speaker in ROLES:
            turns.append((ROLES[speaker], text))
        else:
            raise BadSample(
                f"{place}: 'from' is {show(speaker)}; it must be human or gpt, or of the first "
                "turn system"
            )
    return turns


def num_untrained(turns: list[tuple[str, str]]) -> int:
    """How many turns stand before those that are trained on: the system's, and an answer before the
    first question, which is dropped, as in the official code.
    """
    number = 0
    for role in ("system", "assistant"):
        if number < len(turns) and turns[number][0] == role:
            number += 1
    return number


def encode_plain(turns: list[tuple[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A placeholder, the caption, a newline. The text of the human turn is not used: official. Nor
    is a turn of the system.
    """
    if turns and turns[0][0] == "system":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] or IMAGE_TAG not in turns[0][1]:
        raise ValueError(
            f"style plain needs a human turn with {IMAGE_TAG}, then gpt, not {show(turns)}"
        )
    caption = tokenize(turns[1][1] + "\n", tokenizer, has_image=False)
    return [IMAGE_TOKEN, *caption], [IGNORE, *caption]


def image_first(text: str) -> str:
    """The only <image> of a turn moves to its front, with a newline behind it."""
    if text.count(IMAGE_TAG) != 1 or text.startswith(IMAGE_TAG):
        return text
    rest = text.replace(IMAGE_TAG, "").strip()
    return f"{IMAGE_TAG}\n{rest}".strip()


def label_turn(ids: list[int], role: str, always: set[int]) -> list[int]:
    """The labels of one turn: all tokens of the assistant but placeholders, and the ids in `always`
    of any role.
    """
    labels = []
    for token in ids:
        is_answer = role == "assistant" and token != IMAGE_TOKEN
        labels.append(token if is_answer or token in always else IGNORE)
    return labels


def encode_chat(
    conversation: list[dict],
    tokenizer: Any,
    style: str = "qwen_1_5",
    strict_labels: bool = False,
    has_image: bool = True,
) -> tuple[list[int], list[int]]:
    """A conversation to train on, in LLaVA's JSON -> its input_ids and labels, of one length.

    qwen_1_5: the turn of the system, then each turn as <|im_start|>role, newline, text, <|im_end|>,
    newline. The system's text is SYSTEM, or that of a leading "system" turn: so does Qwen2's own
    template, while the official code ends in a KeyError. A leading gpt turn is dropped; the only
    <image> of a turn moves to its front; in the system's turn, and with has_image=False in all
    turns, the tag is ordinary text. Labels are the assistant's turns and, as in the
    official code, every newline, <|im_start|> and <|im_end|>, unless strict_labels.

    plain (stage 1): a placeholder, the caption, a newline; only the placeholder has no label.

    Raises ValueError for turns that cannot be read, and for another style.
    """
    turns = read_turns(conversation)
    if style == "plain":
        return encode_plain(turns, tokenizer)
    system = SYSTEM
    if turns and turns[0][0] == "system":
        system = turns[0][1]
    turns = turns[num_untrained(turns) :]
    if style != "qwen_1_5" or not turns:
        raise ValueError(
            f"style {show(style)} with {len(turns)} turns; it must be qwen_1_5 or plain, with a "
            "human turn"
        )

    # these have a label in any turn
    always: set[int] = set()
    if not strict_labels:
        always = set(tokenize(f"{TURN_START}{TURN_END}\n", tokenizer))
    # turn by turn: no token reaches over the border of two
    ids: list[int] = []
    labels: list[int] = []
    for role, text in [("system", system), *turns]:
        reads_tags = has_image and role != "system"
        if reads_tags:
            text = image_first(text)
        turn_ids = tokenize(f"{TURN_START}{role}\n{text}{TURN_END}\n", tokenizer, reads_tags)
        ids += turn_ids
        labels += label_turn(turn_ids, role, always)
    return ids, labels


# ---------------------------------------------------------------- prompts
def add_images(text: str, num_images: int) -> str:
    """A turn of the user that shows so many pictures: their tags, joined by spaces, and a newline
    stand in front of the text.
    """
    if num_images == 0:
        return text
    tags = " ".join([IMAGE_TAG] * num_images)
    return f"{tags}\n{text}"


def encode_prompt(
    turns: Sequence[str], tokenizer: Any, num_images: int = 0, system: str = SYSTEM
) -> list[int]:
    """The ids of a prompt that asks for an answer.

    turns: the texts of user, assistant, user ... in turn, so their number is odd. The first one
    shows num_images pictures; later ones may have tags of their own. system: the text of the
    system's turn. Raises ValueError if the last turn is not the user's.
    """
    if len(turns) % 2 == 0:
        raise ValueError(
            f"a prompt ends with a turn of the user, so their number is odd, not {len(turns)}"
        )
    first = add_images(turns[0], num_images)
    chat = f"{TURN_START}system\n{system}{TURN_END}\n"
    for number, text in enumerate([first, *turns[1:]]):
        role = "user" if number % 2 == 0 else "assistant"
        chat += f"{TURN_START}{role}\n{text}{TURN_END}\n"
    return tokenize(f"{chat}{TURN_START}assistant\n", tokenizer)


# ---------------------------------------------------------------- answers
HALF_CHARACTER = "\ufffd"  # what a tokenizer makes of bytes that are no whole character yet


class TextStream:
    """The text of ids that come one by one, in pieces of whole characters.

    A token may be a part of a character in UTF-8, so a piece waits until its last character is
    whole. Some tokenizers leave out the space before the first word of what they decode: so a piece
    is what the ids of the piece before it and its own ones spell, less what the former spell.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.before: list[int] = []  # ids of the last piece
        self.waiting: list[int] = []  # ids that were not given yet

    def add(self, token: int) -> str:
        """What is whole now; "" while the text ends inside of a character."""
        self.waiting.append(token)
        piece = self.rest()
        if not piece or piece.endswith(HALF_CHARACTER):
            return ""
        self.before = self.waiting
        self.waiting = []
        return piece

    def rest(self) -> str:
        """What is left at the end, whole or not."""
        known = self.tokenizer.decode(self.before)
        text = self.tokenizer.decode(self.before + self.waiting)
        return text[len(known) :]


def stop_at(strings: Sequence[str], tokenizer: Any) -> Callable[[list[int]], bool]:
    """For `generate`: an answer ends behind the first of these stop strings, which is a part of it
    then. Raises ValueError for an empty one.
    """
    if not all(strings):
        raise ValueError(f"the stop strings are {show(strings)}; none of them may be empty")
    # a token spells a byte at least, so this many of the last ones hold the longest string
    longest = max((len(string.encode()) for string in strings), default=0) + 1

    def has_ended(new_ids: list[int]) -> bool:
        end = tokenizer.decode(new_ids[-longest:])
        return any(string in end for string in strings)

    return has_ended


# ---------------------------------------------------------------- batches
def pad_right(sequences: list[list[int]], value: int, max_length: int | None) -> Tensor:
    """Lists of numbers -> (B, L), each cut at max_length and filled with `value`."""
    tensors = [torch.tensor(sequence[:max_length]) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def collate_chat(
    rows: list[tuple[list[int], list[int]]], pad_id: int = 0, max_length: int | None = None
) -> dict[str, Tensor]:
    """(input_ids, labels) of each row -> input_ids, labels and attention_mask, each (B, L), cut at
    max_length and padded on the right.
    """
    ids = [row_ids for row_ids, _ in rows]
    labels = [row_labels for _, row_labels in rows]
    ones = [[1] * len(row_ids) for row_ids in ids]
    return {
        "input_ids": pad_right(ids, pad_id, max_length),
        "labels": pad_right(labels, IGNORE, max_length),
        "attention_mask": pad_right(ones, 0, max_length),
    }
