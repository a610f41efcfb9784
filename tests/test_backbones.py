"""The encoders of the papers' table, read from folders: CLIP, ViT, DeiT, DINOv2, RoBERTa and BERT
against transformers' models, layer by layer; what follows from their config.json; what is refused.

The environment variable MANAGER_ENCODERS names a folder with two real encoders, dinov2-small and
granite-30m, for the last test.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import close, run_small
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune
import images
import train
import weights
from model import ManagerTower, ManagerTowerConfig
from tokenizer import MLM_ROLES, check_roles, load_tokenizer
from world import World

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
IMAGES = {**SIZES, "image_size": 56, "patch_size": 14}
MLP = {"intermediate_size": 192}
TEXTS = {**SIZES, "intermediate_size": 80, "vocab_size": 99, "max_position_embeddings": 34}
# the cross-modal part, which no test here is about
CROSS = {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "max_text_len": 12}
MANAGED = {"managed_layers_text": 2, "managed_layers_image": 2}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red circle square the is of ##s , 12 e".split()


# ---------------------------------------------------------------- transformers' encoders
def randomize(peer):
    """Larger weights than transformers' first ones, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peer.eval()


def vit(**settings):
    return transformers.ViTConfig(**{**IMAGES, **MLP, **settings})


def dinov2(**settings):
    return transformers.Dinov2Config(**{**IMAGES, **settings})


def clip(**settings):
    return transformers.CLIPVisionConfig(**{**IMAGES, **MLP, **settings})


def bert(**settings):
    return transformers.BertConfig(**{**TEXTS, **settings})


def roberta(**settings):
    return transformers.RobertaConfig(**{**TEXTS, **settings})


IMAGE_MODELS = {
    "ViTModel": vit,
    "ViTForImageClassification": vit,
    "ViTForMaskedImageModeling": vit,
    "Dinov2Model": dinov2,
    "Dinov2ForImageClassification": dinov2,
    "CLIPVisionModel": clip,
}
TEXT_MODELS = {
    "BertModel": bert,
    "BertForMaskedLM": bert,
    "BertForPreTraining": bert,
    "RobertaModel": roberta,  # with two token types and BERT's epsilon, as granite has
}
PARTS = ("vit", "dinov2", "bert")  # where a model with a head keeps its encoder


def save_peer(name, folder, **settings):
    """A random model of transformers in a folder, as transformers saves it; its encoder alone."""
    make_config = {**IMAGE_MODELS, **TEXT_MODELS}[name]
    peer = randomize(getattr(transformers, name)(make_config(**settings)))
    peer.save_pretrained(folder)
    for part in PARTS:
        peer = getattr(peer, part, peer)
    return peer


