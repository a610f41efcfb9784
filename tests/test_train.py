"""train.py: runs on the built-in scenes and on files, any size of batch, precisions, the guesses
without pictures, and flags that are refused in one sentence.
"""

import json
import math

import pytest
import torch
from helpers import SMALL, log_rows, losses, run_small

import train
import weights
from fields import FlagError
from train import TrainConfig


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "flags,message",
    [
        (["--batch_size", "9"], "--batch_size 9 cannot be dealt .* a multiple of 2"),
        (["--micro_batch_size", "0"], "--micro_batch_size is 0; it must be .* from 1 on"),
        (["--batch_size", "0"], "--batch_size is 0; it must be a whole number from 1 to 1048576"),
        (["--save_every", "0"], "--save_every is 0; it must be"),
        (["--log_every", "-1"], "--log_every is -1; it must be"),
        (["--max_steps", "0"], "--max_steps is 0"),
        (["--precision", "fp8"], "--precision is 'fp8'; it must be one of auto, fp32, bf16, fp16"),
        (["--objectives", "mlm,itc"], "itc needs itm"),
        (["--objectives", "mlm,itx"], "--objectives is 'itx'; it must be one of mlm, itm, itc"),
        (["--fusion", "bridge", "--manager_type", "saue"], "no managers"),
        (["--micro_batch_size", "1", "--share_images", "true"], "must be at least 2"),
        (["--vision", "x.safetensors"], "--vision is 'x.safetensors', which does not exist"),
        (["--vision", "."], "go together"),
        (["--hidden_size", "17"], "not a multiple"),
        (["--data_root", "/nowhere"], "/nowhere"),
        (["--device", "abacus"], "--device is 'abacus'"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, small, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run_small(small, "--out_dir", tmp_path / "x", *flags)
    assert not isinstance(error.value, FlagError)  # the flag can be read, its value is wrong
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--nonsense", "1"],
        ["--max_steps", "many"],
        ["--fresh", "maybe"],
        ["--recipe", "none"],
        ["--lr", "1"],
    ],
)
def test_unknown_flags_and_wrong_types_are_errors_of_the_command_line(flags):
    with pytest.raises(FlagError, match=flags[0]) as error:
        train.main(flags)
    assert len(str(error.value).splitlines()) == 1


def test_another_runs_folder_is_refused(small, tmp_path):
    flags = [*small, "--out_dir", str(tmp_path), "--max_steps"]
    run_small(flags, 2)
    with pytest.raises(ValueError, match="max_steps was 2, is 3"):
        run_small(flags, 3)
    with pytest.raises(ValueError, match="another run"):
        run_small(flags, 2, "--mlp_ratio", 2)
    (tmp_path / "training_state.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable training state"):
        run_small(flags, 2)
    run_small(flags, 2, "--fresh")
    assert math.isfinite(log_rows(tmp_path, "eval")[-1]["eval"]["score"])


