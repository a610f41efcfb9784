"""ask.py"""
from PIL import Image
from PIL import ImageDraw
from PIL import ImageOps
from pathlib import Path
from torch import Tensor
import contextlib
import math
import torch
from chat import encode_prompt
from data import load_answers
from eval import retrieval_scores, unit_vectors
from files import BadSample, write
from images import load_image
from multigrid import preprocess_image
from objectives import class_logits
from weights import load_mllm, load_two_tower
from world import evaluating


def encode_texts(tokenizer, texts: list[str], max_text_len: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, max_text_len), as in training; says what was cut. ValueError for an empty text."""
    for text in texts:
        if not text.strip():
            raise ValueError("the text is empty; write a question or a sentence")
        if (length := len(tokenizer.encode(text))) > max_text_len:
            print(f"note: {text[:40]!r}... has {length} tokens and was cut to the model's text length {max_text_len}")
    return tokenizer(texts, max_text_len)


def open_picture(checkpoint: str, head: str, image: str, texts: list[str], device: str) -> tuple:
    """(model, a batch of one picture and B texts on its device)."""
    model, tokenizer, transform = load_two_tower(checkpoint, head, device)
    ids, mask = encode_texts(tokenizer, texts, model.config.max_text_len)
    batch = {"pixels": transform(load_image(image), None)[None], "input_ids": ids, "attention_mask": mask}
    return model, {k: v.to(next(model.parameters()).device) for k, v in batch.items()}


def contact_sheet(items: list[tuple], columns: int = 4, side: int = 224) -> Image.Image:
    """(picture, label) pairs in rows."""
    sheet = Image.new("RGB", (min(columns, len(items)) * side, math.ceil(len(items) / columns) * (side + 16)), "white")
    for i, (picture, label) in enumerate(items):
        x, y = i % columns * side, i // columns * (side + 16)
        sheet.paste(ImageOps.contain(picture, (side - 8, side - 8)), (x + 4, y + 4))
        ImageDraw.Draw(sheet).text((x + 4, y + side - 2), label[:36], fill="black")
    return sheet


def ask(checkpoint: str, image: str, question: str, top: int = 5, device: str = "auto") -> list[tuple[str, float]]:
    """Answer a question about a picture: the best answers and their probabilities (sigmoids, as in VQA's loss)."""
    model, batch = open_picture(checkpoint, "vqa", image, [question], device)
    answers = load_answers(checkpoint)
    with evaluating(model):
        best = class_logits(model, "vqa", batch)[0].float().sigmoid().topk(min(top, len(answers)))
    found = [(answers[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
    print(*(f"{probability:8.2%}  {answer}" for answer, probability in found), sep="\n")
    return found


def match(checkpoint: str, image: str, text: list, device: str = "auto") -> list[tuple]:
    """How well texts fit a picture: ITM probability and, with an ITC head, cosine similarity."""
    model, batch = open_picture(checkpoint, "itm", image, text, device)
    mask, itc = batch["attention_mask"], [math.nan] * len(text)
    with evaluating(model):
        texts = model.encode_text(batch["input_ids"], mask)
        images = model.encode_image(batch["pixels"]).expand(len(texts), -1, -1, -1)
        itm = model.heads["itm"](model.fuse(texts, images, mask).pooled).float().softmax(-1)[:, 1].tolist()
        if "itc" in model.heads:
            itc = (unit_vectors(model, "text", texts) * unit_vectors(model, "image", images)).sum(-1).tolist()
    found = list(zip(text, itm, itc))
    print(*(f"ITM {probability:8.2%}   ITC {cosine:+.3f}   {line}" for line, probability, cosine in found), sep="\n")
    return found


def search(checkpoint: str, text: str, folder: str, top: int = 12, out: str = "search.png", k_test: int = 128,
           batch_size: int = 32, memory_gb: float = 4.0, device: str = "auto") -> list[tuple]:
    """Find the pictures of a folder that fit a text best, and draw them on a contact sheet."""
    model, tokenizer, transform = load_two_tower(checkpoint, "itm", device)
    ids, mask = encode_texts(tokenizer, [text], model.config.max_text_len)
    files = []
    for file in sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in Image.registered_extensions()):
        try:
            load_image(file)
            files.append(file)
        except BadSample as error:
            print(f"left out: {error}")
    if not files:
        raise ValueError(f"there is no readable picture in {folder}")
    pictures = (lambda i: transform(load_image(files[i]), None)), len(files)
    scores = retrieval_scores(model, *pictures, ids, mask, k_test, 0, batch_size, memory_gb)[:, 0]
    best = scores.topk(min(top, k_test, len(files)))
    found = [(score, files[i]) for score, i in zip(best.values.tolist(), best.indices.tolist())]
    print(*(f"{score:8.3f}  {file}" for score, file in found), sep="\n")
    write(out, contact_sheet([(load_image(file), f"{score:.2f}: {file.name}") for score, file in found]))
    return found


def encode_turns(model, tokenizer, turns: list[str], files: list | None) -> tuple[list[int], list]:
    """Input ids and tiles of a conversation about pictures."""
    images = [load_image(file) for file in files or ()]
    tiles = [preprocess_image(image, model.config, len(images) > 1) for image in images]
    return encode_prompt(turns, tokenizer, len(tiles)), tiles


def chat(checkpoint: str, image: list = None, question: str = None, temperature: float = 0.0, top_p: float = 1.0,
         max_new_tokens: int = 256, tokenizer: str = "", device: str = "auto") -> list[str]:
    """Talk with a LLaVA-OV-Manager about pictures; without --question line by line, until an empty one."""
    model, tokenizer = load_mllm(checkpoint, tokenizer, device)
    turns = []
    with contextlib.suppress(EOFError):
        for line in iter(lambda: input("> "), "") if question is None else [question]:
            if not line.strip():
                raise ValueError("the question is empty")
            ids, tiles = encode_turns(model, tokenizer, [*turns, line], image)
            new = model.generate(torch.tensor([ids]), None, tiles, max_new_tokens, temperature, top_p)[0].tolist()
            turns += [line, tokenizer.decode([token for token in new if token not in model.config.eos_ids]).strip()]
            print(turns[-1])
    return turns
