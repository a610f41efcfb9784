"""What the demos of this folder start from, in place of downloads: small encoders with random
weights in the layouts of CLIP, RoBERTa, SigLIP and Qwen2, and conversations about the built-in
scenes.

    python runs/demo_inputs.py OUT

writes the folders OUT/clip, OUT/roberta, OUT/siglip, OUT/qwen2 and OUT/chat (pictures,
captions.json, conversations.json). An encoder of random weights knows nothing: the demos show that
the commands follow one another, not what the models can do.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import write_json  # noqa: E402
from llava_manager import LlavaManager, LlavaManagerConfig  # noqa: E402
from model import ManagerTower, ManagerTowerConfig  # noqa: E402
from scenes import demo_source, demo_tokenizer  # noqa: E402
from tokenizer import Tokenizer, train_tokenizer  # noqa: E402
from weights import to_official  # noqa: E402

CONVERSATIONS = 48
CHAT_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # Qwen2's


def save_part(state: dict[str, Tensor], prefix: str, new_prefix: str, folder: Path) -> None:
    """The tensors whose names begin with `prefix`, renamed to `new_prefix`, as a file of folder."""
    part = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            part[new_prefix + name.removeprefix(prefix)] = tensor.detach().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(part, folder / "model.safetensors")


def write_tower_encoders(out: Path) -> None:
    """CLIP in OpenAI's layout, and RoBERTa with its tokenizer, of the size of the preset `tiny`."""
    config = ManagerTowerConfig.tiny(initializer_range=0.1)
    tokenizer = demo_tokenizer(config.vocab_size)
    official = to_official(ManagerTower(config).state_dict(), config)
    save_part(official, "vit_model.visual.", "visual.", out / "clip")
    save_part(official, "text_transformer.", "", out / "roberta")
    tokenizer.save(out / "roberta")


def write_chat(out: Path) -> Tokenizer:
    """Scenes as .png files with LLaVA's JSON, and a tokenizer for their words."""
    folder = out / "chat"
    folder.mkdir(parents=True, exist_ok=True)
    texts = ["system\nYou are a helpful assistant.\nuser\nassistant\n"]
    for name, kind in (("captions", "chat_captions"), ("conversations", "chat")):
        source = demo_source(kind, "train", CONVERSATIONS)
        records = []
        for number in range(len(source)):
            row = source[number]
            picture = f"{name}_{number}.png"
            row["images"][0].save(folder / picture)
            records.append({"image": picture, "conversations": row["conversation"]})
            texts += [turn["value"] for turn in row["conversation"]]
        write_json(folder / f"{name}.json", records)
    return train_tokenizer(texts, 512, CHAT_SPECIALS)


def write_llava_encoders(out: Path, tokenizer: Tokenizer) -> None:
    """SigLIP and Qwen2 in HF's layouts, with the config.json that says their sizes."""
    config = LlavaManagerConfig.tiny(manager_type=None, vocab_size=tokenizer.vocab_size)
    official = to_official(LlavaManager(config).state_dict(), config)
    tower = "model.vision_tower.vision_tower.vision_model."
    save_part(official, tower, "vision_model.", out / "siglip")
    vision = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "intermediate_size": config.vision_mlp_width,
    }
    write_json(out / "siglip" / "config.json", vision)

    language_model = {}
    for name, tensor in official.items():
        if name.startswith(("model.embed_tokens.", "model.layers.", "model.norm.")):
            language_model[name] = tensor
    save_part(language_model, "", "", out / "qwen2")
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    write_json(out / "qwen2" / "config.json", text)
    tokenizer.save(out / "qwen2")


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        sys.exit("error: say where to write to: python runs/demo_inputs.py OUT")
    out = Path(argv[0])
    torch.manual_seed(0)
    write_tower_encoders(out)
    write_llava_encoders(out, write_chat(out))
    print(f"{out}: small random encoders and {CONVERSATIONS} conversations about the scenes")


if __name__ == "__main__":
    main(sys.argv[1:])
