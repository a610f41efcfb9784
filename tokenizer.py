"""Text <-> ids: RoBERTa's and other byte-level BPEs, BERT's, Qwen2's, and SentencePiece models.

Official counterparts: HF's RobertaTokenizer, BertTokenizer and Qwen2Tokenizer; the ids are the same
(tests/test_tokenizer.py). For the demo a small BPE is trained on the texts themselves.

T: max_len, the number of tokens that a text is padded to.
"""

import base64
import binascii
import contextlib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fields import show
from files import (
    MOST_BYTES,
    as_dict,
    read_json,
    size_in_words,
    write_atomically,
)
from hub import find_folder
from world import first_line_of, silent_libraries

ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# the names that a special token has in different vocabularies; the first one that is there counts
PAD_NAMES = ("<pad>", "[PAD]", "<|endoftext|>")
CLS_NAMES = ("<s>", "[CLS]")
SEP_NAMES = ("</s>", "[SEP]")
MASK_NAMES = ("<mask>", "[MASK]")
# role -> (the names of its token, what it is needed for)
ROLES = {
    "pad": (PAD_NAMES, "to pad texts with"),
    "cls": (CLS_NAMES, "which begins each text"),
    "sep": (SEP_NAMES, "which ends each text"),
    "mask": (MASK_NAMES, "which MLM puts in the place of words"),
    "im_start": (("<|im_start|>",), "which begins each turn of a chat"),
    "im_end": (("<|im_end|>",), "which ends each turn of a chat"),
}
# model_type of a config.json that says which ids the special tokens have
TEXT_KINDS = ("roberta", "xlm-roberta", "camembert", "bert", "bridgetower")
TOWER_ROLES = ("pad", "cls", "sep")  # what a two-tower model needs
MLM_ROLES = ("pad", "cls", "sep", "mask")
CHAT_ROLES = ("im_start", "im_end")  # what LLaVA-OV-Manager needs
MOST_IDS = 10**7  # as many as a vocabulary may have

# What a tokenizer.json may cost. The library takes up to 350 bytes for a letter of a vocabulary,
# and the steps that a text goes through may each repeat what the one before has made.
MOST_LETTERS = 5 * 2**20  # of all tokens together; XLM-RoBERTa has 2 million
MOST_LETTERS_OF_A_TOKEN = 10_000  # and of any other text that a file holds
MOST_STEPS = 1000
MOST_GROWTH = 10_000  # times the length of a text; ALBERT has 650, BERT, CLIP and Qwen2 below 50
SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# how many characters a step makes of one, at most
GROWTHS = {
    "NFKC": 18,
    "NFKD": 18,
    "NFC": 3,
    "NFD": 4,
    "Lowercase": 2,
    "BertNormalizer": 8,
    "ByteLevel": 2,
}
# a regular expression that has none of these matches no empty text
MAY_BE_EMPTY = re.compile(r"[*?|(^$]|\{[0,]|\\[bBAzZGKQ]")


def first_id(ids: dict[str, int], names: Sequence[str]) -> int | None:
    """The id of the first of these names that is there."""
    for name in names:
        if name in ids:
            return ids[name]
    return None