def change_config(folder, **values):
    """Other values in config.json; ... removes one."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | values
    content = {key: value for key, value in content.items() if value is not ...}
    file.write_text(json.dumps(content))


def rename(folder, out, names, **config):
    """The weights of a folder under other names, in order of (pattern, replacement)."""
    renamed = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    out.mkdir()
    save_file(renamed, out / "model.safetensors")
    if config:
        (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """root/NAME for some of the models, and the models."""
    root = tmp_path_factory.mktemp("encoders")
    peers = {}
    for name in ("ViTModel", "Dinov2Model", "CLIPVisionModel", "BertModel", "RobertaModel"):
        peers[name] = save_peer(name, root / name)
    return root, peers


def tower(vision, text, **fields):
    """A small ManagerTower with the encoders of two folders."""
    followed = weights.config_of_encoders(vision, text)
    config = ManagerTowerConfig(**{"image_size": 56, **CROSS, **MANAGED, **followed, **fields})
    model = ManagerTower(config).eval()
    weights.load_unimodal(model, vision, text)
    return model


@torch.no_grad()
def compare_images(model, peer, size=56, **settings):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    theirs = peer(pixels, output_hidden_states=True, **settings)
    ours = model.image_encoder(pixels, range(len(theirs.hidden_states)))
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        close(a, b, 1e-5 * max(1, b.abs().max().item()))
    return ours, theirs


@torch.no_grad()
def compare_texts(model, peer):
    pad = model.config.pad_token_id
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[1, 7:] = pad
    mask = (ids != pad).long()
    theirs = peer(ids, mask, output_hidden_states=True).hidden_states
    ours = model.text_encoder(ids, mask, range(len(theirs)))
    for a, b in zip(ours, theirs, strict=True):
        close(a[mask.bool()], b[mask.bool()], 1e-5 * max(1, b.abs().max().item()))


# ---------------------------------------------------------------- every layer is transformers'
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_layer_of_an_image_encoder_is_that_of_transformers(tmp_path, encoders, name):
    peer = save_peer(name, tmp_path / "peer")
    model = tower(tmp_path / "peer", encoders[0] / "BertModel")
    ours, theirs = compare_images(model, peer)
    # ln_post of the last layer is what they call the last hidden state; CLIP applies it elsewhere
    if name != "CLIPVisionModel":
        close(model.image_encoder.ln_post(ours[-1]), theirs.last_hidden_state, 1e-5)


@pytest.mark.parametrize("size", [42, 70, 112])
@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_positions_are_resized_as_transformers_resizes_them(encoders, name, size):
    root, peers = encoders
    model = tower(root / name, root / "BertModel", image_size=size)
    settings = {"interpolate_pos_encoding": True} if name == "ViTModel" else {}
    compare_images(model, peers[name], size, **settings)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "gelu_new"])
@pytest.mark.parametrize("name", ["ViTModel", "CLIPVisionModel"])
def test_activation_and_epsilon_follow_from_the_config(tmp_path, encoders, name, activation):
    peer = save_peer(name, tmp_path / "peer", hidden_act=activation, layer_norm_eps=1e-2)
    compare_images(tower(tmp_path / "peer", encoders[0] / "BertModel"), peer)


@pytest.mark.parametrize("prefix", ["", "deit."])
def test_a_deit_without_distillation_is_a_vit_under_its_own_name(tmp_path, encoders, prefix):
    root, peers = encoders
    values = json.loads((root / "ViTModel" / "config.json").read_text())
    names = [("^", prefix)]
    rename(root / "ViTModel", tmp_path / "deit", names, **{**values, "model_type": "deit"})
    model = tower(tmp_path / "deit", root / "BertModel")
    compare_images(model, peers["ViTModel"])
    assert model.config.image_mean == (0.485, 0.456, 0.406)


# transformers' name -> timm's, of all but queries, keys and values
TO_TIMM = [
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"encoder\.layer", "blocks"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm", "norm"),
    (r"^pooler\.dense", "head"),
    (r"embeddings\.mask_token", "mask_token"),
]
PRETRAINED = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "input_size": [3, 56, 56]}


def save_timm(folder, out, **config):
    """The weights of a folder under timm's names, which has queries, keys, values in one matrix."""
    rename(folder, out, TO_TIMM, **config)
    state = load_file(out / "model.safetensors")
    for i in range(3):
        for ending in ("weight", "bias"):
            names = [
                f"blocks.{i}.attention.attention.{x}.{ending}" for x in ("query", "key", "value")
            ]
            state[f"blocks.{i}.attn.qkv.{ending}"] = torch.cat([state.pop(x) for x in names])
    save_file(state, out / "model.safetensors")


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_timms_names_give_the_same_layers(tmp_path, encoders, name):
    root, peers = encoders
    architecture = {"architecture": "vit_tiny", "model_args": {"num_heads": 4}}
    save_timm(root / name, tmp_path / "timm", **architecture, pretrained_cfg=PRETRAINED)
    model = tower(tmp_path / "timm", root / "BertModel")
    compare_images(model, peers[name])
    assert model.config.vision_eps == 1e-6
    assert model.config.image_mean == (0.5, 0.4, 0.3)
    assert model.config.image_std == (0.2, 0.25, 0.3)
    change_config(tmp_path / "timm", model_args={"num_heads": 4, "qk_norm": True})
    with pytest.raises(ValueError, match="timm/config.json: model_args has 'qk_norm'; only img_s"):
        weights.config_of_encoders(tmp_path / "timm", root / "BertModel")


