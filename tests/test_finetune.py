"""finetune.py and tasks.py: the recipes against the official ones; one process = two; every task
from raw downloads to a submission, with every kind of --init, through the command line, on tiny raw
trees with real pictures.
"""

import json
import math
import shutil

import pytest
import torch
from helpers import MT, free_port, join, log_rows, losses, needs, run_in_forks
from safetensors.torch import load_file, save_file

import finetune
import loop
import prepare
import scenes
import tasks
from eval import main as eval_main
from fields import FlagError
from model import ManagerTower, ManagerTowerConfig
from tokenizer import train_tokenizer
from weights import save_model, to_official

# ---------------------------------------------------------------- the table
# our name of a hyper-parameter -> the scripts', where it is another one
SCRIPT_NAMES = {"epochs": "max_epoch", "warmup": "warmup_steps", "dropout": "drop_rate"}
HYPER_PARAMETERS = (
    "batch_size",
    "learning_rate",
    "weight_decay",
    "lr_mult_head",
    "lr_mult_cross_modal",
    "k_test",
    "epochs",
    "warmup",
    "dropout",
    "image_size",
    "patch_size",
    "max_text_len",
    "head_hidden_scale",
)


@needs("manifests/resolved_configs.json")
@pytest.mark.parametrize(
    "script,task,init,papers",
    [
        ("ftfpt_vqa", "vqav2", "folder", {"batch_size": 576, "warmup": 0.06}),
        ("ftfs_vqa", "vqav2", "unimodal", {}),
        ("ftfpt_snli", "snli_ve", "folder", {}),
        ("ftfpt_nlvr2", "nlvr2", "folder", {}),
        ("ftfpt_flickr", "flickr30k", "folder", {}),
    ],
)
def test_hyper_parameters_are_those_of_the_scripts_or_the_papers(script, task, init, papers):
    configs = json.loads((MT / "manifests" / "resolved_configs.json").read_text())
    official = configs[script]
    run, fields = finetune.recipe(task, init, "")
    ours = {**vars(run), **vars(ManagerTowerConfig.base(**fields))}
    for name in HYPER_PARAMETERS:
        expected = papers.get(name, official[SCRIPT_NAMES.get(name, name)])
        assert ours[name] == expected, name
    assert [run.transform] == official["train_transform_keys"]
    assert (run.schedule, run.grad_clip) == ("linear", 0)


def test_every_task_has_a_recipe_for_the_demo_or_none_at_all():
    for name, task in tasks.TASKS.items():
        if task.recipe:
            run, fields = finetune.recipe(name, "out/demo", "demo")
            assert run.max_steps > 0
            assert run.eval_split == task.recipe["eval_split"]
            assert fields == {}
        else:
            assert not task.demo
    with pytest.raises(ValueError, match="--task is 'nlvr3'; it must be one of vqav2, nlvr2"):
        tasks.find_task("nlvr3")


# ---------------------------------------------------------------- raw downloads
def save_pictures(folder, names):
    """Real pictures under the published names: demo scenes. Returns their captions."""
    source = scenes.demo_source("captions", "train", len(names))
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        source.images(i)[0].save(file)
    return [row["text"] for row in source.texts()]


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def dump_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ANSWERS = ("red", "blue", "red", "red", "blue", "red")  # of the images 0 to 5


def raw_vqav2(root):
    for split, size in (("train2014", 6), ("val2014", 3), ("test2015", 3), ("test-dev2015", 2)):
        folder = split.replace("-dev", "")
        save_pictures(root / folder, [f"COCO_{folder}_{i:012d}.jpg" for i in range(size)])
        questions = []
        annotations = []
        for i in range(size):
            for q in range(3):
                ids = {"image_id": i, "question_id": 10 * i + q}
                questions.append({**ids, "question": f"what color is thing {q}?"})
                annotations.append(
                    {
                        **ids,
                        "question_type": "what color is",
                        "answer_type": "other",
                        "multiple_choice_answer": ANSWERS[i],
                        "answers": [{"answer": ANSWERS[i], "answer_id": k} for k in range(10)],
                    }
                )
        dump(root / f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        if "test" not in split:
            dump(root / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations})