class Tokenizer:
    """Text <-> ids.

    pad_id, cls_id, sep_id, mask_id are None where a vocabulary has no such token (Qwen2).
    vocab_size is the highest id + 1, the rows that an embedding needs; ids may be left out.
    """

    backend: Any  # of `tokenizers`, or of SentencePiece
    vocab_size: int
    pad_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_id: int | None

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        # a published file may ask for padding or truncation of its own
        backend.no_padding()
        backend.no_truncation()
        specials = {}
        for i, token in backend.get_added_tokens_decoder().items():
            if token.special:
                specials[token.content] = i
        self.pad_id = first_id(specials, PAD_NAMES)
        self.cls_id = first_id(specials, CLS_NAMES)
        self.sep_id = first_id(specials, SEP_NAMES)
        self.mask_id = first_id(specials, MASK_NAMES)
        self.special_ids = set(specials.values())

    def encode_piece(self, text: str) -> list[int]:
        """The ids of a text alone. Raises ValueError for a text that has none."""
        try:
            return self.library_ids(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            raise ValueError(
                f"the tokenizer cannot take {show(text)}: {first_line_of(error)}"
            ) from None

    def library_ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, special or not."""
        return self.backend.token_to_id(token)

    def special_words(self) -> list[str]:
        """How the special tokens are written."""
        added = self.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def role_id(self, role: str) -> int | None:
        """The id of a row of ROLES; None if no single special token has this role."""
        if role not in CHAT_ROLES:
            return {
                "pad": self.pad_id,
                "cls": self.cls_id,
                "sep": self.sep_id,
                "mask": self.mask_id,
            }[role]
        (name,), _ = ROLES[role]
        token_id = self.id_of(name)
        try:
            ids = self.encode_piece(name)
        except ValueError:
            return None
        return token_id if ids == [token_id] else None

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """<s> text </s>, cut to max_len with </s> kept.

        Where a vocabulary has no <s> and </s>, only the text's ids.
        """
        start = [] if self.cls_id is None else [self.cls_id]
        end = [] if self.sep_id is None else [self.sep_id]
        ids = self.encode_piece(text)
        if max_len is not None:
            ids = ids[: max(max_len - len(start) - len(end), 0)]
        return start + ids + end

    def decode(self, ids: Iterable[int]) -> str:
        """The text, without special tokens."""
        ordinary = [int(i) for i in ids if int(i) not in self.special_ids]
        return self.backend.decode(ordinary)

    def __call__(self, texts: list[str], max_len: int) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of B texts, (B, T) int64. Raises ValueError without a pad token.

        They are always padded to max_len, as AAUE's fused query sees the padding.
        """
        if self.pad_id is None:
            raise ValueError(f"the tokenizer has none of {', '.join(PAD_NAMES)} to pad texts with")
        ids = []
        mask = []  # 1 for real tokens
        for text in texts:
            text_ids = self.encode(text, max_len)
            padding = max_len - len(text_ids)
            ids.append(text_ids + [self.pad_id] * padding)
            mask.append([1] * len(text_ids) + [0] * padding)
        return torch.tensor(ids), torch.tensor(mask)

    def content(self) -> tuple[str, bytes]:
        """Name and content of the file that `save` writes."""
        return "tokenizer.json", self.backend.to_str(pretty=True).encode()

    def save(self, folder: str | Path) -> None:
        name, content = self.content()
        write_atomically(Path(folder) / name, lambda temporary: temporary.write_bytes(content))

    def digest(self) -> str:
        """The same for two tokenizers that give the same ids."""
        _, content = self.content()
        return hashlib.sha256(content).hexdigest()[:16]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model.

    Those of <pad>, <s>, </s>, <mask> that it lacks get the ids after its last piece.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.backend = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self.backend.get_piece_size()
        self.special_ids = set()
        for i in range(self.vocab_size):
            if self.backend.is_control(i) or self.backend.is_unknown(i):
                self.special_ids.add(i)
        # the order of these four lines decides which ids the added tokens get
        self.pad_id = self.find_or_add(PAD_NAMES)
        self.cls_id = self.find_or_add(CLS_NAMES)
        self.sep_id = self.find_or_add(SEP_NAMES)
        self.mask_id = self.find_or_add(MASK_NAMES)

    def find_or_add(self, names: Sequence[str]) -> int:
        """The id of the first of these names that the model has, or a new id."""
        for name in names:
            i = self.backend.piece_to_id(name)
            if self.backend.id_to_piece(i) in names:  # else it is the id of <unk>
                self.special_ids.add(i)
                return i
        new_id = self.vocab_size
        self.vocab_size += 1
        self.special_ids.add(new_id)
        return new_id

    def library_ids(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def special_words(self) -> list[str]:
        """How the special pieces of the model are written."""
        size = self.backend.get_piece_size()
        return [self.backend.id_to_piece(i) for i in sorted(self.special_ids) if i < size]

    def role_id(self, role: str) -> int | None:
        """As of other tokenizers. Chats need words of several letters that are one token each."""
        return None if role in CHAT_ROLES else super().role_id(role)

    def id_of(self, token: str) -> int | None:
        piece_id = self.backend.piece_to_id(token)
        return piece_id if self.backend.id_to_piece(piece_id) == token else None

    def content(self) -> tuple[str, bytes]:
        return "tokenizer.model", self.path.read_bytes()


# ---------------------------------------------------------------- loading
def byte_level(model: models.Model, specials: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE, as GPT-2's and RoBERTa's: any text has ids, and they give it back."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def tokenizer_file(path: Path) -> Path:
    """The file of a tokenizer in a folder, or the file itself. ValueError if there is none."""
    candidates = [path]
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "vocab.json", *sorted(path.glob("*.model"))]
    for file in candidates:
        if file.is_file() and file.suffix in (".json", ".model"):
            return file
    raise ValueError(
        f"no tokenizer at {path}: expected tokenizer.json, vocab.json with merges.txt, or a *.model"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A folder or file: tokenizer.json, RoBERTa's vocab.json + merges.txt, SentencePiece's *.model.

    Raises ValueError, which names the file.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"load_tokenizer: path is {show(path)}; it must be a text or a Path")
    file = tokenizer_file(find_folder(path, "tokenizer"))
    check_files(file)
    try:
        with silent_libraries():
            tokenizer = open_tokenizer(file)
            try_out(tokenizer)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the libraries raise nothing narrower, and Rust panics
        raise ValueError(f"{file} is not a readable tokenizer: {first_line_of(error)}") from None
    if file.name == "vocab.json":
        # it does not say which tokens are special, so only RoBERTa's can be read
        missing = [name for name in ROBERTA_SPECIALS if tokenizer.id_of(name) is None]
        if missing:
            raise ValueError(
                f"{file} is not RoBERTa's, it lacks {', '.join(missing)}: give the tokenizer.json "
                "of other vocabularies"
            )
        tokenizer = Tokenizer(byte_level(tokenizer.backend.model, ROBERTA_SPECIALS))
    config = file.with_name("config.json")
    if config.is_file():
        check_special_ids(tokenizer, read_json(config, dict), str(config))
    return tokenizer


def check_special_ids(tokenizer: Tokenizer, config: dict, name: str) -> None:
    """Raises ValueError for a tokenizer that numbers its special tokens otherwise than the
    config.json of RoBERTa, BERT or BridgeTower, called `name`: then its other ids differ as well.
    """
    values = {**config, **as_dict(config.get("text_config"))}
    if config.get("model_type") not in TEXT_KINDS:
        return
    for key, found in (
        ("bos_token_id", tokenizer.cls_id),
        ("pad_token_id", tokenizer.pad_id),
        ("eos_token_id", tokenizer.sep_id),
    ):
        wanted = values.get(key)
        if type(wanted) is int and found is not None and found != wanted:
            raise ValueError(
                f"{key} of {name} is {show(wanted)}, but the tokenizer has {found}: it belongs to "
                "other weights"
            )


def check_files(file: Path) -> None:
    """Raises ValueError for what would cost the library too much, or end the process."""
    for needed in (file, file.with_name("merges.txt")):
        if needed == file or file.name == "vocab.json":
            check_file(needed)
    if file.suffix == ".json":
        content = read_json(file, dict)
        check_ids(content, file)
        check_letters(content, file)
        check_growth(content, file)
        check_model(content.get("model"), file)


def check_file(file: Path) -> None:
    """Raises ValueError for what a library should not be given to read."""
    if not file.is_file():
        raise ValueError(f"{file} is needed, but there is no such file")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{file} has {size_in_words(file.stat().st_size)}; it must be at most "
            f"{size_in_words(MOST_BYTES)}"
        )


def check_ids(content: dict, file: Path) -> None:
    """Raises ValueError for ids that no embedding has: the library would count up to them."""
    vocabulary = content  # of a vocab.json
    if "model" in content:
        vocabulary = as_dict(as_dict(content["model"]).get("vocab"))
    ids = list(vocabulary.values())
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        ids.append(as_dict(token).get("id"))
    if file.name == "vocab.json" and sorted(map(str, ids)) != sorted(map(str, range(len(ids)))):
        raise ValueError(f"{file}: the ids must be 0 to {len(ids) - 1}, each of them once")
    for i in ids:
        if isinstance(i, int) and i >= MOST_IDS:
            raise ValueError(f"{file}: a token has the id {i}; it must be below {MOST_IDS}")


def check_letters(content: dict, file: Path) -> None:
    """Raises ValueError for tokens that are so long that the library would need gigabytes."""
    tokens = tokens_of(content)
    longest = max(tokens, key=len, default="")
    if len(longest) > MOST_LETTERS_OF_A_TOKEN:
        raise ValueError(
            f"{file}: a token has {len(longest)} letters, {show(longest)}; it must have at most "
            f"{MOST_LETTERS_OF_A_TOKEN}"
        )
    letters = sum(len(token) for token in tokens)
    if letters > MOST_LETTERS:
        raise ValueError(
            f"{file}: its tokens have {letters} letters together; they must have at most "
            f"{MOST_LETTERS}"
        )


def tokens_of(content: dict) -> list[str]:
    """The texts of all tokens, and those that the model puts before or behind them."""
    model = as_dict(content.get("model"))
    vocabulary = model.get("vocab") if model else content  # of a vocab.json
    names = list(vocabulary) if isinstance(vocabulary, dict) else []
    if isinstance(vocabulary, list):  # Unigram's, with scores
        names = [row[0] for row in vocabulary if isinstance(row, list) and row]
    names += model.values()  # continuing_subword_prefix and the like
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        names.append(as_dict(token).get("content"))
    return [name for name in names if isinstance(name, str)]


def check_growth(content: dict, file: Path) -> None:
    """Raises ValueError for steps that would make gigabytes of a short text."""
    steps = steps_of([content.get(name) for name in SECTIONS])
    if len(steps) > MOST_STEPS:
        raise ValueError(
            f"{file}: a text goes through {len(steps)} steps; it must be at most {MOST_STEPS}"
        )
    growth = 1.0
    for step in steps:
        check_texts(step, file)
        growth *= growth_of(step)
        if growth > MOST_GROWTH:
            raise ValueError(
                f"{file}: its steps, among them {show(step)}, may make a text more than "
                f"{MOST_GROWTH} times as long"
            )


def check_texts(step: dict, file: Path) -> None:
    for key, text in step.items():
        is_long = isinstance(text, str) and len(text) > MOST_LETTERS_OF_A_TOKEN
        if is_long and key != "precompiled_charsmap":
            raise ValueError(
                f"{file}: {show(key)} of a step has {len(text)} letters; it must have at most "
                f"{MOST_LETTERS_OF_A_TOKEN}"
            )


def steps_of(tree: Any) -> list[dict]:
    """All objects inside a part of a tokenizer.json, however deep: old files name no type."""
    steps = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            steps.append(node)
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
    return steps


def growth_of(step: dict) -> float:
    """How many characters a step makes of one, at most."""
    if "pattern" in step and "content" in step:  # Replace
        return growth_of_replace(as_dict(step["pattern"]), str(step["content"]))
    if "prepend" in step:
        return 1 + len(str(step["prepend"]))
    if "precompiled_charsmap" in step:
        return growth_of_map(step["precompiled_charsmap"])
    if isinstance(step.get("single"), list):  # a template, which may name the text more than once
        return max(1, sum("Sequence" in as_dict(part) for part in step["single"]))
    return GROWTHS.get(str(step.get("type")), 1)


def growth_of_replace(pattern: dict, content: str) -> float:
    literal = pattern.get("String")
    if isinstance(literal, str) and literal:
        return max(1, len(content) / len(literal))
    if literal == "" or MAY_BE_EMPTY.search(str(pattern.get("Regex"))):
        return 1 + len(content)  # between all characters
    return max(1, len(content))


def growth_of_map(charsmap: Any) -> float:
    """Of SentencePiece's map: 4 bytes with the size of an index, the index, and texts with NULs."""
    try:
        content = base64.b64decode(str(charsmap))
    except binascii.Error:  # the library says it
        return 1
    size = int.from_bytes(content[:4], "little")
    return max(1, *(len(text) for text in content[4 + size :].split(b"\0")))


def check_model(model: Any, file: Path) -> None:
    """Raises ValueError for the model of a tokenizer.json that the library must not see."""
    if not isinstance(model, dict):
        return  # the library says it
    if model.get("dropout"):
        raise ValueError(
            f"{file}: dropout is {show(model['dropout'])}, so a text would have other ids each "
            "time; it must be null"
        )
    # the library cuts the prefix off each second part unseen, and ends the process where it is not
    prefix = model.get("continuing_subword_prefix")
    merges = model.get("merges")
    if not prefix or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not str(parts[-1]).startswith(prefix):
            raise ValueError(
                f"{file}: continuing_subword_prefix is {show(prefix)}, but the merge "
                f"{show(merge)} does not have it"
            )


def open_tokenizer(file: Path) -> Tokenizer:
    if file.suffix == ".model":
        return SentencePieceTokenizer(file)
    if file.name != "vocab.json":
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    model = models.BPE.from_file(str(file), str(file.with_name("merges.txt")))
    return Tokenizer(tokenizers.Tokenizer(model))


def try_out(tokenizer: Tokenizer) -> None:
    """A damaged file may be read, and end in a panic of the library at its first text.

    What is an Exception is left for the text that really needs it.
    """
    with contextlib.suppress(Exception):
        ids = tokenizer.library_ids("A red circle: 12 \u00e9, \u96ea")
        tokenizer.decode(ids)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str] = ROBERTA_SPECIALS
) -> Tokenizer:
    """Byte-level BPE of at most vocab_size ids, the specials first.

    The same texts give the same tokenizer.
    """
    backend = byte_level(models.BPE(), ())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    # a fresh one around the merges, whose special tokens are known as such
    return Tokenizer(byte_level(backend.model, specials))


