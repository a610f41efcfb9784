"""compare_llava.py: runs that agree, a tower that stays as it is, and states that are its own."""

import pytest
import torch

import compare_llava
import comparison
from compare_llava import (
    CompareLlavaConfig,
    KeptConversations,
    VisionTower,
    make_llava,
    stand_in,
)
from data import collate_conversations
from llava_manager import LlavaManager, LlavaManagerConfig
from multigrid import preprocess_image
from weights import read_safetensors

SMALL = {
    "image_size": 64,
    "patch_size": 32,
    "vision_width": 16,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_mlp_width": 16,
    "hidden_size": 16,
    "num_layers": 3,
    "mlp_width": 16,
    "managed_layers": (1, 2),
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Comparisons of seconds, whose jobs run in this process."""
    monkeypatch = pytest.MonkeyPatch()

    def run_here(jobs, folder, processes, summary):
        results = {}
        for job in jobs:
            (folder / job.name).mkdir(parents=True, exist_ok=True)
            results[job.name] = job.function(str(folder / job.name), **job.settings)
            assert "%" in summary(results[job.name])
        return results

    monkeypatch.setattr(compare_llava, "run_jobs", run_here)
    monkeypatch.setattr(compare_llava, "MODEL", SMALL)
    monkeypatch.setattr(compare_llava, "TOWER_STEPS", 2)
    monkeypatch.setattr(comparison, "ROUNDS", 1)
    monkeypatch.setattr(compare_llava, "save_drawing", lambda *given: "There is no picture.")
    sizes = compare_llava.Sizes(pictures=8, validation=2, test=3, tower=20)
    monkeypatch.setattr(compare_llava, "SIZES_OF_SPLITS", sizes)
    yield
    monkeypatch.undo()


def options(folder, **flags):
    return CompareLlavaConfig(
        **{
            "out_dir": str(folder),
            "steps": 2,
            "batch_size": 4,
            "seeds": 2,
            "device": "cpu",
            **flags,
        }
    )


def test_two_runs_give_the_same_tables(tmp_path, capsys):
    tables = []
    for name in ("one", "two"):
        variants = ("none", "none+grid", "adaptive+grid")
        outcomes = compare_llava.compare(options(tmp_path / name, variants=variants, seeds=1))
        scores = []
        for outcome in outcomes:
            scores.append((outcome.name, outcome.scores, outcome.curves))
            facts = outcome.facts
            assert facts["parameters"] > 0 and facts["GFLOPs a step"] > 0
        tables.append(scores)
        assert (tmp_path / name / "result.json").exists()
    assert tables[0] == tables[1]
    assert [name for name, _, _ in tables[0]] == ["none", "none+grid", "adaptive+grid"]
    printed = capsys.readouterr().out
    for words in ("adaptive+grid against none+grid", "a guess from the question alone", "overview"):
        assert words in printed
    # the tower of a run that is done is the one that it began with
    state = read_safetensors(tmp_path / "one/runs/adaptive+grid-rate0.002-seed0")
    tower = read_safetensors(tmp_path / "one/tower")
    frozen = [name for name in state if name.startswith("vision.")]
    assert len(frozen) > 20
    for name in frozen:
        assert torch.equal(state[name], tower[name]), name
    assert "vision.blocks.2.fc.weight" not in state
    assert "vision.blocks.2.fc.weight" in tower


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    config = options(folder)
    tower = compare_llava.find_tower(config)
    return compare_llava.find_kept(config, tower, torch.device("cpu"))


def test_kept_states_are_those_of_the_tower(kept):
    """An MLLM on kept states is the MLLM on pictures, but for the rounding to 16 bits."""
    part = compare_llava.open_parts({"train": 8})["train"]
    for variant in ("static", "adaptive+grid"):
        looking_up = make_llava(kept, variant, seed=3).eval()
        torch.manual_seed(0)
        for manager in looking_up.managers:
            for parameter in manager.parameters():
                torch.nn.init.normal_(parameter)
        seeing = LlavaManager(looking_up.config).eval()
        seeing.load_state_dict(looking_up.state_dict())
        dataset = KeptConversations(kept, looking_up.config)
        batch = collate_conversations([dataset[row] for row in (5, 2)])
        del batch["image_index"]
        numbers = batch.pop("images")
        tiles = [preprocess_image(part.record(row)["image"], looking_up.config) for row in (5, 2)]
        assert [image.pixels.shape for image in numbers] == [image.pixels.shape for image in tiles]
        with torch.no_grad():
            found = looking_up.encode_tiles(numbers)
            for layer, expected in seeing.encode_tiles(tiles).items():
                assert torch.equal(found[layer], expected.half().float())
            logits = looking_up(**batch, images=numbers).logits
            expected_logits = seeing(**batch, images=tiles).logits
        torch.testing.assert_close(logits, expected_logits, rtol=1e-2, atol=1e-2)


def test_variants_begin_alike(kept):
    """One seed: equal weights wherever a part is shared, other weights with another seed."""
    plain = make_llava(kept, "none", seed=1).state_dict()
    other = make_llava(kept, "none", seed=2).state_dict()
    assert not torch.equal(plain["llm.embed.weight"], other["llm.embed.weight"])
    for variant in ("static", "adaptive+grid", "cross"):
        model = make_llava(kept, variant, seed=1)
        state = model.state_dict()
        assert state.keys() > plain.keys()
        for name, tensor in plain.items():
            assert torch.equal(tensor, state[name]), name
        learning = {name for name, value in model.named_parameters() if value.requires_grad}
        assert not any(name.startswith("vision.") for name in learning)
        assert any(name.startswith("managers.") for name in learning)


def test_conversations_and_questions_are_of_the_same_pictures(kept):
    """The order of the rows is that of the records, and each answer is in its conversation."""
    config = kept.config("none+grid")
    records = kept.info["splits"]
    numbers = [record["number"] for split in records.values() for record in split]
    assert numbers == list(range(13))
    quiz = kept.quiz("test", "detail", config) + kept.quiz("test", "overview", config)
    assert len(quiz) == 4 * 3
    dataset = KeptConversations(kept, config)
    ids, labels = dataset[0]["tokens"]
    answers = kept.tokenizer.decode([label for label in labels if label >= 0])
    for question in records["train"][0]["questions"]:
        (answer,) = question["answers"]
        assert answer in answers
    assert len(ids) == len(labels)
    tiles = dataset[0]["images"][0].pixels
    assert tiles.shape == (5, 3, 64, 64)
    assert stand_in(7, kept.config("none")).pixels.shape == (1, 3, 64, 64)


def test_the_tower_says_what_each_tile_shows():
    """Things are told in the base tile and in their own tiles; patterns in their own alone."""
    config = LlavaManagerConfig.tiny(**SMALL, **compare_llava.GRID)
    dataset = compare_llava.TilesWithWords("train", 3, 0, config)
    assert len(dataset) == 15
    for scene in range(3):
        things = dataset.part.record(scene)["things"]
        said = []
        for tile in range(5):
            words = dataset[5 * scene + tile]["words"]
            said.append({compare_llava.WORDS[i] for i in words.nonzero()[:, 0].tolist()})
        whole = set()
        for thing in things:
            whole |= {thing["size"], thing["color"], thing["shape"]}
        assert said[0] == whole
        patterns = {thing["pattern"] for thing in things}
        assert set.union(*said[1:]) == whole | patterns
        # where a tile is told to be empty, nearly nothing is drawn
        for tile in range(1, 5):
            pixels = dataset[5 * scene + tile]["pixels"]
            background = pixels.flatten(1).median(1).values[:, None, None]
            ink = (pixels != background).any(0).float().mean()
            assert bool(said[tile]) or ink < 0.1
    tower = VisionTower(config)
    assert tower(dataset[0]["pixels"][None]).shape == (1, len(compare_llava.WORDS))


def test_the_learning_rate_is_chosen_on_validation_scenes(tmp_path):
    outcomes = compare_llava.compare(
        options(tmp_path, seeds=1, variants=("none",), rates=(1e-9, 2e-3))
    )
    assert sorted(run.name for run in (tmp_path / "runs").iterdir()) == [
        "none-rate0.002-seed0",
        "none-rate1e-09-seed0",
    ]
    assert outcomes[0].learning_rate in (1e-9, 2e-3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--variants", "nonne"], "variants is 'nonne'; it must be one of none, static"),
        (["--variants", "none,none"], "it names one of them twice"),
        (["--rates", "0"], "rates is 0.0; it must be"),
        (["--seeds", "21"], "seeds is 21; it must be"),
        (["--out_dir", "/dev/null"], "out_dir /dev/null cannot be written into"),
        (["--pair", "3"], "pair"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        compare_llava.main(flags)
    assert "\n" not in str(caught.value)