def raw_nlvr2(root):
    for split in ("train", "dev", "test1"):
        rows = []
        for i in range(4):
            stem = f"{split}-{i}-{i}"
            folder = root / "images" / split
            directory = {}
            if split == "train":  # as published, it has folders of its own
                directory = {"directory": i}
                folder = folder / str(i)
            save_pictures(folder, [f"{stem}-img0.png", f"{stem}-img1.png"])
            for k in range(2):
                row = {
                    "sentence": f"both images have {k} dogs",
                    "identifier": f"{stem}-{k}",
                    "label": str(k == 0),
                }
                rows.append({**row, **directory})
        dump_lines(root / "nlvr2" / "data" / f"{split}.json", rows)


def raw_snli_ve(root):
    for split in ("train", "dev", "test"):
        rows = []
        for i in range(4):
            name = f"{split}{i}"
            save_pictures(root / "flickr30k-images", [f"{name}.jpg"])
            for k, label in enumerate(("entailment", "neutral", "contradiction")):
                row = {
                    "Flickr30K_ID": name,
                    "sentence1": "a premise",
                    "sentence2": f"hypothesis {k}",
                    "gold_label": label,
                }
                rows.append(row)
        dump_lines(root / f"snli_ve_{split}.jsonl", rows)


def raw_karpathy(root, name, splits):
    images = []
    for split in splits:
        for i in range(4):
            number = len(images)
            folder = "flickr30k-images"
            file = f"{split}{i}.jpg"
            if name == "coco":
                folder = "train2014" if split == "train" else "val2014"
                file = f"COCO_{folder}_{number:012d}.jpg"
            caption = save_pictures(root / folder, [file])[0]
            sentences = [{"raw": f"{caption} {i}"}, {"raw": f"picture {i} of {split}"}]
            image = {
                "filename": file,
                "filepath": folder,
                "split": split,
                "imgid": number,
                "cocoid": number,
                "sentences": sentences,
            }
            images.append(image)
    dump(root / "karpathy" / f"dataset_{name}.json", {"images": images})


def raw_flickr30k(root):
    raw_karpathy(root, "flickr30k", ("train", "val", "test"))


def raw_coco(root):
    raw_karpathy(root, "coco", ("train", "restval", "val", "test"))


RAW = {
    "vqav2": raw_vqav2,
    "nlvr2": raw_nlvr2,
    "snli_ve": raw_snli_ve,
    "flickr30k": raw_flickr30k,
    "coco": raw_coco,
}