def check_roles(tokenizer: Tokenizer, roles: Sequence[str]) -> None:
    """Raises ValueError unless there is a special token for each of these rows of ROLES."""
    for role in roles:
        if tokenizer.role_id(role) is not None:
            continue
        names, use = ROLES[role]
        ordinary = [name for name in names if tokenizer.id_of(name) is not None]
        if ordinary:
            raise ValueError(
                f"the tokenizer has {ordinary[0]}, {use}, only as an ordinary word; it must be a "
                "special token"
            )
        listed = " or ".join(names)
        raise ValueError(f"the tokenizer lacks a special token {listed}, {use}")


def check_tokenizer(
    tokenizer: Tokenizer,
    vocab_size: int,
    pad_token_id: int | None = None,
    roles: Sequence[str] = TOWER_ROLES,
    im_start_id: int | None = None,
) -> None:
    """Raises ValueError unless a model can read what the tokenizer writes.

    vocab_size, pad_token_id, im_start_id: of the model's config; None for what it does not use.
    roles: the rows of ROLES that are needed.
    """
    check_roles(tokenizer, roles)
    size = tokenizer.vocab_size
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer has {size} ids (0 to {size - 1}), the model has "
            f"--vocab_size {vocab_size}"
        )
    if pad_token_id is not None and tokenizer.pad_id != pad_token_id:
        raise ValueError(
            f"the tokenizer has pad id {tokenizer.pad_id}, the model has --pad_token_id "
            f"{pad_token_id}"
        )
    start_id = tokenizer.role_id("im_start")
    if im_start_id is not None and start_id != im_start_id:
        raise ValueError(
            f"the tokenizer has <|im_start|> as id {start_id}, the model has im_start_id "
            f"{im_start_id}"
        )
