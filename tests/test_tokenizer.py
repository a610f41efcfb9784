"""tokenizer.py against transformers, SentencePiece and published ids."""

import base64
import json
import pickle

import pytest
import sentencepiece
import tokenizers
import torch
from helpers import GOLDEN

import tokenizer as tokenizers_room
from scenes import demo_source, demo_tokenizer
from tokenizer import (
    CHAT_ROLES,
    MLM_ROLES,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

TOKENIZERS = GOLDEN.parent / "tokenizers"
HARD = [
    "Hello world",
    "",
    "  double  spaces ",
    "naïve café — déjà vu",
    "雪が降る 🙂🙃",
    "I'd've said so",
    "100% $5 #tag 3.5",
    "\t\r\n x",
    "a" * 70,
    "The <mask> sat",
    "x<mask>y  <mask>",
    "<s>hi</s>",
    "zero\u200bwidth é e\u0301 ﬁ ½",
    "<|endoftext|>",
    "\x00\x01",
]


@pytest.mark.parametrize("name", ["roberta-base", "qwen2"])
def test_tokenizer_gives_the_published_ids(name, tmp_path):
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"no {TOKENIZERS / name}")
    ours = load_tokenizer(TOKENIZERS / name)
    ours.save(tmp_path)
    saved = load_tokenizer(tmp_path)
    cases = json.loads((TOKENIZERS / name / "expected_ids.json").read_text())
    assert cases
    for case in cases:
        assert ours.encode(case["text"]) == case["ids"]
        assert saved.encode(case["text"]) == case["ids"]


def test_vocab_and_merges_are_read_as_transformers_reads_them(tmp_path):
    RobertaTokenizer = pytest.importorskip("transformers").RobertaTokenizer
    folder = TOKENIZERS / "roberta-base"
    if not folder.is_dir():
        folder = tmp_path
        trained = train_tokenizer(HARD * 3 + ["the man and the dog"] * 9, 400)
        trained.backend.model.save(str(folder))
    ours = load_tokenizer(folder)
    peer = RobertaTokenizer.from_pretrained(folder)
    assert ours.pad_id == peer.pad_token_id
    assert ours.cls_id == peer.cls_token_id
    assert ours.sep_id == peer.sep_token_id
    assert ours.mask_id == peer.mask_token_id
    assert ours.special_ids == set(peer.all_special_ids)
    assert ours.vocab_size == len(peer)
    for text in HARD:
        assert ours.encode(text) == peer(text)["input_ids"], text
        cut = peer(text, truncation=True, max_length=7)["input_ids"]
        assert ours.encode(text, 7) == cut, text
    ids, mask = ours(HARD, 20)
    expected = peer(HARD, truncation=True, max_length=20, padding="max_length", return_tensors="pt")
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])


def test_trained_tokenizer_is_deterministic_lossless_and_whole_worded(tmp_path):
    ours = demo_tokenizer()
    assert ours.backend.to_str() == demo_tokenizer().backend.to_str()
    assert (ours.cls_id, ours.pad_id, ours.sep_id, ours.mask_id) == (0, 1, 2, 4)
    ours.save(tmp_path)
    again = pickle.loads(pickle.dumps(load_tokenizer(tmp_path / "tokenizer.json")))
    for text in HARD:
        if "<" not in text:
            assert again.decode(again.encode(text)) == text
    for kind in ("captions", "statements", "hypotheses"):
        for row in demo_source(kind, "heldout", 50).texts():
            assert len(ours.encode(row["text"])) == len(row["text"].split()) + 2


def test_the_digest_tells_tokenizers_apart(tmp_path):
    ours = demo_tokenizer()
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path).digest() == ours.digest()
    assert train_tokenizer(["a b c"], 300).digest() != ours.digest()


def test_sentencepiece_equals_the_library_and_adds_what_it_lacks(tmp_path):
    texts = [row["text"] for row in demo_source("captions", "train", 300).texts()]
    (tmp_path / "text").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=36,
        minloglevel=2,
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    ours = load_tokenizer(tmp_path)
    text = "a small red circle"
    assert ours.encode(text) == [peer.bos_id(), *peer.encode(text), peer.eos_id()]
    assert ours.decode(ours.encode(text)) == text
    assert (ours.pad_id, ours.mask_id, ours.vocab_size) == (36, 37, 38)
    assert ours.special_ids == {0, 1, 2, 36, 37}
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")
    saved = pickle.loads(pickle.dumps(load_tokenizer(tmp_path / "out")))
    assert saved.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "expected tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not a readable"),
        ({"x.model": "?"}, "x.model is not a readable"),
        ({"vocab.json": '{"a": 0}'}, "merges.txt is needed, but there is no such file"),
        (
            {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"},
            "lacks <s>, <pad>, </s>, <unk>, <mask>: give",
        ),
    ],
)
def test_what_is_no_tokenizer_is_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_the_model_cannot_read_is_refused():
    ours = demo_tokenizer()
    check_tokenizer(ours, ours.vocab_size, ours.pad_id)
    check_tokenizer(ours, ours.vocab_size + 8, ours.pad_id)
    with pytest.raises(ValueError, match=f"has {ours.vocab_size} ids .* --vocab_size 9"):
        check_tokenizer(ours, 9, ours.pad_id)
    with pytest.raises(ValueError, match="pad id 1, the model .* --pad_token_id 0"):
        check_tokenizer(ours, ours.vocab_size, 0)


