"""world.py: devices, what is gathered over processes, with its gradient, seeds and precisions, and
how a script ends: one sentence, exit status 1 or 2.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, free_port, join, run_in_forks, run_script, run_small
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import world
from fields import FlagError
from files import BadSample
from world import World, choose_device, collect, gather

CPU = torch.device("cpu")


# ---------------------------------------------------------------- devices
@pytest.mark.parametrize(
    "name", ["foo", "", "mps", "meta", "xla", "CPU", "cpu:0", "cuda:x", "cuda:-1", "cuda 0", "0"]
)
def test_a_device_that_is_none_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError) as error:
        choose_device(name, 0)
    assert str(error.value) == f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:9"])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as error:
        choose_device(name, 0)
    assert str(error.value) == f"--device {name}, but torch sees no CUDA device here"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        World(name)


def test_of_two_cuda_devices_each_process_takes_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 0) == torch.device("cuda:0")
    assert choose_device("cuda", 1) == torch.device("cuda:1")
    assert choose_device("cuda:1", 0) == torch.device("cuda:1")
    assert choose_device("cpu", 1) == CPU
    for name, local_rank, index in (("cuda:9", 0, 9), ("cuda:2", 0, 2), ("auto", 2, 2)):
        with pytest.raises(ValueError, match=f"device {index} of 2 CUDA devices"):
            choose_device(name, local_rank)


def test_without_cuda_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 3) == CPU


# ---------------------------------------------------------------- one process
def test_one_process_is_a_world_of_its_own(capsys):
    alone = World("cpu")
    assert (alone.rank, alone.size) == (0, 1)
    assert world.ranks() == (0, 1)
    total = torch.tensor([1.0, 2.0])
    assert alone.sum(total) is total
    assert total.tolist() == [1.0, 2.0]
    alone.barrier()
    alone.print("said", 5)
    assert capsys.readouterr().out == "said 5\n"
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows, [3]) is rows


def test_what_is_collected_comes_in_the_order_of_its_positions():
    assert collect([(7, "c"), (0, "a"), (3, ("b", 5))]) == ["a", ("b", 5), "c"]
    assert collect([]) == []
    with pytest.raises(AssertionError, match="position 3 arrived twice"):
        collect([(3, "a"), (3, "b")])


def test_the_other_processes_are_silent(monkeypatch, capsys):
    quiet = World("cpu")
    quiet.rank = 2
    quiet.print("said")
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- several processes
SIZE = 3
UNEVEN = ([3, 1, 2], [2, 2, 1], [0, 4, 1])  # rows of each process
DTYPE = torch.float64


def rows_of_all(shares):
    """(sum of the shares, 2, 3): the rows of all processes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(shares), 2, 3, generator=generator, dtype=DTYPE)


def weights_of(rank, shares):
    """What a process weighs the gathered rows with in its loss."""
    generator = torch.Generator().manual_seed(1 + rank)
    return torch.randn(sum(shares), 2, 3, generator=generator, dtype=DTYPE)


def work_in_several(rank, port, folder):
    """What a process of several sees, saved as {rank}.pt."""
    here = join(rank, port, SIZE)
    results = {"ranks": world.ranks(), "gathered": [], "gradients": []}
    for shares in UNEVEN:
        start = sum(shares[:rank])
        own = rows_of_all(shares)[start : start + shares[rank]].requires_grad_()
        everyone = gather(own, shares)
        loss = (weights_of(rank, shares) * everyone**2).sum()
        loss.backward()
        results["gathered"].append(everyone.detach())
        results["gradients"].append(own.grad)
    # whole numbers too: masks and indices
    numbers = torch.arange(rank + 1) + 10 * rank
    results["numbers"] = gather(numbers, [1, 2, 3])
    # a row of the text's experts, gathered twice in one graph, as ITC and ITM do
    twice = torch.full((1, 1), float(rank + 1), dtype=DTYPE, requires_grad=True)
    product = gather(twice, [1] * SIZE).sum() * gather(twice, [1] * SIZE).prod()
    product.backward()
    results["twice"] = twice.grad
    results["sum"] = here.sum(torch.tensor([1.0, float(rank)]))
    # positions are dealt like cards, and one process has none
    parts = [(position, f"row {position}") for position in range(rank, 7, 2)] if rank < 2 else []
    results["collected"] = collect(parts)
    here.barrier()
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("several")
    run_in_forks(work_in_several, free_port(), folder, processes=SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.slow
def test_uneven_rows_are_gathered_in_the_order_of_the_processes(several):
    for rank, results in enumerate(several):
        assert results["ranks"] == (rank, SIZE)
        for shares, gathered in zip(UNEVEN, results["gathered"], strict=True):
            assert torch.equal(gathered, rows_of_all(shares))
        assert results["numbers"].tolist() == [0, 10, 11, 20, 21, 22]


@pytest.mark.slow
def test_the_gradient_of_gathered_rows_equals_the_closed_form(several):
    """The loss of process p is sum(w_p * x ** 2) over all rows x: a row's gradient is 2 x times the
    sum of all processes' weights.
    """
    for case, shares in enumerate(UNEVEN):
        weights = sum(weights_of(rank, shares) for rank in range(SIZE))
        expected = 2 * weights * rows_of_all(shares)
        ours = torch.cat([results["gradients"][case] for results in several])
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)
    # f = (a + b + c) * abc at 1, 2, 3, once for each process: df/da = abc + (a + b + c) * bc
    for rank, results in enumerate(several):
        assert results["twice"].item() == SIZE * (6 + 6 * 6 / (rank + 1))


