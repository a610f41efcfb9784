"""The papers' comparison, with sizes that take a second."""

import functools
import json
import os
import shutil

import pytest
import torch
from helpers import picture, write_records

import compare
import comparison
import small_towers
from compare import CompareConfig, FrozenTower, Kept, make_config, make_tower, variant_fields
from model import ManagerTower

save_drawing = compare.save_drawing
cached_tokenizer = functools.cache(compare.demo_tokenizer)  # it is trained anew at each call


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """The two small towers, hardly trained: name of the job -> its folder."""
    folders = {}
    common = {"image_size": 64, "seed": 0, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_towers, "HELD_OUT", 8)
        for name, train, size in (
            ("image_tower", small_towers.train_image_tower, {"pictures": 70}),
            ("text_tower", small_towers.train_text_tower, {"texts": 30}),
        ):
            folders[name] = tmp_path_factory.mktemp(name)
            result = train(str(folders[name]), max_steps=2, **size, **common)
            assert 0 <= result["accuracy"] <= 1
    return folders


@pytest.fixture(autouse=True)
def small(monkeypatch, towers):
    """All in this process, and little of everything."""

    def run_here(jobs, folder, processes, summary):
        results = {}
        for job in jobs:
            own_folder = folder / job.name
            if job.name in towers:
                shutil.copytree(towers[job.name], own_folder, dirs_exist_ok=True)
                results[job.name] = {"accuracy": 0.0}
            else:
                own_folder.mkdir(parents=True, exist_ok=True)
                results[job.name] = job.function(str(own_folder), **job.settings)
            assert summary(results[job.name])
        return results

    monkeypatch.setattr(compare, "run_jobs", run_here)
    monkeypatch.setattr(compare, "save_drawing", lambda *given: "There is no picture.")
    monkeypatch.setattr(compare, "demo_tokenizer", cached_tokenizer)
    monkeypatch.setattr(comparison, "ROUNDS", 1)
    monkeypatch.setattr(compare, "SMALL", compare.Sizes(24, 8, 8, 3))
    monkeypatch.setattr(compare, "REAL", compare.Sizes(24, 8, 8, 3))


def options(tmp_path, **values):
    values.setdefault("variants", ("last", "saue"))
    values.setdefault("seeds", 2)
    return CompareConfig(
        out_dir=str(tmp_path / "out"), batch_size=8, processes=1, device="cpu", **values
    )


def states(tmp_path):
    return Kept(next((tmp_path / "out").glob("states-*")))


# ---------------------------------------------------------------- the whole
def test_two_comparisons_give_the_same_table(tmp_path, capsys, monkeypatch):
    tables = []
    monkeypatch.setattr(compare, "save_drawing", save_drawing)
    for name in ("a", "b"):
        compare.compare(options(tmp_path / name, rates=(1e-3, 2e-3), seeds=1))
        record = json.loads((tmp_path / name / "out" / "result.json").read_text())
        for outcome in record["outcomes"]:
            assert set(outcome.pop("facts")) == {"parameters", "GFLOPs a step", "ms a step"}
        tables.append((record["outcomes"], record["validation"]))
        assert (tmp_path / name / "out" / "result.png").stat().st_size > 10_000
    assert tables[0] == tables[1]
    # 2 variants, 2 rates, and the better rate of each variant is shown
    validation = tables[0][1]
    assert len(validation) == 4
    for outcome in tables[0][0]:
        means = {}
        for variant, rate, _, score in validation:
            if variant == outcome["name"]:
                means[rate] = means.get(rate, 0) + score
        assert means[outcome["learning_rate"]] == max(means.values())
    printed = capsys.readouterr().out
    assert "without looking: majority accuracy" in printed
    assert "order of the means" in printed and "against last" in printed


@pytest.mark.parametrize(
    ("task", "kinds"),
    [
        ("vqav2", ["all"]),
        ("nlvr2", ["all"]),
        ("snli_ve", ["all"]),
        ("flickr30k", ["all", "matching", "ir_r1", "ir_r5", "ir_r10", "tr_r1", "tr_r5", "tr_r10"]),
    ],
)
def test_every_task_can_be_compared_on(tmp_path, task, kinds):
    (outcome,) = compare.compare(options(tmp_path, task=task, variants=("bridge",), seeds=1))
    assert list(outcome.scores)[: len(kinds)] == kinds
    for scores in outcome.scores.values():
        assert 0 <= scores[0] <= 1
    assert [step for step, _ in outcome.curves[0]] == [1, 2, 3]


