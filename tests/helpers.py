"""What several test files need: golden numbers, small models and runs, and processes.

The environment variable MANAGER_GOLDEN points the parity tests at the full golden set.
"""

import functools
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections import OrderedDict
from pathlib import Path

# tiny models are no quicker with several threads, and forks of a process with threads may hang
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(os.environ.get("MANAGER_GOLDEN", ROOT / "tests" / "golden")).resolve()
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import multigrid  # noqa: E402
import train  # noqa: E402
from llava_manager import LlavaManager, LlavaManagerConfig  # noqa: E402
from model import ManagerTower, ManagerTowerConfig  # noqa: E402
from weights import from_official, to_official  # noqa: E402
from world import World  # noqa: E402

# ---------------------------------------------------------------- golden numbers of ManagerTower
MT = GOLDEN / "manager_tower"


SMALL_SET = GOLDEN == ROOT / "tests" / "golden"  # leaves large tensors and some cases out


HEADS = {
    "mlm": "mlm",
    "itm": "itm",
    "itc": "itc",
    "itm_itc": "itc itm",
    "irtr_itm_itc": "itc itm",
    "vqa": "vqa",
    "nlvr2": "nlvr2",
    "snli": "snli_ve",
    "irtr": "retrieval",
}


VARIANTS = [
    "main.mt_aaue_vector",
    "main.mt_saue_vector",
    "main.mt_aaue_scalar",
    "main.mt_saue_scalar",
    "main.bt",
    "main.meter",
]


def meta(name):
    return json.loads((MT / f"{name}.json").read_text())


def present(*names):
    """The golden cases that this golden set holds (the full set has them all), then the others, to
    be skipped.
    """
    found = [
        n for n in names if (MT / f"{n}.json").exists() and (MT / f"{n}.out.safetensors").exists()
    ]
    skip = pytest.mark.skip(reason="only the full golden set has this case")
    return found + [pytest.param(n, marks=skip) for n in names if n not in found]


def needs(file):
    return pytest.mark.skipif(
        not (MT / file).exists(), reason=f"only the full golden set has {file}"
    )


def golden_state(name):
    state = meta(name)["state"]
    out = {
        k: v
        for k, v in load_file(MT / state["base"]).items()
        if k not in set(state["base_keys_not_in_model"])
    }
    out.update(load_file(MT / state["delta"]) if state["delta"] else {})
    assert len(out) == state["n_keys"]
    return out


def golden_config(name):
    j = meta(name)
    c, v, t = j["config"], j["vision"], j["text"]
    heads = {h for task, on in c["loss_names"].items() if on for h in HEADS[task].split()}
    fusion = (
        "last"
        if c["meter_fusion"]
        else {"MT": "manager", "BT": "bridge", "METER": "last"}[j["model_type"]]
    )
    return ManagerTowerConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        vision_width=v["width"],
        vision_layers=v["layers"],
        vision_heads=v["heads"],
        vocab_size=t["vocab"],
        max_positions=t["max_pos"],
        text_width=t["hidden"],
        text_layers=t["layers"],
        text_heads=t["heads"],
        text_mlp_width=t["intermediate"],
        hidden_size=c["hidden_size"],
        num_layers=c["num_layers"],
        num_heads=c["num_heads"],
        contrastive_size=c["contrastive_hidden_size"],
        fusion=fusion,
        manager_type=c["manager_type"].lower(),
        manager_weight=c["manager_weight_type"],
        managed_layers_text=c["managed_layers_text"],
        managed_layers_image=c["managed_layers_image"],
        heads=tuple(sorted(heads)),
        num_answers=c["vqav2_label_size"],
        head_hidden_scale=c["head_hidden_scale"],
        max_text_len=c["max_text_len"],
    )


def golden_model(name):
    config = golden_config(name)
    model = ManagerTower(config)
    model.load_state_dict(from_official(golden_state(name), config), strict=True, assign=True)
    return model.eval()


def golden(name):
    return load_file(MT / f"{name.split('.')[0]}.inputs.safetensors"), load_file(
        MT / f"{name}.out.safetensors"
    )


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def compare(ours, out, atol, rtol=0):
    """Each value against the golden number of its name. Only the small set may lack some."""
    stored = ours.keys() & out.keys()
    assert stored and (SMALL_SET or stored == ours.keys())
    for key in stored:
        torch.testing.assert_close(ours[key], out[key], atol=atol, rtol=rtol)