def test_where_nothing_says_the_heads_each_has_64_channels(tmp_path, encoders):
    root, _ = encoders
    save_peer("ViTModel", tmp_path / "vit", hidden_size=192, intermediate_size=768)
    (tmp_path / "vit" / "config.json").unlink()
    fields = weights.config_of_encoders(tmp_path / "vit", root / "BertModel")
    assert fields["vision_heads"] == 3
    assert fields["vision_eps"] == 1e-12


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_layer_of_a_text_encoder_is_that_of_transformers(tmp_path, encoders, name):
    peer = save_peer(name, tmp_path / "peer")
    model = tower(encoders[0] / "ViTModel", tmp_path / "peer")
    compare_texts(model, getattr(peer, "roberta", peer))
    assert model.config.text_eps == 1e-12
    assert model.config.first_position == (2 if "Roberta" in name else 0)


def test_berts_of_2018_call_weight_and_bias_gamma_and_beta(tmp_path, encoders):
    root, peers = encoders
    names = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")]
    values = json.loads((root / "BertModel" / "config.json").read_text())
    rename(root / "BertModel", tmp_path / "old", [("^", "bert."), *names], **values)
    compare_texts(tower(root / "ViTModel", tmp_path / "old"), peers["BertModel"])
    state = load_file(tmp_path / "old" / "model.safetensors")
    state["bert.embeddings.LayerNorm.weight"] = torch.ones(48)
    save_file(state, tmp_path / "old" / "model.safetensors")
    with pytest.raises(ValueError, match="embeddings.LayerNorm.weight is there twice"):
        weights.config_of_encoders(root / "ViTModel", tmp_path / "old")


def test_every_position_of_bert_can_be_used_and_none_more(encoders):
    root, _ = encoders
    model = tower(root / "ViTModel", root / "BertModel", max_text_len=34)
    ids = torch.ones(1, 35, dtype=torch.long)
    assert model.text_encoder(ids[:, :34], ids[:, :34], [3])[0].shape == (1, 34, 48)
    with pytest.raises(ValueError, match="text has 35 tokens, the position table holds 34"):
        model.text_encoder(ids, ids, [3])
    with pytest.raises(ValueError, match="must be at least 35: BERT's positions start at 0, and a"):
        dataclasses.replace(model.config, max_text_len=35)


def test_the_first_position_of_bert_is_trained(encoders):
    """It has the number of BERT's padding, whose row in RoBERTa's table is never trained."""
    root, _ = encoders
    model = tower(root / "ViTModel", root / "BertModel")
    ids = torch.full((1, 4), 7)
    model.text_encoder(ids, torch.ones_like(ids), [3])[0].square().sum().backward()
    gradient = model.text_encoder.position_embedding.weight.grad
    assert (gradient.abs().sum(1) > 0).tolist() == [True] * 4 + [False] * 30


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "name, values, message",
    [
        ("ViTModel", {"qkv_bias": False}, "qkv_bias is False; only True is supported"),
        ("ViTModel", {"num_channels": 1}, "num_channels is 1; only 3 is supported"),
        ("ViTModel", {"hidden_act": "relu"}, "hidden_act is 'relu'; it must be quick_gelu or gelu"),
        ("ViTModel", {"layer_norm_eps": "x"}, "layer_norm_eps is 'x'; it must be a finite number"),
        ("ViTModel", {"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole"),
        ("ViTModel", {"patch_size": [14, 14]}, r"patch_size is \[14, 14\]; it must be a whole"),
        (
            "ViTModel",
            {"model_type": "swin"},
            "model_type is 'swin'; it must be dinov2 or deit or vit",
        ),
        ("ViTModel", {"model_type": ["vit"]}, r"model_type is \['vit'\]; it must be"),
        ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True; only False is supp"),
        ("Dinov2Model", {"mlp_ratio": 3}, "mlp_ratio is 3; only 4 is supported"),
        ("Dinov2Model", {"model_type": "dinov2_with_registers"}, "is 'dinov2_with_registers'; it"),
        (
            "BertModel",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 're",
        ),
        ("BertModel", {"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu' is supported"),
        ("BertModel", {"is_decoder": True}, "is_decoder is True; only False is supported"),
        ("BertModel", {"add_cross_attention": True}, "add_cross_attention is True; only False is"),
        ("BertModel", {"model_type": "deberta-v2"}, "model_type is 'deberta-v2'; it must be bert"),
        ("BertModel", {"model_type": "albert"}, "model_type is 'albert'; it must be bert or rob"),
    ],
)
def test_what_is_not_supported_is_refused_in_a_sentence(tmp_path, encoders, name, values, message):
    root, _ = encoders
    folder = tmp_path / "changed"
    rename(root / name, folder, [], **json.loads((root / name / "config.json").read_text()))
    change_config(folder, **values)
    both = (root / "ViTModel", folder) if name == "BertModel" else (folder, root / "BertModel")
    with pytest.raises(ValueError, match=f"changed/config.json: .*{message}") as error:
        weights.config_of_encoders(*both)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "BertModel"])
