"""chat.py"""
from torch import nn
import torch


IMAGE_TOKEN, IGNORE = -200, -100  # the id of an image placeholder; the label of a token without loss


IMAGE_TAG, SYSTEM = "<image>", "You are a helpful assistant."


def tokenize(text: str, tokenizer, has_image: bool = True) -> list[int]:
    """Token ids. Every <image> is a placeholder, unless has_image is False; the pieces around it are encoded alone."""
    backend, ids = getattr(tokenizer, "backend", tokenizer), []
    if "<|im_start|>" in text and None in map(backend.token_to_id, ("<|im_start|>", "<|im_end|>")):
        raise ValueError("the tokenizer lacks <|im_start|> or <|im_end|>, which chats need; Qwen2's has both")
    for i, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        ids += [IMAGE_TOKEN] * (i > 0) + backend.encode(piece, add_special_tokens=False).ids
    return ids


def encode_chat(conversation: list[dict], tokenizer, style: str = "qwen_1_5", strict_labels: bool = False,
                has_image: bool = True) -> tuple[list[int], list[int]]:
    """A training conversation -> input_ids, labels.
    qwen_1_5: the system's turn, then each turn as <|im_start|>role, newline, text, <|im_end|>, newline. A leading gpt
    turn is dropped; the only <image> of a turn moves to its front; with has_image=False the tag is text. Labels: the
    assistant's turns, and, as in the official code, every newline, <|im_start|>, <|im_end|>, unless strict_labels.
    plain (stage 1): a placeholder, the caption, a newline; the placeholder alone has no label."""
    turns = [({"human": "user", "gpt": "assistant"}.get(x.get("from")), x.get("value")) for x in conversation]
    for i, (role, text) in enumerate(turns):
        if role is None or not isinstance(text, str):
            raise ValueError(f'turn {i}: {str(conversation[i])[:80]} is not {{"from": "human" | "gpt", "value": text}}')
    if style == "plain":
        if [role for role, _ in turns] != ["user", "assistant"] or IMAGE_TAG not in turns[0][1]:
            raise ValueError(f"style plain needs a human turn with {IMAGE_TAG}, then gpt, not {str(conversation)[:80]}")
        caption = tokenize(turns[1][1] + "\n", tokenizer, has_image=False)
        return [IMAGE_TOKEN, *caption], [IGNORE, *caption]
    turns = turns[1:] if turns and turns[0][0] == "assistant" else turns
    if style != "qwen_1_5" or not turns:
        raise ValueError(f"style {style!r} with {len(turns)} turns; it must be qwen_1_5 or plain, with a human turn")
    always = set(tokenize("<|im_start|><|im_end|>\n", tokenizer))
    ids, labels = [], []
    for role, text in [("system", SYSTEM), *turns]:
        if has_image and text.count(IMAGE_TAG) == 1 and not text.startswith(IMAGE_TAG):
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        turn = tokenize(f"<|im_start|>{role}\n{text}<|im_end|>\n", tokenizer, has_image)
        shown = {*turn} - {IMAGE_TOKEN} if role == "assistant" else set() if strict_labels else always
        ids, labels = ids + turn, labels + [token if token in shown else IGNORE for token in turn]
    return ids, labels


def encode_prompt(turns: list[str], tokenizer, num_images: int = 0) -> list[int]:
    """The prompt for an answer. turns: user, assistant, user, ...; in front of the first go num_images times <image>,
    joined by spaces, and a newline."""
    if len(turns) % 2 == 0:
        raise ValueError(f"a prompt ends with a turn of the user, so their number is odd, not {len(turns)}")
    roles = ["system", *["user", "assistant"] * len(turns)]
    images = " ".join([IMAGE_TAG] * num_images) + "\n" * (num_images > 0)
    texts = [SYSTEM, images + turns[0], *turns[1:]]
    chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts))
    return tokenize(chat + "<|im_start|>assistant\n", tokenizer)


def collate_chat(rows: list[tuple[list[int], list[int]]], pad_id: int = 0, max_length: int | None = None) -> dict:
    """Rows of (input_ids, labels) -> input_ids, labels, attention_mask (B, L), cut at max_length and padded."""
    columns = {"input_ids": ([ids for ids, _ in rows], pad_id), "labels": ([labels for _, labels in rows], IGNORE),
               "attention_mask": ([[1] * len(ids) for ids, _ in rows], 0)}
    return {k: nn.utils.rnn.pad_sequence([torch.tensor(x[:max_length]) for x in column], True, pad)
            for k, (column, pad) in columns.items()}