@pytest.mark.slow
def test_sums_and_collected_parts_are_the_same_everywhere(several):
    for results in several:
        assert results["sum"].tolist() == [3.0, 0.0 + 1.0 + 2.0]
        assert results["collected"] == [f"row {position}" for position in range(7)]


# ---------------------------------------------------------------- seeds, precision, modes
def test_seeds_are_a_function_of_their_numbers_on_every_machine():
    """Of each run that was ever begun: other seeds would end its resume with other bits."""
    assert world.seed_of(0, 1, 2) == 3621086109500569874
    assert world.seed_of(0, "model") == 2797697554967667860
    seeds = {world.seed_of(*numbers) for numbers in ((0, 1), (1, 0), (1,), ("0", 1), (0, 1, 0))}
    assert len(seeds) == 5
    world.seed_all(0, "model")
    first = torch.randn(3)
    torch.randn(5)
    world.seed_all(0, "model")
    assert torch.equal(torch.randn(3), first)


def test_auto_is_bf16_on_cuda_and_fp32_elsewhere():
    assert world.resolve_precision("auto", torch.device("cuda:0")) == "bf16"
    assert world.resolve_precision("auto", CPU) == "fp32"
    for precision in world.PRECISIONS:
        assert world.resolve_precision(precision, torch.device("cuda:0")) == precision


def test_autocast_computes_in_the_given_precision():
    layer = nn.Linear(2, 2)
    dtypes = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in dtypes.items():
        with world.autocast(precision, CPU):
            assert layer(torch.ones(1, 2)).dtype == dtype


def test_of_a_batch_only_the_tensors_move():
    batch = {"pixels": torch.ones(2), "images": [1, 2], "name": "x"}
    moved = world.to_device(batch, torch.device("meta"))
    assert moved["pixels"].is_meta
    assert moved["images"] is batch["images"]
    assert moved["name"] == "x"
    assert not batch["pixels"].is_meta


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_in_its_mode(training):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train(training)
    with world.evaluating(model) as device:
        assert device == CPU
        assert not model[1].training
        output = model(torch.ones(1, 2))
        assert not output.requires_grad
        assert output.dtype == torch.float32
    assert model.training == training
    assert model[1].training == training
    assert torch.is_grad_enabled()
    with pytest.raises(KeyError), world.evaluating(model):
        raise KeyError("x")
    assert model.training == training
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------- how a script ends
def end_of(main, monkeypatch, capsys, argv=()):
    """(exit status, lines on stderr) of a script with this main function."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    status = 0
    try:
        world.one_sentence(main)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "error,status,sentence",
    [
        (ValueError("a is 5; it must be 6"), 1, "error: a is 5; it must be 6"),
        (BadSample("x.jsonl, line 3: no"), 1, "error: x.jsonl, line 3: no"),
        (FlagError("unrecognized arguments: --x"), 2, "error: unrecognized arguments: --x"),
        (FileNotFoundError(2, "No such file", "a"), 1, "error: a: No such file"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            1,
            "error: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        ),
        (ValueError(), 1, "error: ValueError"),
        (ValueError("a\x1b[2Jb\rc"), 1, "error: a\\x1b[2Jb\\rc"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (KeyboardInterrupt("interrupted. All is kept"), 130, "error: interrupted. All is kept"),
        (
            RecursionError("maximum recursion depth exceeded"),
            1,
            "error: something in the input is nested too deeply (maximum recursion depth exceeded)",
        ),
        (
            ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow.ipc"),
            1,
            "error: this needs the package pyarrow, which is not there or is another version (No "
            "module named 'pyarrow'): pip install -r requirements-dev.txt",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            1,
            "error: a process that loads data was killed, perhaps as the memory is full: try fewer "
            "--num_workers (DataLoader worker (pid 7) is killed by signal: Killed.)",
        ),
        (
            dist.DistNetworkError("The client socket has timed out"),
            1,
            "error: the processes do not reach one another (The client socket has timed out)",
        ),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: Broken pipe"),  # not of stdout
    ],
)
def test_what_is_wrong_is_the_last_line(error, status, sentence, monkeypatch, capsys):
    def main(argv):
        print("a progress bar", file=sys.stderr)
        raise error

    assert end_of(main, monkeypatch, capsys) == (status, ["a progress bar", sentence])


def test_a_script_gets_its_flags_and_may_end_well(monkeypatch, capsys):
    seen = []
    assert end_of(seen.append, monkeypatch, capsys, ["--a", "5"]) == (0, [])
    assert seen == [["--a", "5"]]


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        KeyError("x"),
        AssertionError("x"),
        RuntimeError("shapes differ"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: shapes"),
        ImportError("cannot import name 'x' from 'loop'", name="loop"),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(error, monkeypatch, capsys):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        end_of(main, monkeypatch, capsys)


def test_a_bar_is_closed_before_the_sentence(monkeypatch, capsys):
    bars = []

    def main(argv):
        bars.append(tqdm(range(9), mininterval=0))
        next(iter(bars[0]))
        raise ValueError("a is 5")

    status, lines = end_of(main, monkeypatch, capsys)
    assert status == 1
    assert lines[-1] == "error: a is 5"


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from world import one_sentence

def main(argv):
    {body}

one_sentence(main)
"""