def test_keys_that_are_missing_unknown_or_misshapen_are_named(tmp_path, encoders, name):
    root, _ = encoders
    whole = load_file(root / name / "model.safetensors")
    for number, (key, tensor) in enumerate(whole.items()):
        if "pooler" in key or "mask_token" in key or "layer.1" in key or "layer.2" in key:
            continue
        wide = torch.zeros([*tensor.shape[:-1], 5]) if tensor.dim() else tensor
        damaged = {
            "missing": {other: whole[other] for other in whole if other != key},
            "unknown": {**whole, key + "x": tensor.clone()},
            "wrong shape": {**whole, key: wide},
        }
        problem = list(damaged)[number % 3]
        folder = tmp_path / str(number)
        rename(root / name, folder, [], **json.loads((root / name / "config.json").read_text()))
        save_file(damaged[problem], folder / "model.safetensors")
        both = (root / "ViTModel", folder) if name == "BertModel" else (folder, root / "BertModel")
        named = re.escape(key) + ("x" if problem == "unknown" else "")
        tables = "embeddings.*position table of shape"
        with pytest.raises(ValueError, match=f"{folder}: .*({problem}.*{named}|{tables})"):
            tower(*both)


def test_dead_keys_are_dropped_by_their_names_alone(tmp_path, encoders):
    root, _ = encoders
    for name, key in (
        ("ViTModel", "poolers.dense.weight"),
        ("ViTModel", "head.weight"),
        ("Dinov2Model", "embeddings.register_tokens"),
        ("BertModel", "classifier.weight"),
    ):
        folder = tmp_path / key
        rename(root / name, folder, [], **json.loads((root / name / "config.json").read_text()))
        state = load_file(folder / "model.safetensors")
        save_file({**state, key: torch.zeros(2)}, folder / "model.safetensors")
        both = (root / "ViTModel", folder) if name == "BertModel" else (folder, root / "BertModel")
        with pytest.raises(ValueError, match=f"unknown: {key}"):
            tower(*both)


def test_a_distilled_deit_is_refused(tmp_path, encoders):
    root, _ = encoders
    config = transformers.DeiTConfig(**IMAGES, **MLP)
    for name in ("DeiTModel", "DeiTForImageClassificationWithTeacher"):
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
        message = "distillation_token is the second token of a distilled DeiT, which is not supp"
        with pytest.raises(ValueError, match=f"{name}: (deit.)?embeddings.{message}"):
            weights.config_of_encoders(tmp_path / name, root / "BertModel")
        with pytest.raises(ValueError, match=message):
            weights.convert_weights(tmp_path / name, tmp_path / "out")


def test_an_encoder_of_another_kind_does_not_fit_a_model(encoders):
    root, _ = encoders
    model = tower(root / "ViTModel", root / "BertModel")
    with pytest.raises(ValueError, match="model_type is 'clip_vision_model'; it must be dino"):
        weights.load_unimodal(model, root / "CLIPVisionModel", root / "BertModel")
    with pytest.raises(ValueError, match="model_type is 'roberta'; it must be bert"):
        weights.load_unimodal(model, root / "ViTModel", root / "RobertaModel")
    other = dataclasses.replace(model.config, vision_activation="gelu_tanh")
    with pytest.raises(ValueError, match="hidden_act is 'gelu'; only 'gelu_tanh' fits the model"):
        weights.load_unimodal(ManagerTower(other), root / "ViTModel", root / "BertModel")
    other = dataclasses.replace(model.config, vision_eps=1e-6)
    with pytest.raises(ValueError, match="layer_norm_eps is 1e-12; only 1e-06 fits the model"):
        weights.load_unimodal(ManagerTower(other), root / "ViTModel", root / "BertModel")