def test_without_a_pad_token_there_are_no_batches():
    backend = tokenizers_room.byte_level(tokenizers_room.models.BPE(), ())
    with pytest.raises(ValueError, match="has none of <pad>, .* to pad texts with"):
        tokenizers_room.Tokenizer(backend)(["x"], 4)


# ---------------------------------------------------------------- unusual and damaged files
SPECIALS = ("<s>", "</s>", "<unk>", "<mask>", "<pad>")


def word_level(words, specials=SPECIALS, gap=0):
    """A tokenizer of whole words, whose special tokens come last, `gap` ids behind the rest."""
    vocabulary = {word: number for number, word in enumerate(words)}
    for number, name in enumerate(specials):
        vocabulary[name] = len(words) + gap + number
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(specials))
    return backend


def test_ids_need_not_be_dense_and_the_pad_may_be_the_last(tmp_path):
    word_level(["a", "red", "circle"], gap=90).save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert (ours.pad_id, ours.vocab_size) == (97, 98)
    assert ours.encode("a red dog") == [93, 0, 1, 95, 94]
    check_tokenizer(ours, 98, 97, MLM_ROLES)
    with pytest.raises(ValueError, match="has 98 ids .0 to 97., the model has --vocab_size 97"):
        check_tokenizer(ours, 97, 97)


@pytest.mark.parametrize("model", ["WordLevel", "WordPiece", "Unigram"])
def test_a_tokenizer_of_any_model_serves_with_the_roles(model, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red"]
    if model == "Unigram":
        vocabulary = tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=1)
    else:
        ids = {word: number for number, word in enumerate(words)}
        vocabulary = getattr(tokenizers.models, model)(ids, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(vocabulary)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:5])
    backend.enable_truncation(3)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    check_tokenizer(ours, 7, 0, MLM_ROLES)
    assert ours.encode("a red dog") == [2, 5, 6, 1, 3]
    assert ours.encode("a red dog", 1) == [2, 3]


def test_needed_tokens_are_named(tmp_path):
    ours = demo_tokenizer()
    with pytest.raises(
        ValueError, match=r"lacks a special token <\|im_start\|>, which begins each"
    ):
        check_tokenizer(ours, ours.vocab_size, roles=CHAT_ROLES)
    for missing, message in (
        ("<mask>", "<mask> or .MASK., which MLM"),
        ("<pad>", "<pad> or .*, to pad texts with"),
        ("<s>", "<s> or .CLS., which begins each text"),
        ("</s>", "</s> or .SEP., which ends each text"),
    ):
        specials = [name for name in SPECIALS if name != missing]
        word_level(["a"], specials).save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        with pytest.raises(ValueError, match=f"lacks a special token {message}"):
            check_tokenizer(ours, 99, ours.pad_id, MLM_ROLES)


def test_a_role_needs_a_special_token(tmp_path):
    backend = word_level(["a", "<|im_start|>", "<|im_end|>"], ("<s>", "</s>"))
    tree = json.loads(backend.to_str())
    tree["model"]["vocab"]["<pad>"] = 9
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    ours = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has <pad>, to pad texts with, only as an ordinary word"):
        check_tokenizer(ours, 99, ours.pad_id)
    with pytest.raises(ValueError, match=r"has <\|im_start\|>, .* only as an ordinary word"):
        check_tokenizer(ours, 99, roles=CHAT_ROLES)


def flipped(change):
    tree = json.loads(word_level(["a", "red"]).to_str())
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    "content, message",
    [
        (flipped(lambda tree: tree.update(model=None)), "is not a readable"),
        (flipped(lambda tree: tree["model"].update(type="x")), "is not a readable"),
        (flipped(lambda tree: tree["model"].update(vocab=[["a", 1]])), "is not a readable"),
        (flipped(lambda tree: tree["model"]["vocab"].update(a=-1)), "is not a readable"),
        (flipped(lambda tree: tree.update(added_tokens="x")), "is not a readable"),
        # a panic of the library
        (
            flipped(lambda tree: tree.update(pre_tokenizer={"type": "FixedLength", "length": 0})),
            "is not a readable",
        ),
        ("[" * 100_000, "brackets are nested too deeply"),
        ("[1]", "must hold an object"),
        ("{", "is not JSON"),
    ],
)
def test_a_damaged_file_ends_in_one_sentence(content, message, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"tokenizer.json {message}|{message}") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # Rust would print its panic there


def test_what_would_end_the_process_or_change_the_ids_is_found_before(tmp_path):
    tree = json.loads(demo_tokenizer().backend.to_str())
    for key, value, message in (
        ("continuing_subword_prefix", "##", "continuing_subword_prefix is '##', but the merge"),
        ("dropout", 0.5, "dropout is 0.5, so a text would have other ids each time"),
    ):
        changed = {**tree, "model": {**tree["model"], key: value}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"tokenizer.json: {message}"):
            load_tokenizer(tmp_path)


