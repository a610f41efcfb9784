"""bench.py runs every comparison at tiny size, counts FLOPs and bytes right, and both ways to
re-rank give equal scores.
"""

import json
from functools import partial

import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

import bench
import roofline
from bench import Case, Footprint, OverheadResult, case_result, median_ratio, net_seconds
from fields import FieldError, FlagError
from llava_manager import LlavaManager, LlavaManagerConfig
from model import ManagerTower, ManagerTowerConfig
from roofline import GPUS, META, AsOnCuda, Ledger, count_plan, count_step, plan_row, watch_parts

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
        (["roofline", "--gpu", "tpu"], "--gpu is 'tpu'; it must be one of a100, h100, h200"),
        (["roofline", "--batch_size", "0"], "--batch_size is 0"),
        (["plan", "--model", "tiny"], "--model is 'tiny'; it must be one of 0.5b, 7b, 72b, base,"),
        (["plan", "--gpus", "8,0"], "--gpus is 0; it must be a whole number from 1 to 100000"),
        (["managers", "--batch_size", "1"], "--batch_size is 1"),
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


# ---------------------------------------------------------------- estimates: what is counted
def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True)


def test_a_product_is_one_kernel_with_the_flops_and_bytes_of_the_closed_form():
    left = meta(3, 5)
    right = meta(5, 7)
    with torch.no_grad(), Ledger() as ledger:
        (left @ right).view(7, 3).t()  # views are no kernels
    (product,) = ledger.operations
    assert product.kind == "matmul"
    assert product.flops == 2 * 3 * 5 * 7
    assert product.nbytes == 4 * (3 * 5 + 5 * 7 + 3 * 7)
    # so small a product is bound by memory; a large one would be by the FLOP/s
    h100 = GPUS["h100"]
    assert product.seconds(h100) == pytest.approx(product.nbytes / (0.85 * 3.35e12))
    large = product._replace(flops=10**12)
    assert large.seconds(h100) == pytest.approx(1e12 / (0.65 * 989e12))


def test_noise_that_overwrites_is_written_once_and_expanded_tensors_are_read_once():
    with torch.no_grad(), Ledger() as ledger:
        torch.empty(10, 10, device=META).normal_()
        meta(1, 10).expand(10, 10) + meta(10, 10)
    noise, total = ledger.operations
    assert noise.nbytes == 400 and noise.flops == 0
    assert total.nbytes == 40 + 400 + 400


def test_forward_and_backward_belong_to_the_part_that_made_them():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(8, 16), "second": torch.nn.Linear(16, 4)})
    model = model.to(META)
    x = meta(5, 8)
    ledger = Ledger()
    watch_parts(model, {"first": "one", "second": "two"}, ledger)
    count_step(lambda: model["second"](model["first"](x).relu()).sum(), ledger=ledger)
    parts = {part: [op for op in ledger.operations if op.part == part] for part in ("one", "two")}
    # forward, the gradient of the input, that of the weight
    for part, size in (("one", 8 * 16), ("two", 16 * 4)):
        products = [op for op in parts[part] if op.kind == "matmul"]
        assert [op.flops for op in products] == [2 * 5 * size] * 3
    between = [op for op in ledger.operations if op.part == roofline.BETWEEN]
    # relu, the sum, the first gradient, those of relu and sum
    assert 3 <= len(between) <= 5 and all(op.kind == "memory" for op in between)


def test_autocast_on_the_meta_device_follows_the_rules_of_cuda():
    linear = torch.nn.Linear(4, 4, device=META)
    x = meta(3, 4)
    with AsOnCuda(autocast=True), Ledger() as ledger:
        y = linear(linear(x))
        assert y.dtype == torch.bfloat16
        assert torch.softmax(y, -1).dtype == torch.float32
        normed = torch.nn.functional.layer_norm(y, (4,), linear.bias, linear.bias)
        assert normed.dtype == torch.float32
        assert torch.addcmul(normed, y, y).dtype == torch.float32
        assert torch.cat([y, y]).dtype == torch.bfloat16
    # x, weight and bias are cast once; y for softmax and norm, and twice for addcmul
    assert sum(op.kind == "matmul" for op in ledger.operations) == 2
    assert len(ledger.operations) == 3 + 2 + 2 + 2 + 3 + 1
    with AsOnCuda(autocast=False):
        assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_one_kernel_each_way(masked):
    q = meta(2, 3, 11, 8, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool, device=META) if masked else None
    attend = torch.nn.functional.scaled_dot_product_attention
    ledger, _ = count_step(lambda: attend(q, q, q, mask, 0.1).sum())
    kernels = [op for op in ledger.operations if op.kind == "attention"]
    product = 2 * (2 * 3) * 11 * 11 * 8
    assert [op.flops for op in kernels] == [2 * product, 5 * product]


