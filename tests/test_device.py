"""Losses, gradients, generation and training on the best device of this machine: CUDA where there
is one, else the CPU. `bash tests/cuda.sh` runs this and more.
"""

import math

import pytest
import torch
from helpers import SMALL, close, log_rows, losses, run_script, run_small, tiny_batch

from bench import random_pairs
from llava_manager import LlavaManager, LlavaManagerConfig
from loop import RunConfig, compiles, make_optimizer
from model import ManagerTower, ManagerTowerConfig
from multigrid import ImageTiles
from objectives import Pretraining
from world import autocast

CPU = torch.device("cpu")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
only_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
# of the largest value; convolutions on CUDA take TensorFloat-32, and bfloat16 has 8 bits
TOLERANCE = {"fp32": 2e-3 if CUDA else 1e-5, "bf16": 6e-2}


def losses_and_gradients(model, batch, device, dtype, precision):
    """The sums of MLM and ITM, and all gradients in one vector, in float64 on the CPU."""
    model = model.to(device, dtype).train()
    model.zero_grad()
    inputs = {}
    for name, tensor in batch.items():
        inputs[name] = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    task = Pretraining(model, ("mlm", "itm"))
    with autocast(precision, device):
        loss = sum(task(inputs).values())
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach().cpu().double(), torch.cat(gradients).cpu().double()


# ---------------------------------------------------------------- models and losses
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["aaue", "saue", "sae"])
def test_losses_and_gradients_are_those_of_the_cpu_in_float64(kind, precision):
    torch.manual_seed(0)
    config = ManagerTowerConfig.tiny(manager_type=kind, manager_noise=False)
    model = ManagerTower(config)
    batch = random_pairs(config, 4)
    exact_loss, exact = losses_and_gradients(model, batch, CPU, torch.float64, "fp32")
    loss, gradients = losses_and_gradients(model, batch, DEVICE, torch.float32, precision)
    assert loss.item() == pytest.approx(exact_loss.item(), rel=TOLERANCE[precision])
    close(gradients, exact, 2 * TOLERANCE[precision] * exact.abs().max().item())


@pytest.mark.parametrize("kind", [None, "static", "adaptive", "adaptive_cross"])
def test_generation_chooses_the_tokens_of_the_cpu(kind):
    torch.manual_seed(1)
    config = LlavaManagerConfig.tiny(manager_type=kind, eos_ids=())
    model = LlavaManager(config).eval()
    for parameter in model.parameters():  # else the managers add nothing
        torch.nn.init.normal_(parameter, std=0.05)
    side = config.image_size
    pixels = torch.randn(5, 3, side, side)
    ids = torch.randint(3, config.vocab_size - 1, (2, 9))
    ids[:, 4] = -200  # the placeholder of an image

    def generate(device):
        tiles = ImageTiles(pixels.to(device), (2 * side, 2 * side))
        images = [tiles, tiles]
        return model.to(device).generate(ids.to(device), images=images, max_new_tokens=8).cpu()

    assert torch.equal(generate(DEVICE), generate(CPU))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_the_same_for_a_batch_and_one_by_one(precision):
    torch.manual_seed(2)
    config = ManagerTowerConfig.tiny()
    model = ManagerTower(config).eval().to(DEVICE)
    pixels, ids, mask = (tensor.to(DEVICE) for tensor in tiny_batch(config))
    with torch.no_grad(), autocast(precision, DEVICE):
        both = model(pixels, ids, mask).pooled.float()
        second = model(pixels[1:], ids[1:], mask[1:]).pooled.float()
    close(both[1:], second, TOLERANCE[precision])


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_in_each_precision_starts_from_the_same_loss(precision, small, tmp_path):
    run_small(small, "--max_steps", 6, "--precision", precision, "--out_dir", tmp_path)
    run = losses(tmp_path)
    assert len(run) == 6 and all(math.isfinite(loss) for loss in run)
    exact = tmp_path / "exact"
    flags = ["--max_steps", 6, "--precision", "fp32", "--device", "cpu", "--out_dir", exact]
    run_small(small, *flags)
    assert run[0] == pytest.approx(losses(exact)[0], rel=TOLERANCE["bf16"])


def test_the_optimizer_is_fused_and_takes_the_step_of_the_plain_one():
    def after_a_step(device, optimizer_of):
        torch.manual_seed(3)
        layer = torch.nn.Linear(5, 4).to(device)
        optimizer = optimizer_of(layer)
        layer(torch.ones(2, 5, device=device)).square().sum().backward()
        optimizer.step()
        return optimizer, layer.weight.detach().cpu()

    def ours(layer):
        groups = [{"params": list(layer.parameters()), "lr": 0.1, "weight_decay": 0.1}]
        return make_optimizer(groups, RunConfig(), next(layer.parameters()).device)

    def plain(layer):
        config = RunConfig()
        betas = (0.9, config.beta2)
        return torch.optim.AdamW(
            layer.parameters(), 0.1, betas, eps=1e-8, weight_decay=0.1, fused=False
        )

    fused, moved = after_a_step(DEVICE, ours)
    assert fused.defaults["fused"]
    close(moved, after_a_step(CPU, plain)[1], 1e-6)


@pytest.mark.slow
def test_one_process_of_torchrun_gives_the_losses_of_plain_python(tmp_path):
    """On CUDA this is NCCL."""
    flags = [*SMALL, "--max_steps", 4, "--out_dir"]
    for processes in (0, 1):
        done = run_script("train.py", *flags, tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    close(torch.tensor(losses(tmp_path / "0")), torch.tensor(losses(tmp_path / "1")), 1e-3)


def test_layers_are_compiled_as_asked_and_by_default_only_on_cuda(monkeypatch):
    assert not compiles(RunConfig(), CPU)
    assert compiles(RunConfig(compile=True), CPU)
    cuda = torch.device("cuda")
    assert not compiles(RunConfig(compile=False), cuda)
    monkeypatch.setattr("loop.find_spec", lambda name: None)
    assert not compiles(RunConfig(), cuda)
    monkeypatch.setattr("loop.find_spec", lambda name: name)
    monkeypatch.setattr("loop.shutil.which", lambda name: f"/usr/bin/{name}")
    assert compiles(RunConfig(), cuda)


@only_cuda
@pytest.mark.slow
def test_a_compiled_run_gives_the_losses_of_an_eager_one(small, tmp_path):
    flags = [*small, "--manager_noise", "false", "--precision", "fp32", "--max_steps", 6]
    for compiled in ("true", "false"):
        run_small(flags, "--compile", compiled, "--out_dir", tmp_path / compiled)
    close(torch.tensor(losses(tmp_path / "true")), torch.tensor(losses(tmp_path / "false")), 2e-2)
    assert log_rows(tmp_path / "true", "eval")
