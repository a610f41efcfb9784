"""The scripts of runs/: their headers, their flags, their errors, and their demos."""

import os
import re
import select
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SMALL, close, fork_script, free_port, log_rows, losses, status_of

import eval
import fields
import finetune
import prepare
import train
import train_llava
from llava_manager import LlavaManagerConfig
from loop import RunConfig
from manager import AdaptiveManager, standardize
from model import ManagerTowerConfig
from tasks import TASKS

RUNS = ROOT / "runs"
OTHERS = ("common.sh", "slurm.sh", "compare_real.sh")  # no table of the papers
SCRIPTS = sorted(path for path in RUNS.glob("*.sh") if path.name not in OTHERS)
DOWNSTREAM = ("vqav2", "nlvr2", "snli_ve", "flickr30k")
CONFIGS = (
    train.TrainConfig,
    finetune.FinetuneConfig,
    train_llava.LlavaTrainConfig,
    ManagerTowerConfig,
    LlavaManagerConfig,
    eval.EvalConfig,
)
# flags that are no field: of the scripts themselves, of torchrun, of prepare.py, and the two that
# name a recipe
OTHER_FLAGS = {"demo", "init", "help", "standalone", "nproc_per_node", "root", "out"}
OTHER_FLAGS |= {"recipe", "task"}


def header(script):
    """The lines of comment that a script begins with, without the first one."""
    lines = []
    for line in script.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def environment_of(**environment):
    """Nothing of this process's environment but what Python needs."""
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ
    }
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}


def run_script(script, *arguments, **environment):
    """Run a script with nothing of this environment but what Python needs."""
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=environment_of(**environment),
        capture_output=True,
        text=True,
        timeout=1800,
    )


# ---------------------------------------------------------------- headers and flags
def test_there_is_a_script_for_each_table():
    names = {script.stem for script in SCRIPTS}
    assert names == {"pretrain", "llava", *DOWNSTREAM}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_begins_with_what_it_reproduces_and_needs(script):
    lines = header(script)
    titles = [line.split(":")[0] for line in lines if re.match(r"[A-Z][a-z ]+:", line)]
    assert titles == ["Reproduces", "The paper", "Needs", "Hours", "Run"]
    text = "\n".join(lines)
    assert "estimate" in text.split("Hours:")[1], "hours that nobody measured are called estimates"
    assert "TCSVT 2025" in text
    assert f"bash runs/{script.name} --demo [OUT]" in text
    body = script.read_text()
    assert "set -euo pipefail" in body
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_the_numbers_in_a_header_are_those_of_the_table_of_tasks(name):
    text = "\n".join(header(RUNS / f"{name}.sh"))
    numbers = []
    for metrics in TASKS[name].paper.values():
        for value in metrics.values():
            numbers += re.findall(r"\d+\.\d\d", str(value))
    assert numbers
    for number in numbers:
        assert number in text


def test_every_flag_in_runs_is_a_field_of_a_config():
    known = set(OTHER_FLAGS)
    for config in CONFIGS:
        known |= set(fields.field_types(config))
    used = set()
    for script in (*SCRIPTS, RUNS / "common.sh"):
        used |= set(re.findall(r"(?<![\w-])--([a-z][a-z_0-9]*)", script.read_text()))
    assert len(used) > 20
    assert used <= known, f"no field has the name {sorted(used - known)}"


# ---------------------------------------------------------------- the commands of the real runs
FAKE = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$COMMANDS"
echo >> "$COMMANDS"
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """run(script, arguments, environment) -> the command lines that it would have started."""
    # the checkpoints that one command writes for the next one are not there
    monkeypatch.setattr(RunConfig, "fetch_sources", lambda run: None)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "torchrun"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    places = {}
    for name in "DATA RAW CLIP ROBERTA SIGLIP QWEN2 STAGE1 STAGE1_5 STAGE2 IMAGES".split():
        places[name] = str(tmp_path / name.lower())
        Path(places[name]).mkdir()

    def run(script, *arguments, **environment):
        log = tmp_path / "commands.txt"
        path = f"{programs}:{os.environ['PATH']}"
        values = {**places, "PATH": path, "COMMANDS": str(log), "NPROC": "4", **environment}
        result = run_script(RUNS / script, *arguments, **values)
        assert result.returncode == 0, result.stderr
        found = []
        for line in log.read_text().splitlines():
            words = shlex.split(line)
            if words[0] == "--standalone":
                assert words[1:3] == ["--nproc_per_node", "4"]
                words = words[3:]
            found.append((Path(words[0]).name, words[1:]))
        return found

    return run