def test_a_folder_with_somebodys_weights_is_not_overwritten(small, tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    flags = [*small, "--max_steps", "2", "--out_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="has a model.safetensors but no training_state.pt"):
        run_small(flags)
    assert (tmp_path / "model.safetensors").read_text() == "precious"


# ---------------------------------------------------------------- runs
def test_log_rows_and_files_of_a_run_on_the_demo_data(tmp_path, capsys):
    run_small(SMALL, "--max_steps", 5, "--log_every", 2, "--eval_every", 2, "--out_dir", tmp_path)
    assert [row["step"] for row in log_rows(tmp_path, "loss")] == [1, 2, 4, 5]
    assert [row["step"] for row in log_rows(tmp_path, "eval")] == [2, 4, 5]
    assert {"loss", "lr", "step", "mlm", "itm"} <= log_rows(tmp_path, "loss")[0].keys()
    first_line = (tmp_path / "log.jsonl").read_text().splitlines()[0]
    assert json.loads(first_line).keys() == {"step", "header"}
    baselines = log_rows(tmp_path, "baselines")[0]["baselines"]
    assert baselines["text_only"]["itm_accuracy"] == 0.5
    for folder in (tmp_path, tmp_path / "best"):
        names = {file.name for file in folder.iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not list(tmp_path.rglob("*.tmp*"))
    assert (tmp_path / "run.lock").read_text() == ""
    assert weights.load_model(tmp_path).config.image_size == 16
    said = capsys.readouterr().out
    assert f"python figures.py managers --checkpoint {tmp_path} --data demo" in said
    assert f"python finetune.py --task vqav2 --init {tmp_path} --data demo" in said


def test_any_size_of_batch_runs(small, tmp_path):
    """Three rows in micro-batches of two; a batch of one; ITC with an odd number of rows."""
    cases = [("3", "2", "mlm,itm"), ("1", "8", "mlm,itm"), ("5", "8", "mlm,itm,itc")]
    for batch_size, micro_batch_size, objectives in cases:
        out = tmp_path / batch_size
        flags = ["--batch_size", batch_size, "--micro_batch_size", micro_batch_size]
        flags += ["--objectives", objectives, "--share_images", "false", "--max_steps", "2"]
        run_small(small, *flags, "--out_dir", out)
        assert len(losses(out)) == 2
        assert all(math.isfinite(loss) for loss in losses(out))


def test_precisions_and_checkpointing_run(small, tmp_path):
    cases = {
        "bf16": ["--precision", "bf16"],
        "fp16": ["--precision", "fp16"],
        "recomputed": ["--checkpointing"],
        "plain": [],
    }
    logged = {}
    for name, flags in cases.items():
        run_small(small, "--max_steps", 2, "--out_dir", tmp_path / name, *flags)
        logged[name] = losses(tmp_path / name)
    assert logged["bf16"] == pytest.approx(logged["plain"], rel=2e-2)
    assert logged["fp16"] == pytest.approx(logged["plain"], rel=5e-3)
    assert logged["recomputed"] == logged["plain"]


# ---------------------------------------------------------------- small parts
def test_the_mlms_recipes_are_found_on_the_command_line():
    assert train.is_llava(["--recipe", "llava_demo"])
    assert train.is_llava(["--fresh", "--recipe=llava_stage1"])
    assert not train.is_llava(["--recipe", "pretrain"])
    assert not train.is_llava(["--out_dir", "llava_demo"])
    assert not train.is_llava(["--recipe", "llava_stage1", "--recipe", "demo"])  # the last counts
    assert not train.is_llava([])


def masked_item(ids, *masked):
    """An item of which the tokens at these places are hidden: 0 stands for <mask>."""
    labels = [-100] * len(ids)
    mlm_ids = list(ids)
    for place in masked:
        labels[place] = ids[place]
        mlm_ids[place] = 0
    return {"mlm_ids": torch.tensor(mlm_ids), "mlm_labels": torch.tensor(labels)}


def test_mlm_guess_without_pictures_in_closed_form():
    """Between 1 and 3 stands 2 twice and 7 once; between 1 and 9 nothing is known, and 5 is the
    commonest token of all.
    """
    training = [
        masked_item([1, 2, 3], 1),
        masked_item([1, 2, 3], 1),
        masked_item([1, 7, 3], 1),
        masked_item([4, 5, 6], 1),
        masked_item([8, 5, 6], 1),
        masked_item([9, 5, 6], 1),
    ]
    heldout = [
        masked_item([1, 2, 3], 1),  # right
        masked_item([1, 7, 3], 1),  # wrong: 2 is commoner
        masked_item([1, 5, 9], 1),  # right: the commonest of all
        masked_item([1, 2, 9], 1),  # wrong
        masked_item([1, 2, 9]),  # nothing is asked
    ]
    assert train.text_only_mlm_guess(training, heldout) == 2 / 4
    assert train.text_only_mlm_guess(training, [heldout[-1]]) == 0


def test_what_to_type_next_names_the_data():
    commands = train.next_commands(TrainConfig(data_root="D", out_dir="O"))
    assert commands == ["python figures.py managers --checkpoint O --data_root D"]


@pytest.mark.parametrize("flag", ["--datasets", "--on_bad_sample"])
def test_a_flag_that_means_nothing_to_the_scenes_is_refused(flag, tmp_path):
    value = "coco" if flag == "--datasets" else "skip"
    for words in ([flag, value], [f"{flag}={value}"]):
        with pytest.raises(ValueError, match=f"^{flag} means nothing without --data_root"):
            train.main([*words, "--out_dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