# ---------------------------------------------------------------- from there to submissions
TINY = {
    "image_size": 32,
    "vision_layers": 2,
    "text_layers": 2,
    "managed_layers_text": 2,
    "managed_layers_image": 2,
}
FLAGS = (
    "--image_size 48 --max_text_len 16 --batch_size 4 --micro_batch_size 2 --max_steps 3 "
    "--num_workers 0 --log_every 1 --learning_rate 1e-4"
).split()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder of all tasks' manifests, made by prepare.py from tiny raw trees."""
    raw = tmp_path_factory.mktemp("raw")
    out = tmp_path_factory.mktemp("prepared")
    for name, make in RAW.items():
        make(raw / name)
        prepare.main([name, "--root", str(raw / name), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The folder of a tiny model as pre-training leaves it."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = scenes.demo_tokenizer()
    torch.manual_seed(0)
    model = ManagerTower(ManagerTowerConfig.tiny(vocab_size=words.vocab_size, **TINY))
    save_model(model, folder)
    words.save(folder)
    return folder


def run_finetune(name, init, out, *flags):
    what = ["--task", name, "--init", init, "--out_dir", out]
    finetune.main([str(flag) for flag in (*what, *FLAGS, *flags)])


def run_eval(name, checkpoint, data_root, *flags):
    what = ["--task", name, "--checkpoint", checkpoint, "--data_root", data_root]
    eval_main([str(flag) for flag in (*what, *flags)])


@pytest.mark.parametrize("name", list(RAW))
def test_raw_files_to_metrics_and_submission(name, prepared, pretrained, tmp_path, capsys):
    task = tasks.TASKS[name]
    out = tmp_path / "out"
    run_finetune(name, pretrained, out, "--data_root", prepared)
    said = capsys.readouterr().out
    assert "held out" in said
    assert ("rest_val is a part of val" in said) == (name == "vqav2")
    # what is said of the heads
    assert "heads dropped: " in said
    initialised = said.split("heads initialised: ")[1].splitlines()[0]
    assert task.heads[-1] in initialised
    # what was learnt
    assert len(losses(out)) == 3
    assert all(math.isfinite(loss) for loss in losses(out))
    state = load_file(out / "model.safetensors")
    positions = state["image_encoder.position_embedding"]
    assert len(positions) == 10  # 48 / 16 squared, and one
    assert len(state["type_embedding"]) == (3 if name == "nlvr2" else 2)
    # what eval.py measures
    run_eval(name, out, prepared)
    report = json.loads((out / "eval.json").read_text())["splits"]
    assert list(report) == list(task.splits)
    metrics = report[task.recipe["eval_split"]]
    logged = log_rows(out, "eval")[-1]["eval"]["score"]
    metric = "rmean" if task.is_retrieval else "accuracy"
    assert logged == pytest.approx(metrics[metric])


def test_a_submission_answers_every_question_once(prepared, pretrained, tmp_path):
    out = tmp_path / "out"
    run_finetune("vqav2", pretrained, out, "--data_root", prepared, "--max_steps", 1)
    submission = tmp_path / "submission.json"
    run_eval("vqav2", out, prepared, "--split", "test", "--submit", submission)
    answers = json.loads(submission.read_text())
    asked = [10 * image + number for image in range(3) for number in range(3)]
    assert [answer["question_id"] for answer in answers] == asked
    assert {answer["answer"] for answer in answers} <= {"red", "blue"}


TWO = ("vqav2", "nlvr2", "flickr30k")  # the two others differ in their data alone
STILL = ("--dropout", 0, "--manager_noise", "false", "--warmup", 0, "--learning_rate", 1e-3)


def finetune_in_two(rank, port, prepared, pretrained, out):
    join(rank, port)
    for name in TWO:
        run_finetune(name, pretrained, out / name, "--data_root", prepared, *STILL)


@pytest.mark.slow
def test_two_processes_equal_one(prepared, pretrained, tmp_path):
    """Hard negatives are those of one micro-batch: of 4 in one process, or of 2 x 2."""
    where = (prepared, pretrained, tmp_path / "two")
    run_in_forks(finetune_in_two, free_port(), *where, processes=2)
    for name in TWO:
        out = tmp_path / "one" / name
        flags = ("--data_root", prepared, *STILL, "--micro_batch_size", 4)
        run_finetune(name, pretrained, out, *flags)
        one = losses(out)
        assert losses(tmp_path / "two" / name) == pytest.approx(one, rel=1e-4)
        assert len(one) == 3
        assert one[0] != one[2]


# ---------------------------------------------------------------- what to start from
def save_encoders(folder, model):
    """Files of a CLIP and of a RoBERTa with the model's encoders, and the tokenizer beside the
    latter. Returns the flags that name them.
    """
    official = to_official(model.state_dict(), model.config)
    flags = []
    for flag, name, prefix, start in (
        ("--vision", "image", "vit_model.", "vit_model.visual."),
        ("--text", "text", "text_transformer.", "text_transformer."),
    ):
        state = {}
        for key, value in official.items():
            if key.startswith(start):
                state[key.removeprefix(prefix)] = value.detach().clone()
        file = folder / name / "model.safetensors"
        file.parent.mkdir()
        save_file(state, file)
        flags += [flag, file]
    scenes.demo_tokenizer().save(folder / "text")
    return flags


SIZES = {
    **TINY,
    "vision_width": 64,
    "text_width": 64,
    "hidden_size": 64,
    "vision_heads": 1,  # the official heads have 64 channels
    "text_heads": 1,
    "num_heads": 1,
}


@pytest.fixture
def given():
    """A tiny model of sizes that the official files may have."""
    torch.manual_seed(1)
    vocab_size = scenes.demo_tokenizer().vocab_size
    return ManagerTower(ManagerTowerConfig.tiny(vocab_size=vocab_size, **SIZES))


# after one update, whose learning rate is 0, the weights are those that were given
ONE_UPDATE = ("--max_steps", 1, "--image_size", 32)


def check_start(model, out, is_kept):
    """The weights that finetune left in `out` equal the model's, where is_kept(name)."""
    ours = load_file(out / "model.safetensors")
    theirs = model.state_dict()
    kept = [name for name in theirs if is_kept(name)]
    assert len(kept) > 50
    for name in kept:
        assert torch.equal(ours[name], theirs[name]), name
    assert ours["heads.snli_ve.fc.weight"].shape == (2 * 128, 128)


def is_in_encoder(name):
    return "encoder" in name


def is_in_body(name):
    return not name.startswith("heads.")


def test_a_run_starts_from_a_folder(given, prepared, tmp_path):
    folder = tmp_path / "given"
    save_model(given, folder)
    scenes.demo_tokenizer().save(folder)
    run_finetune("snli_ve", folder, tmp_path / "out", "--data_root", prepared, *ONE_UPDATE)
    check_start(given, tmp_path / "out", is_in_body)


def test_a_run_starts_from_two_encoders(given, prepared, tmp_path):
    flags = [*save_encoders(tmp_path, given), "--model", "tiny"]
    flags += ["--vocab_size", given.config.vocab_size]
    for name, size in SIZES.items():
        flags += [f"--{name}", size]
    where = ("--data_root", prepared)
    run_finetune("snli_ve", "unimodal", tmp_path / "out", *where, *flags, *ONE_UPDATE)
    check_start(given, tmp_path / "out", is_in_encoder)


def test_a_run_starts_from_an_official_checkpoint(given, prepared, tmp_path):
    file = tmp_path / "x.ckpt"
    torch.save({"state_dict": to_official(given.state_dict(), given.config)}, file)
    scenes.demo_tokenizer().save(tmp_path)
    flags = ("--data_root", prepared, "--tokenizer", tmp_path, *ONE_UPDATE)
    run_finetune("snli_ve", f"official:{file}", tmp_path / "out", *flags)
    check_start(given, tmp_path / "out", is_in_body)


def few_scenes(kind, split, size, *args):
    """Instead of finetune.demo_source, whose 20,000 scenes take some seconds."""
    return scenes.demo_source(kind, split, min(size, 400), *args)


def test_demo_data_and_resume(pretrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "demo_source", few_scenes)
    flags = ["--task", "nlvr2", "--data", "demo", "--init", str(pretrained), "--eval_size", "16"]
    flags += ["--batch_size", "8", "--micro_batch_size", "8", "--max_steps", "2"]
    flags += ["--out_dir", str(tmp_path)]
    finetune.main(flags)
    said = capsys.readouterr().out
    assert "text only" in said
    assert "majority" in said
    assert "eval.py --task nlvr2" in said
    finetune.main(flags)
    assert "is finished: 2 of 2" in capsys.readouterr().out


def test_epochs_count_where_max_steps_is_0(prepared, pretrained, tmp_path):
    """24 rows of snli_ve's training split in batches of 5: half an epoch is 3 updates."""
    flags = ("--max_steps", 0, "--epochs", 0.5, "--batch_size", 5)
    source = tasks.open_sets("hypotheses", prepared, ("snli_ve",), "train")
    run_finetune("snli_ve", pretrained, tmp_path, "--data_root", prepared, *flags)
    assert len(losses(tmp_path)) == math.ceil(0.5 * len(source) / 5)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "flags,message",
    [
        (["--data", "demo"], "--init"),
        (["--init", "x"], "--data_root"),
        (["--data", "demo", "--data_root", "D", "--init", "x"], "--data_root"),
        (["--data", "demos", "--init", "x"], "--data is 'demos'; it must be .*demo"),
        (["--data=demo", "--init", "/nowhere"], "nowhere"),
        (["--data", "demo", "--init", "unimodal"], "needs --vision"),
        (["--data", "demo", "--init", "x", "--text", "."], "has its own"),
        (["--data", "demo", "--init", "official:/nowhere.ckpt"], "give --tokenizer"),
        (["--data", "demo", "--init", "x", "--epochs", "0"], "--epochs is 0.0; it must be .*above"),
        (["--data", "demo", "--init", "x", "--k_test", "0"], "--k_test is 0; it must be"),
    ],
)
def test_bad_flags_are_one_sentence(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        finetune.main(["--task", "vqav2", "--out_dir", str(tmp_path), *flags])
    assert not isinstance(error.value, FlagError)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--objectives", "mlm"],  # a flag of pre-training
        ["--share_images", "true"],
        ["--heads", "vqa"],  # a field that follows from the task
        ["--task", "tuxpaint"],  # a set without a recipe
        ["--epochs", "few"],
    ],
)
def test_unknown_flags_and_wrong_types_are_errors_of_the_command_line(flags, tmp_path):
    where = ["--data", "demo", "--init", "x", "--out_dir", str(tmp_path)]
    with pytest.raises(FlagError, match=flags[0]):
        finetune.main(["--task", "vqav2", *where, *flags])