def parse(program, words):
    """Parse the flags as the program does; every value is checked. Returns its config."""
    if program == "eval.py":
        return fields.parse_flags(eval.EvalConfig, words)
    if program == "finetune.py":
        init = words[words.index("--init") + 1]
        recipes = {name: finetune.recipe(name, init, "") for name in DOWNSTREAM}
        _, run, model_fields = fields.parse_recipe(words, recipes, "task")
        run.check_start()
        ManagerTowerConfig(**model_fields)
        return run
    assert program == "train.py"
    if train.is_llava(words):
        name, run, model_fields = fields.parse_recipe(words, train_llava.LLAVA_RECIPES, "recipe")
        train_llava.check_start(name, run, model_fields)
        return run
    return fields.parse_recipe(words, train.RECIPES, "recipe")[1]


def test_pretraining_prepares_four_sets_and_trains_the_papers_recipe(commands):
    found = commands("pretrain.sh", "--share_images")
    prepared = [words for program, words in found if program == "prepare.py"]
    assert [words[0] for words in prepared] == ["coco", "vg", "sbu", "cc3m"]
    assert all(words[1::2] == ["--root", "--out"] for words in prepared)
    assert {words[0] for words in prepared} <= set(prepare.DATASETS)
    run = parse(*found[-1])
    assert (run.max_steps, run.batch_size) == (100_000, 4096)
    assert run.out_dir == "out/pretrain"
    assert run.share_images, "flags of train.py are passed on"


@pytest.mark.parametrize("name", DOWNSTREAM)
@pytest.mark.parametrize("init", ["unimodal", "out/pretrain"])
def test_a_downstream_task_is_prepared_trained_and_evaluated(commands, name, init):
    found = commands(f"{name}.sh", "--init", init)
    assert [program for program, _ in found] == ["prepare.py", "finetune.py", "eval.py"]
    assert found[0][1][0] == name
    run = parse(*found[1])
    measured = parse(*found[2])
    folder = f"out/{name}_unimodal" if init == "unimodal" else f"out/{name}"
    assert run.init == init
    assert run.out_dir == measured.checkpoint == folder
    assert run.data_root == measured.data_root != ""
    assert bool(run.vision) == (init == "unimodal")
    assert measured.task == name
    if name == "vqav2":
        assert (measured.split, measured.submit) == ("test", f"{folder}/submission.json")


def test_the_mllm_is_trained_in_three_stages_with_and_without_grid_and_managers(commands):
    found = commands("llava.sh")
    runs = [parse(program, words) for program, words in found]
    assert len(runs) == 12
    words_of = {run.out_dir: words for run, (_, words) in zip(runs, found, strict=True)}
    for model in ("baseline", "manager", "grid", "grid_manager"):
        words = words_of[f"out/llava_{model}"]
        assert words[words.index("--init") + 1] == f"out/llava_{model}_stage1_5"
        assert words[words.index("--grid") + 1] == ("true" if "grid" in model else "false")
        words = words_of[f"out/llava_{model}_stage1_5"]
        managers = "static" if "manager" in model else "none"
        assert words[words.index("--init") + 1] == f"out/llava_stage1_{managers}"
        assert "--grid_pinpoints" not in words, "the paper's tiles are in the recipe"
        words = words_of[f"out/llava_stage1_{managers}"]
        assert words[words.index("--manager_type") + 1] == managers


def test_only_the_models_that_are_named_are_trained(commands):
    found = commands("llava.sh", MODELS="grid")
    assert [parse(*command).out_dir for command in found] == [
        "out/llava_stage1_none",
        "out/llava_grid_stage1_5",
        "out/llava_grid",
    ]


# ---------------------------------------------------------------- what is missing is said
@pytest.mark.parametrize(
    ("script", "arguments", "environment", "words"),
    [
        ("pretrain.sh", [], {}, "set CLIP to the folder of HF's clip-vit-base-patch16"),
        ("pretrain.sh", [], {"CLIP": "."}, "set ROBERTA to"),
        ("pretrain.sh", [], {"CLIP": ".", "ROBERTA": "/nowhere"}, "ROBERTA is /nowhere, which"),
        ("pretrain.sh", [], {"CLIP": ".", "ROBERTA": "."}, "set DATA to"),
        ("pretrain.sh", [], {"CLIP": ".", "ROBERTA": ".", "RAW": "."}, "set DATA to"),
        ("vqav2.sh", [], {"DATA": "."}, "say what to start from"),
        ("vqav2.sh", ["--init"], {"DATA": "."}, "--init needs a value"),
        ("nlvr2.sh", ["--init", "out/pretrain"], {}, "set DATA to"),
        ("snli_ve.sh", ["--init", "unimodal"], {"DATA": "."}, "set CLIP to"),
        ("llava.sh", [], {}, "set SIGLIP to"),
        ("llava.sh", [], {"SIGLIP": ".", "QWEN2": "."}, "set STAGE1 to"),
    ],
)
def test_a_missing_place_is_one_sentence(script, arguments, environment, words):
    result = run_script(RUNS / script, *arguments, **environment)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_an_unknown_model_is_one_sentence(commands, tmp_path):
    with pytest.raises(AssertionError, match="error: MODELS has huge; it must be some of baseline"):
        commands("llava.sh", MODELS="huge")