def test_pictures_of_files_are_split_before_they_are_learnt_from(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for split, count in (("train", 40), ("test", 10)):
        records = []
        for number in range(count):
            place = f"{split}{number}.png"
            picture(number).save(root / place)
            records.append({"image": place, "captions": [f"a {split} thing {number}"]})
        write_records(root / f"openclipart_{split}.jsonl", records)
    compare.compare(
        options(tmp_path, data="openclipart", data_root=str(root), seeds=1, variants=("last",))
    )
    texts = {}
    for split, records in states(tmp_path).info["splits"].items():
        texts[split] = {row["text"] for _, rows in records for row in rows}
    assert len(texts["train"]) == 24 and len(texts["validation"]) == 8 and len(texts["test"]) == 8
    assert not texts["train"] & texts["validation"]
    assert all(" test " in text for text in texts["test"])


# ---------------------------------------------------------------- what is frozen, what is shared
def test_kept_states_are_those_of_the_encoders(tmp_path):
    """A frozen tower on kept states computes what the whole tower computes on pixels and ids."""
    config = options(tmp_path, seeds=1, variants=("aaue",))
    compare.compare(config)
    kept = states(tmp_path)
    tower = make_config(kept, variant_fields(config, "aaue"), ("vqa",))
    frozen = make_tower(kept, tower, seed=0).eval()
    assert isinstance(frozen, FrozenTower)

    whole = ManagerTower(tower).eval()
    compare.load_encoders(whole, **kept.info["encoders"])
    own = frozen.state_dict()
    # of the layers' embeddings the frozen tower has the rows of kept layers
    for modality in ("text", "image"):
        name = f"{modality}_layer_embedding"
        rows = own[name]
        own[name] = torch.cat([torch.zeros(2, rows.shape[1]), rows])
    missing, unexpected = whole.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(name.startswith(("text_encoder", "image_encoder")) for name in missing)

    sources = compare.open_sources(config, tower.image_size)
    transform = compare.tower_transform("albef", tower, train=False)
    dataset = kept.dataset("test")
    source, _ = sources["test"]
    tokenizer = compare.demo_tokenizer()
    for row in (0, 5, 11):
        item = dataset[row]
        original = source[row]
        ids, mask = tokenizer([original["text"]], tower.max_text_len)
        with torch.no_grad():
            ours = frozen(
                item["pixels"][None], item["input_ids"][None], item["attention_mask"][None]
            )
            theirs = whole(transform(original["images"][0], None)[None], ids, mask)
        assert item["attention_mask"].tolist() == mask[0].tolist()
        # float16 has 11 bits
        torch.testing.assert_close(ours.pooled, theirs.pooled, atol=5e-3, rtol=0)


def test_what_variants_share_begins_alike_and_nothing_of_the_encoders_is_trained(tmp_path):
    config = options(tmp_path, seeds=1, variants=("last",))
    compare.compare(config)
    kept = states(tmp_path)
    towers = {}
    for variant in compare.VARIANTS:
        fields = make_config(kept, variant_fields(config, variant), ("vqa",))
        towers[variant] = make_tower(kept, fields, seed=3).state_dict()
    for variant, state in towers.items():
        for name, tensor in towers["last"].items():
            assert torch.equal(state[name], tensor), (variant, name)
        assert not any("encoder" in name for name in state)
    other = make_tower(kept, make_config(kept, variant_fields(config, "last"), ("vqa",)), seed=4)
    assert not torch.equal(other.text_pooler.weight, towers["last"]["text_pooler.weight"])
    # the ablations are other models
    assert "text_managers.1.q_proj.weight" in towers["aaue"]
    assert "text_managers.1.q_proj.weight" not in towers["aaue_own"]
    assert towers["saue_scalar"]["text_managers.0.scores"].shape == (6, 1)
    assert towers["sae"]["text_managers.2.scores"].shape == (8, 64)
    assert towers["saue"]["text_managers.2.scores"].shape == (7, 64)


def test_with_tune_the_encoders_learn_slowly(tmp_path):
    config = options(tmp_path, seeds=1, variants=("saue",), tune=0.2)
    compare.compare(config)
    kept = states(tmp_path)
    run = compare.make_run(str(tmp_path), 0, 1e-3, 3, 8, 0.2, "cpu")
    model = make_tower(kept, make_config(kept, variant_fields(config, "saue"), ("vqa",)), seed=0)
    rates = {}
    for group in compare.param_groups(model, run):
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    assert rates[model.image_encoder.patch.weight] == pytest.approx(2e-4)
    assert rates[model.text_managers[1].scale] == pytest.approx(1e-3)
    assert rates[model.heads["vqa"].fc.weight] == pytest.approx(1e-3)
    # it begins with the pre-trained encoders, and ends with others
    begun = model.state_dict()
    ended = compare.small_towers.read_safetensors(tmp_path / "out/runs/saue-rate0.001-seed0")
    for name in ("image_encoder.patch.weight", "text_encoder.layers.7.qkv.weight"):
        assert not torch.equal(begun[name], ended[name]), name
    torch.testing.assert_close(
        begun["image_encoder.patch.weight"], ended["image_encoder.patch.weight"], atol=2e-3, rtol=0
    )


def test_a_caption_says_which_words_a_picture_has():
    words = small_towers.words_of("a large red circle is right of a small red square")
    said = {word for word, flag in zip(small_towers.WORDS, words, strict=True) if flag}
    assert said == {"large", "small", "red", "circle", "square", "left"}


# ---------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vision": "somewhere"}, "--vision and --text go together"),
        ({"hidden_size": 10}, "--hidden_size 10 is not a multiple of --num_heads 4"),
        ({"variants": ("first",)}, "variants is 'first'; it must be one of last, bridge"),
        ({"rates": (0.0,)}, "rates is 0.0; it must be"),
        ({"variants": ("last", "last")}, "twice"),
    ],
)
def test_bad_flags_end_in_one_sentence(tmp_path, values, words):
    with pytest.raises(ValueError, match=words):
        options(tmp_path, **values)


def test_more_experts_than_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reads 9 layers of the text encoder"):
        compare.compare(options(tmp_path, experts=9, seeds=1))


def test_states_of_other_data_are_not_taken_for_these(tmp_path):
    compare.compare(options(tmp_path, seeds=1, variants=("last",)))
    with pytest.raises(ValueError, match="holds another run"):
        compare.compare(options(tmp_path, seeds=1, variants=("last",), pairs=30, task="nlvr2"))
    folders = sorted((tmp_path / "out").glob("states-*"))
    assert len(folders) == 2
    kinds = {Kept(folder).info["kind"] for folder in folders}
    assert kinds == {"questions", "statements"}
    assert not [name for name in os.listdir(folders[0]) if "tmp" in name]