def test_errors_of_data_and_weights(prepared, pretrained, tmp_path):
    train_tokenizer(map(chr, range(0x4E00, 0x5E00)), 2000).save(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(b"no")
    cases = [
        (pretrained, "eval_split test of vqav2 has no labels", ["--eval_split", "test"]),
        (pretrained, "train_split test of vqav2 has no labels", ["--train_split", "test"]),
        (pretrained, "the split 'val' is named twice", ["--train_split", "val+val"]),
        (
            pretrained,
            "--epochs 1e.300 of .* rows are more",
            ["--epochs", "1e300", "--max_steps", "0"],
        ),
        (pretrained, r"has \d+ ids .* give its own with --tokenizer", ["--tokenizer", tmp_path]),
        (f"official:{tmp_path / 'x.ckpt'}", "x.ckpt is no zip", ["--tokenizer", pretrained]),
    ]
    for init, message, flags in cases:
        with pytest.raises(ValueError, match=message):
            run_finetune("vqav2", init, tmp_path / "out", "--data_root", prepared, *flags)


# ---------------------------------------------------------------- baselines of a task with labels
class Rows(list):
    """Hypotheses with a text and a label."""

    kind = "hypotheses"

    def iterate_texts(self):
        return iter(self)


def rows_of(pairs):
    """ "a0 b2" -> the texts a and b with the labels 0 and 2."""
    rows = Rows()
    for text, label in pairs.split():
        rows.append({"text": text, "label": int(label)})
    return rows


def test_text_only_guess_in_closed_form():
    guess = tasks.text_only_guess(rows_of("a0 a0 b2 a1"), rows_of("a0 b2 b0 c1"))
    assert guess == {"majority": 2 / 4, "text_only": 2 / 4}
    by_name = tasks.baselines(rows_of("a0 a0 b2 a1"), rows_of("b2 b2 b2 a1"))
    assert by_name == {"majority": {"accuracy": 0.0}, "text_only": {"accuracy": 3 / 4}}


# ---------------------------------------------------------------- flags that mean nothing
@pytest.mark.parametrize(
    "flags,message",
    [
        ("vqav2 --data demo --train_split train", "--train_split means nothing with --data demo"),
        ("nlvr2 --data demo --eval_split dev", "--eval_split means nothing with --data demo"),
        ("nlvr2 --data demo --on_bad_sample=skip", "--on_bad_sample means nothing with --data"),
        ("nlvr2 --data_root D --eval_size 5", "--eval_size means nothing with --data_root"),
        ("vqav2 --data_root D --k_test 5", "--k_test means nothing with --task vqav2"),
        ("vqav2 --data_root D --model tiny", "--model means nothing with --init x"),
        ("vqav2 --data_root D --epochs 2 --max_steps 9", "--epochs means .* with --max_steps 9"),
        ("vqav2 --data demo --epochs 2", "--epochs means nothing with --max_steps 1000"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        finetune.main(["--init", "x", "--out_dir", str(tmp_path / "o"), "--task", *flags.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags", ["flickr30k --k_test 5 --data demo", "vqav2 --epochs 2 --max_steps 0 --data demo"]
)
def test_a_flag_that_means_something_is_taken(flags, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        finetune.main(["--init", "/nowhere", "--out_dir", str(tmp_path), "--task", *flags.split()])


# ---------------------------------------------------------------- without the beginning
def test_a_run_goes_on_when_its_init_is_gone(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "demo_source", few_scenes)
    init = tmp_path / "init"
    shutil.copytree(pretrained, init)
    out = tmp_path / "out"
    flags = ["--task", "nlvr2", "--data", "demo", "--init", str(init), "--eval_size", "8"]
    flags += ["--batch_size", "8", "--micro_batch_size", "8", "--max_steps", "4", "--dropout", "0"]
    flags += ["--save_every", "2", "--log_every", "1", "--out_dir"]
    finetune.main([*flags, str(tmp_path / "whole")])
    # it ends after the save of step 2
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_due", lambda done, every, last: every and done % every == 0)
        original = loop.Checkpoint.save

        def save_and_end(checkpoint, step, *state):
            original(checkpoint, step, *state)
            raise ValueError("the power failed")

        patch.setattr(loop.Checkpoint, "save", save_and_end)
        with pytest.raises(ValueError, match="the power failed"):
            finetune.main([*flags, str(out)])
    shutil.rmtree(init)
    # config.json and the weights for users are not needed either
    (out / "config.json").unlink()
    (out / "model.safetensors").unlink()
    finetune.main([*flags, str(out)])
    assert losses(out) == losses(tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    (row,) = log_rows(out, "baselines")
    assert "untrained" not in row["baselines"]
    # what changes the run is refused as ever, and a new run needs it
    with pytest.raises(ValueError, match="dropout was 0"):
        finetune.main([*flags, str(out), "--dropout", "0.5"])
    with pytest.raises(ValueError, match="init"):
        finetune.main([*flags, str(out), "--fresh"])
