"""bench.py runs every comparison at tiny size, counts FLOPs and bytes right, and both ways to
re-rank give equal scores.
"""

import json
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from bench import Case, Footprint, OverheadResult, case_result, median_ratio, net_seconds
from fields import FieldError, FlagError
from model import ManagerTower, ManagerTowerConfig

CPU = torch.device("cpu")


def rows_of(file):
    """{name: row} of what --json wrote."""
    return {row["name"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.slow
def test_towers(tmp_path, capsys):
    pytest.importorskip("transformers")
    file = tmp_path / "bench.json"
    bench.main(["--model", "tiny", "--rounds", "1", "--batch_size", "2", "--json", str(file)])
    assert "BridgeTower" in capsys.readouterr().out
    rows = rows_of(file)
    assert len(rows) == 5
    shared = rows["share_images, training step"]
    assert shared["gflop"] < rows["ManagerTower, training step"]["gflop"]
    for row in rows.values():
        assert row["seconds"] > 0 and row["gib"] > 0


def test_retrieval(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(["retrieval", "--rounds", "1", "--batch_size", "4", "--json", str(file)])
    assert "one" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["pictures"] == 8 and row["captions"] == 40 and 0 < row["pairs"] <= 320
    assert row["difference"] < 1e-4


@pytest.mark.slow
def test_llava(tmp_path, capsys, monkeypatch):
    """The two tables of measurements; the base model's overhead has a test of its own."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "manager_overhead", list)
    file = tmp_path / "bench.json"
    bench.main(["llava", "--rounds", "1", "--batch_size", "2", "--json", str(file)])
    assert "transformers, grid 2, training step" in capsys.readouterr().out
    rows = rows_of(file)
    assert len(rows) == 5 + 10
    for grid in (0, 2):
        with_managers = rows[f"managers, grid {grid}, prefill"]["gflop"]
        assert with_managers > rows[f"no managers, grid {grid}, prefill"]["gflop"]
    ours = rows["no managers, grid 2, training step"]["gflop"]
    theirs = rows["transformers, grid 2, training step"]["gflop"]
    assert ours == pytest.approx(theirs, rel=0.1)


@pytest.mark.slow
def test_managers_add_little_to_the_mllm():
    """The paper says 4% in time; here FLOPs, counted on the meta device, with a grid of 1 x 1."""
    results = []
    plain = bench.prefill_cost(None, 1)
    for manager_type in ("static", "adaptive_cross"):
        cost = bench.prefill_cost(manager_type, 1)
        results.append(bench.compare_costs(manager_type, cost, plain))
    static, adaptive = results
    assert isinstance(static, OverheadResult) and static.image_tokens == 1485
    assert 0.01 < static.overhead < adaptive.overhead < 0.04
    assert 0 < static.parameters < adaptive.parameters
    assert 0 < static.mib < adaptive.mib


def test_managers_cost_little_at_base_size():
    """Papers: 101.25 -> 105.52 GFLOP from BridgeTower to ManagerTower, + 4.2%; counted by torch on
    the meta device.
    """
    counted = {}
    for fusion in ("manager", "bridge"):
        config = ManagerTowerConfig.base(fusion=fusion, image_size=384, heads=("vqa",))
        with torch.device("meta"):
            model = ManagerTower(config).eval()
            pixels = torch.empty(1, 3, 384, 384)
            ids = torch.zeros(1, 50, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            features = model(pixels, ids, torch.ones_like(ids))
            model.heads["vqa"](features.pooled)
        counted[fusion] = counter.get_total_flops()
    assert 1.03 < counted["manager"] / counted["bridge"] < 1.06


# ---------------------------------------------------------------- what is counted
def test_flops_of_a_product_and_of_attention_equal_the_closed_form():
    left = torch.randn(3, 5)
    right = torch.randn(5, 7)
    assert bench.count_gflop(lambda: left @ right) == pytest.approx(2 * 3 * 5 * 7 / 1e9)
    query = torch.randn(1, 2, 11, 4)  # heads, length, width

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(query, query, query)

    assert bench.count_gflop(attend) == pytest.approx(2 * 2 * 2 * 11 * 11 * 4 / 1e9)


def test_the_peak_is_what_tensors_hold_at_one_time():
    x = torch.zeros(256)  # 1024 bytes

    def call():
        first = x + 1
        first.view(16, 16).mul_(2)  # neither a view nor a change in place takes memory
        second = first + 1
        del first
        return second + 1

    with Footprint() as footprint:
        call()
    assert footprint.peak == 2 * 1024
    assert bench.peak_bytes(call, CPU) == 2 * 1024


def test_a_ratio_is_the_median_over_rounds_and_decoding_is_less_its_prefill():
    module = torch.nn.Linear(4, 4, bias=False)  # 64 bytes
    prefill = Case("prefill", list, 10, 4.0, module)
    decoding = Case("decoding", list, 20, 6.0, module, peer="peer", minus="prefill")
    measured = [
        {"": 1.0, "prefill": 1.0, "decoding": 3.0, "peer": 8.0},
        {"": 1.0, "prefill": 1.0, "decoding": 5.0, "peer": 4.0},
        {"": 2.0, "prefill": 3.0, "decoding": 4.0, "peer": 3.0},
    ]
    rounds = [net_seconds(times, [prefill, decoding]) for times in measured]
    assert [times["decoding"] for times in rounds] == [2.0, 4.0, 1.0]
    assert [times["decoding"] for times in measured] == [3.0, 5.0, 4.0], "left as it was"
    assert median_ratio(rounds, "peer", "decoding") == 3.0
    result = case_result(decoding, rounds, peak=2**30 - 64, matmul_gflop=12.0)
    assert result.seconds == 2.0 and result.rate == 10.0 and result.gflop == 0.3
    assert result.gflop_per_second == 3.0 and result.ratio == 3.0 and result.gib == 1.0
    assert result.of_matmul == 6.0 / 12.0 * 0.5 and result.matmul_gflop_per_second == 12.0


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--batch_size", "3"], "--batch_size is 3; it must be an even number"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--precision", "fp8"], "--precision is 'fp8'"),
        (["retrieval", "--model", "huge"], "--model is 'huge'"),
        (["llava", "--model", "large"], "--model is 'large'; it must be one of tiny, base"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(argv, word):
    with pytest.raises(FieldError) as error:
        bench.main(argv)
    assert word in str(error.value)


def test_a_flag_or_a_comparison_that_there_is_not_is_refused(tmp_path):
    for argv in (["peers"], ["retrieval", "--compile"], ["llava", "--compile"], ["--speed", "1"]):
        with pytest.raises(FlagError):
            bench.main(argv)
    with pytest.raises(ValueError, match="--json .* cannot be written"):
        bench.main(["--json", str(tmp_path / "none" / "x.json")])
    with pytest.raises(ValueError, match="--json /proc/x.json cannot be written: no file can be"):
        bench.main(["retrieval", "--json", "/proc/x.json"])


def test_help_lists_all_flags(capsys):
    for command in ([], ["retrieval"], ["llava"]):
        with pytest.raises(SystemExit):
            bench.main([*command, "-h"])
        page = capsys.readouterr().out
        for flag in ("--model", "--batch_size", "--rounds", "--device", "--json"):
            assert flag in page
    assert "towers" in page and "retrieval" in page, "the other comparisons"


@pytest.mark.parametrize("share_images", [False, True])
def test_flops_counted_without_values_are_those_of_a_real_step(share_images):
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config)
    batch = bench.random_pairs(config, 14)
    task = bench.Pretraining(model, ("mlm", "itm"), share_images)
    loss = partial(bench.pretraining_loss, task, batch)
    real = bench.count_gflop(partial(bench.step, loss, model, True, "fp32", CPU))
    assert bench.training_gflop(config, share_images) == pytest.approx(real / 14, rel=1e-9)


def test_pictures_of_every_recipe_are_measured(tmp_path, monkeypatch, capsys):
    small = partial(ManagerTowerConfig.tiny, patch_size=32)
    monkeypatch.setattr(bench.ManagerTowerConfig, "base", small)
    numbers = tmp_path / "numbers.json"
    bench.main(["data", "--pictures", "1", "--rounds", "1", "--json", str(numbers)])
    page = capsys.readouterr().out
    for name in ("pre-training: clip, 64 px", "vqav2: albef_randaug_wohf, 576 px", "MLLM: tiles"):
        assert name in page
    rows = json.loads(numbers.read_text())["rows"]
    for row in rows:
        assert 0 < row["to_tensor"] < row["transform"]
        assert row["rate"] == pytest.approx(1000 / (row["decode"] + row["transform"]))