@pytest.mark.slow
def test_the_training_step_has_the_known_flops():
    config = ManagerTowerConfig.base()
    assert bench.training_gflop(config) == pytest.approx(598.4, rel=0.01)
    # counted where every picture is projected once; here it is projected for each row that reads it
    assert bench.training_gflop(config, share_images=True) == pytest.approx(505.9, rel=0.02)


# ---------------------------------------------------------------- estimates: the tables
def test_the_roofline_adds_up_and_says_that_it_is_an_estimate(tmp_path, capsys):
    file = tmp_path / "roofline.json"
    argv = ["roofline", "--model", "tiny", "--batch_size", "4", "--json", str(file)]
    bench.main(argv)
    page = capsys.readouterr().out
    assert "ESTIMATE, nothing was run on that GPU" in page and "65%" in page and "85%" in page
    rows = rows_of(file)
    parts = ["encoders", "between them", "managers", "cross-modal layers", "heads", "AdamW"]
    for key in ("sum_ms", "gigabytes", "gflop", "launches"):
        total = rows["a step, eager"][key]
        assert total == pytest.approx(sum(rows[part][key] for part in parts))
        saved = rows["managers"][key] - rows["managers, if fused"][key]
        assert rows["a step, managers fused"][key] == pytest.approx(total - saved)
        assert saved >= 0
    eager = rows["a step, eager"]
    assert eager["step_ms"] == max(eager["sum_ms"], eager["launch_ms"])
    # attention computes its scores again in the backward pass; an MFU does not count that
    assert 1 < eager["gflop"] / (4 * eager["gflop_a_sample"]) < 1.05
    mfu = 4 * eager["gflop_a_sample"] * 1e9 / (eager["step_ms"] / 1000) / 989e12
    assert eager["mfu"] == pytest.approx(mfu)

    bench.main([*argv, "--train", "false"])
    assert rows_of(file)["AdamW"]["launches"] == 0
    assert rows_of(file)["a step, eager"]["gflop"] < eager["gflop"] / 2