def run_main(body, shell, **environment):
    """A script with this body under /bin/sh, its output through `shell`."""
    script = SCRIPT.format(root=str(ROOT), body=body)
    return subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" {shell}', sys.executable, script],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **environment},
    )


MANY = "[print(i, flush=i % 2 == 0) for i in range(100_000)]"


@pytest.mark.parametrize("body", [MANY, "[print(i) for i in range(3)]"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(body, unbuffered):
    ended = run_main(body, "| true", PYTHONUNBUFFERED=unbuffered)
    assert ended.stderr == ""


def test_what_a_terminal_lacks_is_shown_as_an_escape():
    ended = run_main("print('caf\u00e9 \u2028')", "", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "caf\\xe9 \\u2028\n"
    ended = run_main("raise ValueError('caf\u00e9')", "", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (1, "error: caf\\xe9\n")


def test_closed_and_full_streams_are_no_traceback():
    assert run_main("print(5)", ">&-").returncode == 0
    assert run_main("print(5); raise ValueError('x')", ">&- 2>&-").returncode == 1
    ended = run_main("print(5)", ">/dev/full")
    assert ended.returncode == 1
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "-1", "", "\u0663", "1.0"])
def test_a_broken_environment_is_named(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"environment variable {name} is "):
        World("cpu")


@pytest.mark.parametrize("values", [{"WORLD_SIZE": "4"}, {"RANK": "1"}, {"RANK": "4"}])
def test_an_environment_that_is_not_torchruns_is_refused(values, monkeypatch):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start several processes with torchrun, or unset RANK"):
        World("cpu")


class Broken:
    """A dataset of which the second row cannot be read."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise self.error
        return index


@pytest.mark.parametrize(
    "error,sentence",
    [
        (BadSample("x.jsonl, line 2: a.png: no such file"), None),
        (ValueError("a: b: c"), None),
        (FileNotFoundError(2, "No such file", "a"), "[Errno 2] No such file: 'a'"),
        (ValueError(), "ValueError"),
    ],
)
def test_of_a_loaders_worker_only_the_sentence_is_said(error, sentence, monkeypatch, capsys):
    def main(argv):
        list(DataLoader(Broken(error), num_workers=1))

    status, lines = end_of(main, monkeypatch, capsys)
    assert status == 1
    assert lines == [f"error: {sentence or error}"]


def test_a_picture_that_a_worker_cannot_read_is_named(small, tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.png").write_text("no picture")
    (root / "b.png").write_text("no picture")
    rows = [{"image": f"{name}.png", "captions": ["a red circle"]} for name in "ab"]
    for split in ("train", "val"):
        file = root / f"coco_{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data_root", root, "--num_workers", 1, "--max_steps", 1, "--out_dir", tmp_path / "o"]
    status, lines = end_of(lambda argv: run_small(small, *flags), monkeypatch, capsys)
    assert status == 1
    assert lines[-1].startswith("error: ")
    assert "coco_val.jsonl, line 1" in lines[-1]
    assert "Traceback" not in "\n".join(lines)


def test_of_several_processes_rank_0_speaks_first(monkeypatch, capsys):
    """The others wait. One that is alone with its error says it in the end."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(world.time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)

    def main(argv):
        raise ValueError("only here")

    try:
        assert end_of(main, monkeypatch, capsys) == (1, ["error: only here"])
        assert waited == [world.PATIENCE]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_only_rank_0_prints_the_help_page(flag, monkeypatch, capsys):
    seen = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert end_of(seen.append, monkeypatch, capsys, [flag]) == (0, [])
    assert seen == []
    monkeypatch.setenv("RANK", "0")
    assert end_of(seen.append, monkeypatch, capsys, [flag]) == (0, [])
    assert seen == [[flag]]


def test_exit_status_and_last_line_of_a_script(tmp_path):
    result = run_script("train.py", "--data_root", tmp_path / "nowhere", "--out_dir", tmp_path)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and str(tmp_path / "nowhere") in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 7.28 TiB for an array"),
        OverflowError("int too large to convert to float"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Storage size calculation overflowed with sizes=[1000000000000, 96]"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(error, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        world.one_sentence(main)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


# ---------------------------------------------------------------- signals and full streams
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "error,status",
    [(KeyboardInterrupt("interrupted. All is kept"), 130), (world.Stopped("SIGTERM: saved"), 143)],
)
def test_what_a_signal_ends_is_said_by_the_first_process(error, status, rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGINT)

    def main(argv):
        raise error

    try:
        said = [f"error: {error}"] if rank == "0" else []
        assert end_of(main, monkeypatch, capsys) == (status, said)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_full_stderr_ends_nothing():
    body = "from tqdm import tqdm; [print(i) for i in tqdm(range(3), mininterval=0)]"
    ended = run_main(body, "2>/dev/full")
    assert (ended.returncode, ended.stdout) == (0, "0\n1\n2\n")
    assert run_main("raise ValueError('x')", "2>/dev/full").returncode == 1


@pytest.mark.parametrize("delay", [0.0, 0.5])
@pytest.mark.parametrize("handler", [signal.SIG_DFL, lambda *_: None])
def test_nothing_stands_behind_the_last_line(monkeypatch, capsys, delay, handler):
    """What loads data has ended before the error is said, also if it has only begun: then SIGTERM
    kills it, which torch takes for an error, or meets the handler of the process that forked it.
    """
    begin = BaseProcess._bootstrap

    def begin_late(process, *arguments, **settings):
        time.sleep(delay)
        return begin(process, *arguments, **settings)

    monkeypatch.setattr(BaseProcess, "_bootstrap", begin_late)
    of_other_tests = set(multiprocessing.active_children())
    loaders = []
    previous = signal.signal(signal.SIGTERM, handler)

    def main(argv):
        loaders.append(iter(DataLoader(range(9), num_workers=2)))
        raise ValueError("a is 5")

    try:
        assert end_of(main, monkeypatch, capsys) == (1, ["error: a is 5"])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert set(multiprocessing.active_children()) <= of_other_tests


# ---------------------------------------------------------------- torchrun's variables
@pytest.mark.parametrize(
    "values,words",
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "process 5 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "process 0 of 2, without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "process none of 2, without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "process 0 of 1, without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; torchrun sets a number from 1 to"),
        ({"RANK": "9" * 30}, "RANK is '9999"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'; torchrun sets a number from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT is '-1'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
    ],
)
def test_odd_variables_are_named(values, words, monkeypatch):
    if "MASTER_PORT" in values:
        values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", **values}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        World("cpu")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error", [dist.DistNetworkError("timed out"), RuntimeError("Gloo connectFullMesh failed\nat x")]
)
def test_processes_that_do_not_meet_are_one_sentence(error, monkeypatch):
    def fail(backend):
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "far", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"do not meet at far, port 29500, .*\((timed|Gloo)"):
        World("cpu")


def test_a_process_that_cannot_be_speaks_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "5")
    assert world.is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world.is_first_process()
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert not world.is_first_process()


def test_a_compiler_that_is_missing_is_one_sentence(monkeypatch, capsys):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def main(argv):
        raise InductorError(InvalidCxxCompiler(), None)

    status, lines = end_of(main, monkeypatch, capsys)
    assert status == 1
    assert len(lines) == 1
    assert "torch.compile does not work here (InvalidCxxCompiler: No working C++ comp" in lines[0]
    assert "leave out --compile" in lines[0]
