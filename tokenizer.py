"""tokenizer.py"""
from files import write_atomically
from pathlib import Path
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers
import hashlib
import sentencepiece
import tokenizers
import torch


ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


ROLES = ("<pad>", "[PAD]", "<|endoftext|>"), ("<s>", "[CLS]"), ("</s>", "[SEP]"), ("<mask>", "[MASK]")


class Tokenizer:
    """Text <-> ids. `pad_id, cls_id, sep_id, mask_id` are None where a vocabulary has no such token (Qwen2)."""
    options = {"add_special_tokens": False}

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend, self.vocab_size = backend, backend.get_vocab_size()
        backend.no_padding()
        backend.no_truncation()
        special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        roles = [next((special[name] for name in names if name in special), None) for names in ROLES]
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = roles
        self.special_ids = {*special.values(), *roles} - {None}

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """<s> text </s>, cut to max_len with </s> kept; the text's ids alone where a vocabulary has no <s> and </s>."""
        start, end = ([] if i is None else [i] for i in (self.cls_id, self.sep_id))
        pieces = self.backend.encode(text, **self.options)
        ids = getattr(pieces, "ids", pieces)  # SentencePiece gives a list
        return start + (ids if max_len is None else ids[:max_len - len(start) - len(end)]) + end

    def decode(self, ids) -> str:
        return self.backend.decode([int(i) for i in ids if int(i) not in self.special_ids])

    def __call__(self, texts: list[str], max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, (B, max_len) int64. Always padded to max_len: AAUE's fused query sees the padding."""
        rows = [self.encode(text, max_len) for text in texts]
        ids = torch.tensor([row + [self.pad_id] * (max_len - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (max_len - len(row)) for row in rows])

    def content(self) -> tuple[str, bytes]:
        return "tokenizer.json", self.backend.to_str(pretty=True).encode()

    def save(self, folder: str | Path) -> None:
        name, content = self.content()
        write_atomically(Path(folder) / name, lambda temporary: temporary.write_bytes(content))

    def digest(self) -> str:
        """The same for two tokenizers that give the same ids."""
        _, content = self.content()
        return hashlib.sha256(content).hexdigest()[:16]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model. Those of <pad>, <s>, </s> and <mask> that it lacks get the ids after its last piece."""
    options = {}

    def __init__(self, path):
        backend, roles = sentencepiece.SentencePieceProcessor(model_file=str(path)), []
        self.path, self.backend, self.vocab_size = Path(path), backend, backend.get_piece_size()
        special = {i for i in range(self.vocab_size) if backend.is_control(i) or backend.is_unknown(i)}
        for names in ROLES:
            ids = [i for i in map(backend.piece_to_id, names) if backend.id_to_piece(i) in names]
            roles += ids[:1] or [self.vocab_size]
            self.vocab_size += not ids
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = roles
        self.special_ids = special | {*roles}

    def content(self) -> tuple[str, bytes]:
        return "tokenizer.model", self.path.read_bytes()


def _byte_level(model, specials) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    return backend


def load_tokenizer(path) -> Tokenizer:
    """A folder or file: tokenizer.json, RoBERTa's vocab.json + merges.txt, or a SentencePiece *.model. ValueError."""
    path = Path(path)
    files = [path / "tokenizer.json", path / "vocab.json", *sorted(path.glob("*.model"))] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file() and file.suffix in (".json", ".model")), None)
    if file is None:
        raise ValueError(f"no tokenizer at {path}: expected tokenizer.json, vocab.json with merges.txt, or a *.model")
    try:
        if file.suffix == ".model":
            return SentencePieceTokenizer(file)
        if file.name != "vocab.json":
            return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
        model = models.BPE.from_file(str(file), str(file.with_name("merges.txt")))
    except Exception as error:  # both libraries raise nothing narrower
        raise ValueError(f"{file} is not a readable tokenizer: {error}") from None
    if missing := [name for name in ROBERTA_SPECIALS if model.token_to_id(name) is None]:
        raise ValueError(f"{file} is not RoBERTa's, it lacks {missing}: give the tokenizer.json of other vocabularies")
    return Tokenizer(_byte_level(model, ROBERTA_SPECIALS))


def train_tokenizer(texts, vocab_size: int, specials=ROBERTA_SPECIALS) -> Tokenizer:
    """Byte-level BPE of at most vocab_size ids, the specials first; the same texts give the same tokenizer."""
    backend = _byte_level(models.BPE(), ())
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(_byte_level(backend.model, specials))


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, pad_token_id: int) -> None:
    """Raises ValueError unless a model with this vocabulary can read what the tokenizer writes."""
    if tokenizer.vocab_size > vocab_size or tokenizer.pad_id != pad_token_id:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids and pad id {tokenizer.pad_id}, the model "
            f"--vocab_size {vocab_size} and --pad_token_id {pad_token_id}"
        )
