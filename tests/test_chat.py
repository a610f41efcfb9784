"""chat.py: conversations, labels and prompts against the official numbers; what is refused."""

import pytest
import tokenizers
from helpers import LOV, read_llava

import chat
import llava_manager


def golden_tokenizer():
    return tokenizers.Tokenizer.from_file(str(LOV / "chat" / "tokenizer.json"))


def test_chats():
    golden, tokenizer = read_llava("chat/chat_goldens.json"), golden_tokenizer()
    encoded = {}
    for case in golden["training"]:
        ids, labels = chat.encode_chat(
            case["conversations"], tokenizer, case["template"], has_image=case["has_image"]
        )
        assert (ids, labels) == (case["input_ids"], case["labels"]), case["name"]
        encoded[case["name"]] = ids, labels
    batch = chat.collate_chat([encoded[name] for name in golden["collator"]["rows"]], pad_id=452)
    assert {k: v.tolist() for k, v in batch.items()} == {k: golden["collator"][k] for k in batch}
    assert chat.collate_chat([encoded["image_single"]], max_length=9)["input_ids"].shape == (1, 9)
    for case in golden["eval_prompts"]:
        assert chat.encode_prompt(case["turns"], tokenizer) == case["input_ids"], case["name"]
    two = next(case for case in golden["eval_prompts"] if "two_images" in case["name"])
    assert (
        chat.encode_prompt([two["turns"][0].partition("\n")[2]], tokenizer, num_images=2)
        == two["input_ids"]
    )


def test_strict_labels_are_the_assistant_turns():
    tokenizer = golden_tokenizer()
    conversation = [
        {"from": "human", "value": "<image>\nWhat\nis shown?"},
        {"from": "gpt", "value": "Two dogs."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "On\nthe field."},
    ]
    ids, labels = chat.encode_chat(conversation, tokenizer, strict_labels=True)
    shown = tokenizer.decode([x for x in labels if x != -100], skip_special_tokens=False)
    assert shown == "".join(
        f"<|im_start|>assistant\n{text}<|im_end|>\n" for text in ("Two dogs.", "On\nthe field.")
    )
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_chat_errors():
    tokenizer = golden_tokenizer()
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Dogs."}
    for conversation, style, message in (
        ([gpt], "qwen_1_5", "0 turns"),
        ([human, gpt], "llama", "style 'llama'"),
        ([{"from": "bot", "value": "x"}], "qwen_1_5", "turn 0: .*bot"),
        ([human], "plain", "style plain"),
        ([human, {"from": "gpt"}], "qwen_1_5", "turn 1"),
        ([{"from": "human", "value": "no tag"}, gpt], "plain", "style plain"),
    ):
        with pytest.raises(ValueError, match=message):
            chat.encode_chat(conversation, tokenizer, style)
    with pytest.raises(ValueError, match="odd, not 2"):
        chat.encode_prompt(["a", "b"], tokenizer)
    with pytest.raises(ValueError, match="lacks <|im_start|>"):
        chat.encode_prompt(["a"], tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_a_turn_of_another_form_is_refused():
    for turn in (5, None, {"from": ["human"], "value": "x"}, {"from": {}, "value": "x"}):
        with pytest.raises(ValueError, match="turn 0: .*(is not an object|must be a text)"):
            chat.encode_chat([turn], golden_tokenizer())


def test_a_leading_system_turn_takes_the_place_of_the_usual_one():
    tokenizer = golden_tokenizer()
    human = {"from": "human", "value": "<image>\nWho?"}
    gpt = {"from": "gpt", "value": "Me."}
    usual, usual_labels = chat.encode_chat([human, gpt], tokenizer)
    for text in (chat.SYSTEM, "Be <image> brief."):
        system = {"from": "system", "value": text}
        for turns in ([system, human, gpt], [system, gpt, human, gpt]):
            ids, labels = chat.encode_chat(turns, tokenizer)
            head = f"<|im_start|>system\n{text}<|im_end|>\n"
            head_ids = tokenizer.encode(head, add_special_tokens=False).ids
            usual_head = len(
                chat.tokenize(f"<|im_start|>system\n{chat.SYSTEM}<|im_end|>\n", tokenizer)
            )
            assert ids == [*head_ids, *usual[usual_head:]]
            assert labels[len(head_ids) :] == usual_labels[usual_head:]
            # as in the usual one, special tokens and newlines have labels
            assert [x for x in labels[: len(head_ids)] if x != chat.IGNORE]
    plain = chat.encode_chat([human, gpt], tokenizer, "plain")
    assert chat.encode_chat([system, human, gpt], tokenizer, "plain") == plain
    with pytest.raises(ValueError, match="turn 1: 'from' is 'system'"):
        chat.encode_chat([human, system, gpt], tokenizer)


def test_chats_are_reachable_from_llava_manager():
    for name in ("IMAGE_TOKEN", "IGNORE", "encode_chat", "encode_prompt", "tokenize"):
        assert getattr(llava_manager, name) is getattr(chat, name)


# ---------------------------------------------------------------- answers
TEXTS = ["naïve café — 東京 🦜👩‍👩‍👧", "  two\n\n spaces  ", "e\u0301\ufffd!", "", "\ufffd"]


def byte_tokenizer():
    """A byte is a token, so that most characters are several."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def word_tokenizer():
    """Words with the mark of a space in front, as SentencePiece has them; the first one is lost."""
    words = ["▁two", "▁dogs", "s", "▁", "!"]
    vocabulary = [(word, -float(number)) for number, word in enumerate(words)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, None, False))
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_has_whole_characters_only(text):
    tokenizer = byte_tokenizer()
    stream = chat.TextStream(tokenizer)
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.rest()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces) and stream.rest() == ""


def test_a_stream_keeps_the_spaces_between_words():
    tokenizer = word_tokenizer()
    ids = [0, 1, 0, 2, 4, 3, 1]
    stream = chat.TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join([*pieces, stream.rest()]) == tokenizer.decode(ids) == "two dogs twos!  dogs"


def test_an_answer_stops_behind_a_stop_string():
    tokenizer = byte_tokenizer()
    stop = chat.stop_at(("\n\n", "動物"), tokenizer)
    for text in ("one\nline\n\n", "a 動物"):
        ids = tokenizer.encode(text).ids
        ends = [stop(ids[:length]) for length in range(1, len(ids) + 1)]
        assert ends == [False] * (len(ids) - 1) + [True]
    assert not chat.stop_at((), tokenizer)(ids)
    with pytest.raises(ValueError, match="none of them may be empty"):
        chat.stop_at(("a", ""), tokenizer)


def test_a_prompt_has_the_systems_text_and_pictures_in_any_turn():
    tokenizer = golden_tokenizer()
    turns = ["What is it?", "A dog.", chat.add_images("And this?", 2)]
    ids = chat.encode_prompt(turns, tokenizer, 1, "Be brief.")
    expected = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in (
            ("system", "Be brief."),
            ("user", "<image>\nWhat is it?"),
            ("assistant", "A dog."),
            ("user", "<image> <image>\nAnd this?"),
        )
    )
    assert ids == chat.tokenize(expected + "<|im_start|>assistant\n", tokenizer)
    assert ids.count(chat.IMAGE_TOKEN) == 3