@pytest.mark.parametrize("model", ["base", "0.5b"])
def test_a_plan_adds_up_and_more_gpus_need_no_more_memory(tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr(roofline.ManagerTowerConfig, "base", ManagerTowerConfig.tiny)
    monkeypatch.setattr(roofline.LlavaManagerConfig, "base", LlavaManagerConfig.tiny)
    monkeypatch.setattr(roofline, "PLAN_GRID", 2)
    file = tmp_path / "plan.json"
    bench.main(["plan", "--model", model, "--gpus", "8,1,64", "--json", str(file)])
    assert "ESTIMATE, nothing was run on that GPU" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    found = {(row["how"], row["gpus"], row["checkpointing"]): row for row in rows}
    assert len(found) == 2 + 4 + 4
    for row in rows:
        parts = ("weights", "gradients", "moments", "buffers", "activations")
        assert row["memory"] == pytest.approx(sum(row[part] for part in parts))
        assert row["moments"] == pytest.approx(2 * row["weights"])
        assert row["fits"]
    for checkpointing in (False, True):
        for how in ("DDP", "sharded"):
            few = found[how, 8, checkpointing]
            many = found[how, 64, checkpointing]
            assert many["memory"] <= few["memory"] and many["sent"] > few["sent"]
        assert found["alone", 1, checkpointing]["sent"] == 0
    assert found["DDP", 8, True]["activations"] < found["DDP", 8, False]["activations"]
    # all in bf16, where autocast has parts in fp32
    assert found["sharded", 8, False]["activations"] < found["DDP", 8, False]["activations"]


def test_a_plan_counts_bytes_as_the_closed_forms_say():
    h100 = GPUS["h100"]
    counts = roofline.Counts(
        parameters=8_000_000_000, block=250_000_000, outside=1_000_000_000, activations=0, seconds=1
    )
    ddp = plan_row(counts, 8, False, False, 2, h100)
    # weights, gradients, two moments, and the gradients in DDP's buckets
    assert (ddp.weights, ddp.gradients, ddp.moments, ddp.buffers) == (32, 32, 64, 32)
    assert not ddp.fits and ddp.sent == pytest.approx(2 * 7 / 8 * 32)
    sharded = plan_row(counts, 8, True, False, 2, h100)
    assert (sharded.weights, sharded.gradients, sharded.moments) == (4, 4, 8)
    assert sharded.buffers == pytest.approx(2 * (2 * 1 + 3 * 0.25)) and sharded.fits
    # blocks are gathered twice, what is outside of them once; gradients are in fp32
    assert sharded.sent == pytest.approx(7 / 8 * (2 * (2 * 7 + 1) + 4 * 8))
    # over the network sending takes longer than a second of computing
    far = plan_row(counts, 64, True, False, 2, h100)
    adam = 28 * 125_000_000 / (0.85 * 3.35e12)
    assert far.seconds == pytest.approx(far.sent / (0.8 * 50) + adam)
    assert far.rate == pytest.approx(64 * 2 / far.seconds)


def test_activations_are_what_a_step_holds_beside_weights_and_gradients():
    """By hand: of one layer its input is kept, which is there before, and its output's gradient."""
    linear = torch.nn.Linear(64, 64, bias=False, device=META)
    linear.weight.grad = torch.zeros_like(linear.weight)
    x = meta(1000, 64)
    x.grad = torch.zeros_like(x)
    _, peak = count_step(lambda: linear(x).sum(), autocast=False)
    y = 4 * 1000 * 64
    assert y <= peak <= 2 * y + 4 * 64 * 64 + 64  # output or input's gradient; the weight's one


@pytest.mark.parametrize(
    ("name", "of_the_llm"), [("0.5b", 494_032_768), ("7b", 7_615_616_512), ("72b", 72_706_203_648)]
)
def test_the_planned_models_have_the_published_sizes(name, of_the_llm):
    with META:
        model = LlavaManager(LlavaManagerConfig.base(**roofline.QWEN2[name]))
    assert sum(parameter.numel() for parameter in model.llm.parameters()) == of_the_llm
    assert len(model.managers) == model.config.num_layers // 4


@pytest.mark.slow
def test_the_plan_of_the_small_models_is_plausible():
    h100 = GPUS["h100"]
    plain = count_plan("base", 32, False, False, h100)
    kept = count_plan("base", 32, False, True, h100)
    assert plain.parameters == kept.parameters
    assert 0.7e9 < plain.activations / 32 < 1.1e9
    # managers and stacks of experts are not computed again
    assert kept.activations < 0.7 * plain.activations and kept.seconds > plain.seconds


@pytest.mark.slow
def test_what_managers_are_compiled_to(tmp_path, capsys):
    """Needs a C++ compiler."""
    file = tmp_path / "managers.json"
    bench.main(["managers", "--model", "tiny", "--batch_size", "2", "--json", str(file)])
    assert "StaticManager, compiled, forward" in capsys.readouterr().out
    rows = rows_of(file)
    assert len(rows) == 2 + 3 + 3
    assert rows["all, if each were one kernel each way"]["kernels"] == 2 * 4  # 2 layers, 2 each
    for kind in ("StaticManager", "AdaptiveManager"):
        eager = rows[f"{kind}, eager"]
        forward = rows[f"{kind}, compiled, forward"]
        backward = rows[f"{kind}, compiled, backward"]
        assert 0 < forward["kernels"] + backward["kernels"] < eager["kernels"] / 2
        assert forward["passes"] + backward["passes"] < eager["passes"]
    assert rows["StaticManager, compiled, forward"]["products"] == 0
    assert rows["AdaptiveManager, compiled, forward"]["products"] == 4


@pytest.mark.slow
def test_estimates_in_the_readme_are_what_is_printed(capsys):
    """Rows of `bench.py roofline` stand in README.md as they are printed, or not at all."""
    readme = (ROOT / "README.md").read_text()
    if "a step, managers fused" not in readme:
        pytest.skip("README.md has none of them")
    bench.main(["roofline"])
    for line in capsys.readouterr().out.splitlines()[1:]:
        assert line.strip() in readme