def test_help_prints_the_header():
    result = run_script(RUNS / "nlvr2.sh", "-h")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].startswith("Reproduces: NLVR2")
    assert "set -euo pipefail" not in result.stdout
    assert "--demo [OUT]" in result.stdout


# ---------------------------------------------------------------- the demos
# the `python` of the demos: it asks this process for a fork that does the same, as a new
# interpreter takes longer to import torch than these trainings take
ASK_FOR_A_FORK = """#!/usr/bin/env bash
{ printf '%q ' "$@"; echo; } > "$REQUESTS"
read -r status < "$REPLIES"
exit "$status"
"""


def run_demo(name, folder, place, finished):
    """Run a demo, its `python` in forks, in the folder `place`. Returns what it printed.

    finished: the command lines that were run before, by any demo; they are not run again.
    """
    program = folder / "programs" / "python"
    program.parent.mkdir()
    program.write_text(ASK_FOR_A_FORK)
    program.chmod(0o755)
    pipes = {"REQUESTS": str(folder / "requests"), "REPLIES": str(folder / "replies")}
    for pipe in pipes.values():
        os.mkfifo(pipe)
    path = f"{program.parent}:{os.environ['PATH']}"
    environment = environment_of(**pipes, PATH=path)
    # reading and writing: a pipe without a reader or a writer would block, or end
    with (
        open(pipes["REQUESTS"], "r+b", buffering=0) as requests,
        open(pipes["REPLIES"], "r+b", buffering=0) as replies,
        open(folder / "out.txt", "a") as out,
        open(folder / "err.txt", "a") as err,
    ):
        command = ["bash", str(RUNS / f"{name}.sh"), "--demo", str(place)]
        demo = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        waiting = b""
        while demo.poll() is None:
            if not select.select([requests], [], [], 0.02)[0]:
                continue
            waiting += requests.read(65536)
            if waiting.endswith(b"\n"):
                status = 0
                if waiting not in finished:
                    script, *flags = shlex.split(waiting.decode())
                    child = fork_script(script, flags, out=out, err=err, environment=environment)
                    status = status_of(child)
                if status == 0:
                    finished.add(waiting)
                waiting = b""
                replies.write(b"%d\n" % status)
    said = (folder / "out.txt").read_text()
    assert demo.returncode == 0, said + (folder / "err.txt").read_text()
    return said


def check_run(folder):
    """A finished run of three steps, with losses, a held-out measure and a checkpoint."""
    assert [row["step"] for row in log_rows(folder, "loss")] == [1, 2, 3]
    assert len(log_rows(folder, "eval")) == 1
    for file in ("model.safetensors", "config.json", "tokenizer.json", "best/model.safetensors"):
        assert (folder / file).is_file()