def test_other_encoders_have_no_official_layout(encoders):
    root, _ = encoders
    model = tower(root / "ViTModel", root / "BertModel", heads=())
    with pytest.raises(ValueError, match="vision_kind is 'vit'; the official weights are of CLIP"):
        weights.to_official(model.state_dict(), model.config)
    model = tower(root / "CLIPVisionModel", root / "BertModel", heads=())
    with pytest.raises(ValueError, match="text_kind is 'bert'; the official weights are of CLIP"):
        weights.from_official({}, model.config)


# ---------------------------------------------------------------- mean and standard deviation
def test_mean_and_std_are_the_files_or_the_familys(tmp_path, encoders):
    root, _ = encoders
    half = (0.5, 0.5, 0.5)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for name, expected in (
        ("ViTModel", (half, half)),
        ("Dinov2Model", imagenet),
        ("CLIPVisionModel", tuple(images.CLIP_COLOURS)),
    ):
        fields = weights.config_of_encoders(root / name, root / "BertModel")
        assert (fields["image_mean"], fields["image_std"]) == expected
    save_peer("ViTModel", tmp_path / "vit")
    processor = transformers.ViTImageProcessor(image_mean=imagenet[0], image_std=imagenet[1])
    processor.save_pretrained(tmp_path / "vit")
    file = tmp_path / "vit" / "preprocessor_config.json"
    fields = weights.config_of_encoders(tmp_path / "vit", root / "BertModel")
    assert (fields["image_mean"], fields["image_std"]) == imagenet
    whole = json.loads(file.read_text())
    for values, message in (
        ({"image_mean": [0.5, 0.5]}, r"image_mean is \[0.5, 0.5\]; it must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std is 0; it must be a finite number above 0"),
        ({"image_std": 0.5}, "image_std is 0.5; it must be a list"),
        ({"do_normalize": False}, "do_normalize is False; only True is supported"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0; only 0.0039"),
    ):
        file.write_text(json.dumps({**whole, **values}))
        with pytest.raises(ValueError, match=f"{file}: .*{message}"):
            weights.config_of_encoders(tmp_path / "vit", root / "BertModel")


def test_pixels_are_those_of_transformers(encoders):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for colours in (images.VIT_COLOURS, images.IMAGENET_COLOURS, images.CLIP_COLOURS):
        processor = transformers.ViTImageProcessor(
            do_resize=False, image_mean=colours.mean, image_std=colours.std
        )
        theirs = processor(picture, return_tensors="pt").pixel_values[0]
        for name in images.EVALUATION_TRANSFORMS:
            ours = images.image_transform(name, 64, False, *colours)(picture)
            close(ours, theirs, 1e-5)


# ---------------------------------------------------------------- WordPiece
def save_tokenizer(folder, words=WORDS):
    """BERT's tokenizer.json with these words."""
    vocabulary = {word: number for number, word in enumerate(words)}
    peer = transformers.BertTokenizer(vocab=vocabulary)
    peer.save_pretrained(folder)
    return peer


def test_wordpiece_gives_the_ids_of_transformers(tmp_path):
    peer = save_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    check_roles(ours, MLM_ROLES)
    assert (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id) == (0, 2, 3, 4)
    texts = ["A RED Circle, 12 circles", "é squares of", "unseen 雪 words", "", "a [MASK] is the"]
    ids, mask = ours(texts, 8)
    theirs = peer(texts, padding="max_length", truncation=True, max_length=8)
    assert ids.tolist() == theirs["input_ids"]
    assert mask.tolist() == theirs["attention_mask"]
    assert ours.decode(ids[0]) == peer.decode(ids[0], skip_special_tokens=True)


def test_a_tokenizer_of_another_bert_is_refused(tmp_path):
    save_tokenizer(tmp_path, [WORDS[1], WORDS[0], *WORDS[2:]])
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pad_token_id of .*config.json is 0, but .* has 1"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------- training with any of them
RUN = (
    "--max_steps 2 --batch_size 4 --micro_batch_size 4 --eval_size 4 --log_every 1 --eval_every 0 "
    "--num_workers 0 --hidden_size 16 --num_heads 2 --num_layers 2 --managed_layers_text 2 "
    "--managed_layers_image 2 --max_text_len 12 --save_every 1"
).split()


@pytest.fixture(scope="module")
def trained(encoders, tmp_path_factory):
    """Two steps of pre-training with a DINOv2 and a BERT, and no flag about either."""
    root, _ = encoders
    save_tokenizer(root / "BertModel")
    out = tmp_path_factory.mktemp("run") / "pretrained"
    monkeypatch = pytest.MonkeyPatch()
    # it draws thousands of scenes for a baseline
    monkeypatch.setattr(train, "text_only_mlm_guess", lambda *datasets: 0.0)
    flags = ["--vision", root / "Dinov2Model", "--text", root / "BertModel", "--out_dir", out]
    run_small(RUN, *flags)
    yield out, flags
    monkeypatch.undo()


def test_the_architecture_follows_from_the_folders(trained, encoders):
    out, _ = trained
    config = weights.read_config(out)
    followed = weights.config_of_encoders(
        *(encoders[0] / name for name in ("Dinov2Model", "BertModel"))
    )
    for name, value in followed.items():
        assert getattr(config, name) == value, name
    assert followed.keys() == set(weights.FOLLOWING_FIELDS)
    assert config.image_size == 70  # the preset's 64 in patches of 14
    stored = json.loads((out / "config.json").read_text())
    assert stored["image_mean"] == [0.485, 0.456, 0.406]
    assert stored["text_kind"] == "bert"


def test_a_checkpoint_shows_pictures_and_texts_as_in_training(trained):
    out, _ = trained
    loaded = weights.load_two_tower(str(out), "itm", "cpu")
    black = loaded.transform(Image.new("RGB", (90, 90)), None)
    expected = -torch.tensor(images.IMAGENET_COLOURS.mean) / torch.tensor(
        images.IMAGENET_COLOURS.std
    )
    assert black.shape == (3, 70, 70)
    close(black[:, 35, 35], expected, 1e-6)
    ids, _ = loaded.tokenizer(["a red circle"], 12)
    assert ids[0, :5].tolist() == [2, 5, 6, 7, 3]
    assert loaded.model.image_encoder.patch.bias is not None
    assert loaded.model.text_encoder.is_bert


def test_a_flag_that_contradicts_an_encoder_is_refused(encoders, tmp_path):
    root, _ = encoders
    encoder_flags = ["--vision", root / "ViTModel", "--text", root / "BertModel"]
    for flag, value, place, theirs in (
        ("patch_size", 16, "--vision .*ViTModel", 14),
        ("vision_layers", 2, "--vision .*ViTModel", 3),
        ("text_width", 32, "--text .*BertModel", 48),
        ("pad_token_id", 1, "--text .*BertModel", 0),
    ):
        message = f"--{flag} is {value}, but {place} has {theirs}"
        flags = [*encoder_flags, f"--{flag}", value, "--out_dir", tmp_path / "out"]
        with pytest.raises(ValueError, match=message):
            run_small(RUN, *flags)
    assert not (tmp_path / "out").exists()


def test_flags_that_say_the_same_are_taken(trained, encoders):
    run = train.TrainConfig(
        vision=str(encoders[0] / "ViTModel"), text=str(encoders[0] / "BertModel")
    )
    fields = train.follow_encoders(run, {"patch_size": 14, "image_size": 42})
    assert fields["image_size"] == 42
    assert fields == train.follow_encoders(run, fields)


def test_a_run_goes_on_when_its_encoders_are_gone(trained, tmp_path):
    out, flags = trained
    before = load_file(out / "model.safetensors")
    gone = list(flags)
    gone[1] = tmp_path / "gone"
    run_small(RUN, *gone)  # it was at its end
    assert all(
        torch.equal(x, before[key]) for key, x in load_file(out / "model.safetensors").items()
    )


def test_fine_tuning_starts_from_such_a_checkpoint_or_from_the_encoders(trained, tmp_path):
    out, flags = trained
    tokenizer = load_tokenizer(out)
    world = World("cpu")
    run = finetune.FinetuneConfig(init=str(out), data="demo", out_dir=str(tmp_path / "a"))
    model = finetune.initial_model(run, {"heads": ("vqa",)}, tokenizer, world)
    assert model.config.image_std == images.IMAGENET_COLOURS.std
    ours = weights.read_safetensors(out)
    assert torch.equal(model.image_encoder.patch.bias, ours["image_encoder.patch.bias"])
    # without pre-training: the encoders as they were published
    run = dataclasses.replace(
        run, init="unimodal", model="tiny", vision=str(flags[1]), text=str(flags[3])
    )
    model = finetune.initial_model(run, {"heads": ("vqa",)}, tokenizer, world)
    config = model.config
    assert (config.vision_kind, config.image_size, config.text_kind) == ("vit", 70, "bert")
    published = load_file(flags[1] / "model.safetensors")
    key = "embeddings.patch_embeddings.projection.bias"
    assert torch.equal(model.image_encoder.patch.bias, published[key])


@pytest.mark.parametrize(
    "size, patch, expected", [(288, 16, 288), (288, 14, 294), (64, 32, 64), (8, 32, 32)]
)
def test_image_sizes_are_whole_patches(size, patch, expected):
    assert weights.fit_image_size(size, patch) == expected


def test_checkpoints_without_the_new_fields_are_of_clip_and_roberta(tmp_path):
    model = ManagerTower(ManagerTowerConfig.tiny())
    weights.save_model(model, tmp_path)
    names = ("vision_kind", "vision_activation", "vision_eps", "image_mean", "image_std")
    change_config(tmp_path, **dict.fromkeys((*names, "text_kind", "text_eps"), ...))
    loaded = weights.load_model(tmp_path)
    assert loaded.config == model.config
    assert loaded.config.vision_kind == "clip"
    assert isinstance(loaded.image_encoder.ln_pre, torch.nn.LayerNorm)
    change_config(tmp_path, image_mean=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"image_mean is \(0.5, 0.5\); it must be three numbers"):
        weights.load_model(tmp_path)


# ---------------------------------------------------------------- PyTorch's files
@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "BertModel", "timm"])
def test_bin_files_become_a_folder_with_all_that_is_needed(tmp_path, encoders, name):
    root, _ = encoders
    source = tmp_path / "source"
    if name == "timm":
        save_timm(root / "ViTModel", source, architecture="vit", model_args={"num_heads": 4})
    else:
        rename(root / name, source, [], **json.loads((root / name / "config.json").read_text()))
    (source / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    state = load_file(source / "model.safetensors")
    torch.save(state, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    weights.convert_weights(source, tmp_path / "out")
    if name == "BertModel":
        model = tower(root / "ViTModel", tmp_path / "out")
    else:
        model = tower(tmp_path / "out", root / "BertModel")
        assert model.config.image_mean == (0.1, 0.2, 0.3)
    assert model.config.vision_heads == model.config.text_heads == 4
    torch.save({**state, "surplus.weight": torch.zeros(1)}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="it is no CLIP, .*DINOv2, .*as it has the keys surplus"):
        weights.convert_weights(source, tmp_path / "new")


# ---------------------------------------------------------------- real encoders
REAL = os.environ.get("MANAGER_ENCODERS", "")


@pytest.mark.skipif(not REAL, reason="MANAGER_ENCODERS names no folder of real encoders")
@pytest.mark.parametrize("size", [70, 518])
def test_real_encoders_equal_transformers(size):
    vision = Path(REAL) / "dinov2-small"
    text = Path(REAL) / "granite-30m"
    model = tower(vision, text, image_size=size)
    compare_images(model, transformers.Dinov2Model.from_pretrained(vision).eval(), size)
    compare_texts(model, transformers.RobertaModel.from_pretrained(text).eval())
    assert load_tokenizer(text).pad_id == model.config.pad_token_id
