"""Text <-> ids: RoBERTa's and other byte-level BPEs, BERT's, Qwen2's, and SentencePiece models.

Official counterparts: HF's RobertaTokenizer, BertTokenizer and Qwen2Tokenizer; the ids are the same
(tests/test_tokenizer.py). For the demo a small BPE is trained on the texts themselves.

T: max_len, the number of tokens that a text is padded to.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from files import write_atomically

ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# the names that a special token has in different vocabularies; the first one that is there counts
PAD_NAMES = ("<pad>", "[PAD]", "<|endoftext|>")
CLS_NAMES = ("<s>", "[CLS]")
SEP_NAMES = ("</s>", "[SEP]")
MASK_NAMES = ("<mask>", "[MASK]")


def first_id(ids: dict[str, int], names: Sequence[str]) -> int | None:
    """The id of the first of these names that is there."""
    for name in names:
        if name in ids:
            return ids[name]
    return None


class Tokenizer:
    """Text <-> ids.

    pad_id, cls_id, sep_id, mask_id are None where a vocabulary has no such token (Qwen2).
    """

    backend: Any  # of `tokenizers`, or of SentencePiece
    vocab_size: int
    pad_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_id: int | None

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.vocab_size = backend.get_vocab_size()
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
        """The ids of a text alone."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """<s> text </s>, cut to max_len with </s> kept.

        Where a vocabulary has no <s> and </s>, only the text's ids.
        """
        start = [] if self.cls_id is None else [self.cls_id]
        end = [] if self.sep_id is None else [self.sep_id]
        ids = self.encode_piece(text)
        if max_len is not None:
            ids = ids[: max_len - len(start) - len(end)]
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

    def encode_piece(self, text: str) -> list[int]:
        return self.backend.encode(text)

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
    file = tokenizer_file(Path(path))
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file)
        if file.name != "vocab.json":
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        model = models.BPE.from_file(str(file), str(file.with_name("merges.txt")))
    except Exception as error:  # both libraries raise nothing narrower
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from None
    # vocab.json does not say which tokens are special, so only RoBERTa's can be read
    missing = [name for name in ROBERTA_SPECIALS if model.token_to_id(name) is None]
    if missing:
        raise ValueError(
            f"{file} is not RoBERTa's, it lacks {missing}: give the tokenizer.json of other "
            "vocabularies"
        )
    return Tokenizer(byte_level(model, ROBERTA_SPECIALS))


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


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, pad_token_id: int) -> None:
    """Raises ValueError unless a model with this vocabulary can read what the tokenizer writes."""
    if tokenizer.vocab_size > vocab_size or tokenizer.pad_id != pad_token_id:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and pad id {tokenizer.pad_id}, the "
            f"model --vocab_size {vocab_size} and --pad_token_id {pad_token_id}"
        )