def check_gradients(model, out, prefix, atol=2e-5):
    """Every stored gradient, under its official name; `NAME[:k]` holds the first k rows."""
    ours = to_official(
        {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, model.config
    )
    stored = [k for k in out if k.startswith(prefix)]
    assert stored
    for key in stored:
        name, _, rows = key.removeprefix(prefix).partition("[:")
        grad = ours[name][: int(rows[:-1])] if rows else ours[name]
        close(grad, out[key], max(atol, 1e-4 * out[key].abs().max().item()))


def tiny_batch(config, seed=0):
    """Two images and two captions; the second caption is half padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (2, config.max_text_len), generator=g)
    ids[1, config.max_text_len // 2 :] = config.pad_token_id
    pixels = torch.randn(2, 3, config.image_size, config.image_size, generator=g)
    return pixels, ids, (ids != config.pad_token_id).long()


# ---------------------------------------------------- golden numbers of LLaVA-OV-Manager
LOV = GOLDEN / "llava_ov_manager"


LLAVA_TINY = LOV / "tiny"


LLAVA_VARIANTS = sorted(path.stem[7:] for path in LLAVA_TINY.glob("config_*.json"))


@functools.cache
def read_llava(name):
    path = LOV / name
    return json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def llava_config(variant, case=None):
    official = read_llava(f"tiny/config_{variant}.json")
    overrides = read_llava("tiny/cases.json")["cases"][case]["config"] if case else {}
    return LlavaManagerConfig.from_official(
        {**official, **overrides}, official["tiny_vision_config"], im_start_id=318
    )


def llava_state(variant):
    kind = read_llava(f"tiny/config_{variant}.json").get("mm_manager_type")
    return {
        **read_llava("tiny/weights_base.safetensors"),
        **(read_llava(f"tiny/weights_{kind}.safetensors") if kind else {}),
    }


def llava_golden_model(variant, case):
    config = llava_config(variant, case)
    model = LlavaManager(config)
    model.load_state_dict(from_official(llava_state(variant), config))
    return model.eval()


def llava_image(name):
    return Image.fromarray(read_llava("tiny/images.safetensors")[f"image/{name}"].numpy())


def llava_inputs(case, config):
    """input_ids, attention_mask, images and labels; text-only rows have no image here, a dummy in
    the official code.
    """
    names = [
        name for name in read_llava("tiny/cases.json")["cases"][case]["images"] if name != "dummy"
    ]
    images = [
        multigrid.preprocess_image(llava_image(name), config, multi_image="multiimg" in case)
        for name in names
    ]
    tensors = read_llava("tiny/features.safetensors")
    return {
        "input_ids": tensors[f"{case}/input_ids"],
        "attention_mask": tensors.get(f"{case}/attention_mask"),
        "images": images,
        "labels": tensors[f"{case}/labels"],
    }


# ---------------------------------------------------------------- small runs and processes
SMALL = (
    "--image_size 16 --patch_size 8 --vision_width 16 --vision_layers 2 --vision_heads 2 "
    "--text_width 16 "
    "--text_layers 2 --text_heads 2 --text_mlp_width 32 --hidden_size 16 --num_heads 2 "
    "--num_layers 2 "
    "--managed_layers_text 2 --managed_layers_image 2 --batch_size 8 --micro_batch_size 8 "
    "--eval_size 8 "
    "--log_every 1 --eval_every 0 --num_workers 0"
).split()


def log_rows(out_dir, key):
    return [
        r
        for r in map(json.loads, (Path(out_dir) / "log.jsonl").read_text().splitlines())
        if key in r
    ]


def losses(out_dir):
    return [row["loss"] for row in log_rows(out_dir, "loss")]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank, port, size=2):
    """This process among `size`."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    return World("cpu")


def run_script(script, *flags, processes=0, **settings):
    """Run a script as a user does, under torchrun if `processes` is given. Returns the completed
    process.
    """
    command = [sys.executable]
    if processes:
        command += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    command += [str(ROOT / script), *[str(flag) for flag in flags]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, **settings
    )


def run_small(small, *flags):
    train.main([str(flag) for flag in (*small, *flags)])


# ---------------------------------------------------------------- checkpoints of random tiny models
TOWER_HEADS = {
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "snli_ve": ("snli_ve",),
    "retrieval": ("itm", "itc"),
    "itm": ("mlm", "itm"),
}


def save_tiny_towers(root):
    """Folders root/NAME of TOWER_HEADS, and root/pictures with nine scenes. Returns root."""
    import scenes
    from weights import save_model

    tokenizer = scenes.demo_tokenizer()
    for name, heads in TOWER_HEADS.items():
        torch.manual_seed(0)
        config = ManagerTowerConfig.tiny(
            heads=heads,
            vocab_size=tokenizer.vocab_size,
            pad_token_id=tokenizer.pad_id,
            max_text_len=16,
            image_size=32,
            num_answers=len(scenes.DEMO_ANSWERS),
            patch_size=8,
            vision_width=32,
            vision_heads=2,
            text_width=32,
            text_heads=2,
            text_mlp_width=64,
            hidden_size=32,
            num_heads=2,
            num_layers=3,
            contrastive_size=16,
        )
        model = ManagerTower(config)
        with torch.no_grad():
            for parameter in model.parameters():  # so that outputs differ from sample to sample
                parameter += 0.2 * torch.randn_like(parameter)
        save_model(model, root / name)
        tokenizer.save(root / name)
        (root / name / "answers.json").write_text(json.dumps(scenes.DEMO_ANSWERS))
    (root / "pictures").mkdir()
    source = scenes.demo_source("captions", "heldout", 9)
    for i in range(9):
        source.images(i)[0].save(root / "pictures" / f"{i}.png")
    return root


# the MLLM that trains in a second
TINY_MLLM = {
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 16,
    "vision_layers": 3,
    "vision_heads": 2,
    "vision_mlp_width": 32,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_width": 32,
    "managed_layers": (1, 2),
    "inject_layers": (0, 1),
    "max_length": 120,
}


def save_tiny_mllms(root):
    """Folders root/static and root/adaptive_last, and a picture root/a.png. Returns root."""
    import tokenizers

    import scenes
    from tokenizer import Tokenizer
    from weights import save_model

    backend = scenes.demo_tokenizer().backend
    chat_tokens = ("<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in chat_tokens])
    tokenizer = Tokenizer(backend)
    for manager_type in ("static", "adaptive_last"):
        torch.manual_seed(0)
        config = LlavaManagerConfig.tiny(
            manager_type=manager_type,
            vocab_size=tokenizer.vocab_size,
            eos_ids=(),
            im_start_id=backend.token_to_id("<|im_start|>"),
        )
        model = LlavaManager(config)
        for manager in model.managers:
            torch.nn.init.normal_(manager.scores if hasattr(manager, "scores") else manager.gate)
        save_model(model, root / manager_type)
        tokenizer.save(root / manager_type)
    scenes.demo_source("captions", "heldout", 1).images(0)[0].save(root / "a.png")
    return root


def people(*counts):
    """The answers of VQA's annotators from (answer, count) pairs."""
    return [{"answer": answer} for answer, count in counts for _ in range(count)]


# ---------------------------------------------------------------- data on disk
def picture(number, size=(20, 16)):
    """An RGB picture of noise, (width, height)."""
    width, height = size
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image, file_format, **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(number=0):
    return encoded(picture(number), "png")


def write_records(path, records):
    """A manifest: JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_arrow(path, columns):
    """An .arrow file in chunks of two rows; skips the test without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink:
        with pyarrow.RecordBatchFileWriter(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def hf_configs():
    transformers = pytest.importorskip("transformers")
    text = transformers.Qwen2Config(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        image_size=32,
        num_attention_heads=2,
        patch_size=8,
    )
    return text, vision


# columns of an .arrow file of questions
QUESTIONS = {
    "image": [png(0), png(1)],
    "questions": [["what?", "who?"], ["why?"]],
    "question_id": [[11, 12], [13]],
    "image_id": [5, 6],
}
ANSWERS = {
    "answers": [[["net", "yes"], ["no"]], [["yes"]]],
    "answer_labels": [[[2, 0], [1]], [[0]]],
    "answer_scores": [[[1.0, 0.3], [0.6]], [[0.9]]],
}


# ---------------------------------------------------------------- PyTorch's files
class Foreign(dict):
    """A class that the reader lacks: instances have a state, items, and a call of Lightning's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.where = "here"


class ForeignList(list):
    pass


def lightning_checkpoint(path, state, settings, extra=None):
    content = {
        "epoch": 3,
        "state_dict": OrderedDict(state),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "callbacks": {Foreign: Foreign(best=torch.ones(2))},
        "list": ForeignList([1, 2]),
        "set": {1, 2},
        "range": range(3),
        "numpy": np.float64(1.5),
        "path": Path("/x"),
        "hyper_parameters": Foreign(config=Foreign(settings)),
        "extra": extra,
    }
    torch.save(content, path)


# ---------------------------------------------------------------- forks instead of new interpreters
def run_in_forks(work, *arguments, processes):
    """work(rank, *arguments) in so many forks of this process, which have imported everything.

    A new interpreter takes longer to import torch than the work itself takes.
    """
    # every optimizer and DDP import it: here once, and not in each fork
    importlib.import_module("torch._dynamo")
    torch.multiprocessing.start_processes(work, arguments, processes, start_method="fork")


def fork_script(script, flags, *, out, err, environment=None, prepare=None):
    """Do in a fork of this process what `python SCRIPT FLAGS` does, and return the fork's id.

    out, err: open files that get what it prints. environment: all of its environment variables.
    prepare: called in the fork at first.
    """
    importlib.import_module("torch._dynamo")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        if prepare is not None:
            prepare()
        sys.argv = [str(script), *[str(flag) for flag in flags]]
        sys.path.insert(0, str(Path(script).resolve().parent))
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(child):
    """Wait for the end of a fork; its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_script_in_fork(script, *flags, prepare=None):
    """As run_script, in a fork. Each script should be run by run_script too, in some test."""
    with tempfile.TemporaryFile("a+") as out, tempfile.TemporaryFile("a+") as err:
        child = fork_script(ROOT / script, flags, out=out, err=err, prepare=prepare)
        status = status_of(child)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([script, *flags], status, out.read(), err.read())