@pytest.mark.slow
def test_the_demo_of_pretraining(tmp_path):
    """This one with the real `python`, as a user runs it."""
    result = run_script(RUNS / "pretrain.sh", "--demo", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"The checkpoint is in {tmp_path}/pretrain" in result.stdout
    check_run(tmp_path / "pretrain")


@pytest.mark.slow
def test_fine_tuning_starts_in_an_interpreter_of_its_own():
    command = [sys.executable, str(ROOT / "finetune.py"), "-h"]
    result = subprocess.run(command, env=environment_of(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "--task" in result.stdout


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    """The folder of all downstream demos, which begin with the same pre-training; and the command
    lines that were run there.
    """
    return tmp_path_factory.mktemp("downstream"), set()


@pytest.mark.slow
@pytest.mark.parametrize("name", DOWNSTREAM)
def test_the_demo_of_a_downstream_task(name, downstream, tmp_path):
    out, finished = downstream
    output = run_demo(name, tmp_path, out, finished)
    last = output.splitlines()[-1]
    with_vlp = out / name
    without_vlp = out / f"{name}_unimodal"
    assert last == f"demo of {name}: with VLP in {with_vlp}, without in {without_vlp}"
    assert output.count(f"{name} demo") == 2, "both are evaluated"
    for folder in (out / "pretrain", with_vlp, without_vlp):
        check_run(folder)
    for folder in (with_vlp, without_vlp):
        assert (folder / "eval.json").is_file()
        assert (folder / "submission.json").is_file() == (name == "vqav2")


@pytest.mark.slow
def test_the_demo_of_the_mllm(tmp_path):
    output = run_demo("llava", tmp_path, tmp_path / "out", set())
    assert output.splitlines()[-1].startswith("demo of the MLLM: the four models are in")
    for model in ("baseline", "manager", "grid", "grid_manager"):
        check_run(tmp_path / "out" / f"llava_{model}_stage1_5")
        check_run(tmp_path / "out" / f"llava_{model}")
    for managers in ("none", "static"):
        check_run(tmp_path / "out" / f"llava_stage1_{managers}")


# ---------------------------------------------------------------- a manager in a model of one's own
@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers")
    from runs import manager_in_your_model

    return manager_in_your_model


def test_an_untrained_manager_is_the_mean_of_the_standardised_layers(example):
    torch.manual_seed(0)
    model = example.make_model().eval()
    ids, _ = example.toy_batch(torch.Generator().manual_seed(0), rows=4)
    experts = model.experts(ids)
    assert experts.shape == (4, 6, example.LENGTH, example.WIDTH)
    torch.testing.assert_close(experts.mean(-1), torch.zeros(experts.shape[:-1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.manager(experts), experts.mean(1))
    torch.testing.assert_close(model(ids), model.head(experts.mean(1)[:, 0]))
    assert example.layer_weights(model) == pytest.approx([1 / 6] * 6)


def test_gradients_reach_the_manager_of_the_example_and_not_its_encoder(example):
    torch.manual_seed(0)
    model = example.make_model().train()
    ids, labels = example.toy_batch(torch.Generator().manual_seed(0))
    torch.nn.functional.cross_entropy(model(ids), labels).backward()
    for name, parameter in model.manager.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


def test_the_loss_of_the_example_falls_and_its_manager_finds_the_layer(example, capsys):
    example.main()
    output = capsys.readouterr().out
    losses = [float(number) for number in re.findall(r"loss (\d\.\d+)", output)]
    assert len(losses) >= 4
    assert losses[-1] < 0.8 * losses[0]
    weights = output.splitlines()[-1].split("after: ")[1].split()
    weights = [float(weight) for weight in weights]
    assert weights.index(max(weights)) == 0
    assert weights[0] > 0.5
    assert sum(weights) == pytest.approx(1, abs=0.01)


def test_the_adaptive_manager_is_called_as_the_example_says(example):
    assert "manager(standardize(text_experts), previous=text, query=image)" in example.__doc__
    torch.manual_seed(0)
    manager = AdaptiveManager(16, 3)
    text_experts = torch.randn(2, 3, 5, 16)
    text = torch.randn(2, 5, 16)
    image = torch.randn(2, 7, 16)
    merged = manager(standardize(text_experts), previous=text, query=image)
    assert merged.shape == text.shape


# ---------------------------------------------------------------- several machines
@pytest.mark.slow
def test_two_agents_of_torchrun_give_the_losses_of_one_process(tmp_path):
    """Two nodes with a process each, on this machine: the order of the data is the same."""
    # noise differs between the processes
    flags = [*SMALL, "--manager_noise", "false", "--max_steps", "4", "--out_dir"]
    rendezvous = f"127.0.0.1:{free_port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    torchrun += ["--rdzv_endpoint", rendezvous, "--rdzv_id", "two"]
    together = [*torchrun, str(ROOT / "train.py"), *flags, str(tmp_path / "two")]
    agents = [
        subprocess.Popen(together, env=environment_of(), stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [agent.wait(timeout=280) for agent in agents] == [0, 0]
    train.main([*flags, str(tmp_path / "one")])
    assert len(losses(tmp_path / "two")) == 4
    close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), 1e-5)


FAKE_SLURM = {
    # srun OPTIONS torchrun ...: the program itself, on this machine
    "srun": 'shift\nexec "$@"\n',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}


@pytest.mark.slow
def test_a_job_of_slurm_saves_at_sigterm_is_queued_again_and_goes_on(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in FAKE_SLURM.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (programs / name).chmod(0o755)
    environment = environment_of(
        PATH=f"{programs}:{os.environ['PATH']}",
        CALLS=str(tmp_path / "calls"),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="here",
        SLURM_JOB_NUM_NODES="1",
        NPROC="1",
        PORT=str(free_port()),
    )
    out = tmp_path / "run"
    flags = [*SMALL, "--save_every", "1", "--max_steps", "100000", "--out_dir", str(out)]
    command = ["bash", str(RUNS / "slurm.sh"), str(ROOT / "train.py"), *flags]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "training_state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    job.terminate()
    job.wait(timeout=100)
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    steps = len(losses(out))
    assert steps > 0
    state = (out / "training_state.pt").read_bytes()
    assert state and not list(out.glob("*.tmp*"))


@pytest.mark.parametrize("arguments", [[], ["train.py"]])
def test_slurms_script_outside_of_slurm_is_one_sentence(arguments):
    done = run_script(RUNS / "slurm.sh", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