def test_a_text_that_the_library_refuses_is_shown():
    ours = demo_tokenizer()
    with pytest.raises(ValueError, match=r"the tokenizer cannot take 'a .ud83d': "):
        ours.encode("a \ud83d")


# ---------------------------------------------------------------- files that would cost gigabytes
def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


A = {"String": "a"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TWICE = {"Sequence": {"id": "A", "type_id": 0}}
# 100 texts of 100,000 letters for the letter a, in SentencePiece's map without an index
MAP = base64.b64encode(b"\0\0\0\0" + b"x" * 100_000 + b"\0").decode()


@pytest.mark.parametrize(
    "section, value, message",
    [
        ("normalizer", sequence(*[replace(A, "aa")] * 40), "may make a text more than 10000 times"),
        ("normalizer", sequence(sequence(*[replace(A, "aaaaa")] * 9)), "may make a text more"),
        ("normalizer", replace(A, "a" * 10**6), "'content' of a step has 1000000 letters"),
        ("normalizer", sequence(*[replace({"String": ""}, "a")] * 30), "may make a text more"),
        ("normalizer", sequence(*[replace({"Regex": "a?"}, "a")] * 30), "may make a text more"),
        ("normalizer", sequence(*[{"type": "Prepend", "prepend": "ab"}] * 30), "may make a text"),
        ("normalizer", sequence(*[{"prepend": "ab"}] * 30), "may make a text more"),
        ("normalizer", sequence(*[{"type": "ByteLevel"}] * 30), "may make a text more"),
        ("normalizer", sequence(*[{"type": "Lowercase"}] * 9000), "may make a text|9[0-9]+ steps"),
        ("normalizer", sequence(*[{"type": "Nmt"}] * 9000), "goes through 9[0-9]+ steps"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": MAP}, "may make a text"),
        ("decoder", {"type": "Sequence", "decoders": [replace(A, "aa")] * 40}, "may make a text"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTES] * 30}, "may make a text"),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [TWICE] * 10**5, "pair": [TWICE]},
            "goes through|may make a text",
        ),
        ("added_tokens", [{"id": 7, "content": "x" * 10**6}], "a token has 1000000 letters"),
        (
            "added_tokens",
            [{"id": i, "content": "x" * 9000 + str(i)} for i in range(1000)],
            "letters together; they must have at most 5242880",
        ),
        ("model", {"vocab": [["x" * 10**6, 0.0]]}, "a token has 1000000 letters"),
        ("model", {"vocab": {"a": 0}, "end_of_word_suffix": "x" * 10**6}, "a token has 1000000"),
    ],
)
def test_a_file_that_makes_much_of_a_short_text_is_refused(section, value, message, tmp_path):
    tree = json.loads(word_level(["a", "red"]).to_str())
    tree[section] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "steps",
    [
        # Llama's; CLIP's; ALBERT's; BERT's; one that cleans texts in many steps
        [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")],
        [{"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}],
        [
            replace({"String": "``"}, '"'),
            replace({"String": "''"}, '"'),
            {"type": "NFKD"},
            {"type": "StripAccents"},
            {"type": "Lowercase"},
            replace({"Regex": " {2,}"}, " "),
        ],
        [{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}],
        [replace({"Regex": "[áàâ]"}, "a")] * 90,
    ],
)
def test_the_steps_of_published_tokenizers_are_taken(steps, tmp_path):
    for step in steps:
        if step["type"] == "BertNormalizer":
            step |= {"strip_accents": None, "lowercase": True}
    tree = json.loads(word_level(["a", "red"]).to_str())
    tree["normalizer"] = sequence(*steps)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    ours = load_tokenizer(tmp_path)
    assert (
        ours.encode_piece("a red")
        == tokenizers.Tokenizer.from_str(json.dumps(tree))
        .encode("a red", add_special_tokens=False)
        .ids
    )


@pytest.mark.parametrize("kind", ["roberta", "bridgetower", "opt"])
def test_special_ids_are_those_of_the_config_beside_it(kind, tmp_path):
    """A tokenizer that was saved anew with other ids, as many as the weights have rows."""
    word_level(["a", "red"], ("</s>", "<pad>", "<s>", "<unk>", "<mask>")).save(
        str(tmp_path / "tokenizer.json")
    )
    values = {"bos_token_id": 4, "pad_token_id": 3, "eos_token_id": 2}
    config = {"model_type": kind, **values}
    if kind == "bridgetower":
        config = {"model_type": kind, "text_config": values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).cls_id == 4
    values["bos_token_id"] = 0
    config.update(config if kind == "bridgetower" else values)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "opt":  # others may name another token than <s>
        assert load_tokenizer(tmp_path).cls_id == 4
        return
    message = "bos_token_id of .*config.json is 0, but the tokenizer has 4: it belongs to other"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_what_is_no_path_of_a_tokenizer_is_shown():
    for path in (None, 3, b"x"):
        with pytest.raises(ValueError, match="path is .*; it must be a text or a Path"):
            load_tokenizer(path)
