"""A manager in a model of your own: here around the layers of a text encoder of transformers.

    python runs/manager_in_your_model.py                  # some seconds on a CPU, no download

manager.py imports torch only, so that one file is all that you have to copy. Three lines put it to
work: stack the last N hidden states, standardise them, and let the manager aggregate them
(ManagerTower, ACL 2023, section 3).

Where there are two streams, as in ManagerTower, an AdaptiveManager finds the weights for each token
by itself. It reads what the layers before it have made of both streams:

    manager = AdaptiveManager(width, num_experts)
    text = manager(standardize(text_experts), previous=text, query=image)

Shapes: B batch, N experts (managed layers), L tokens, D width.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from manager import StaticManager, standardize  # noqa: E402

try:
    from transformers import RobertaConfig, RobertaModel
except ImportError:
    sys.exit("error: this example needs transformers: pip install -r requirements-dev.txt")

WIDTH = 64
LENGTH = 8
VOCABULARY = 40
CLASSES = 4


class ManagedClassifier(nn.Module):
    """A text encoder whose last N layers are aggregated by a manager, and a linear head."""

    def __init__(self, encoder: RobertaModel, num_experts: int, classes: int):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        # "scalar" is one weight for each layer; "vector", the default, is one for each channel
        self.manager = StaticManager(width, num_experts, weight="scalar")
        self.head = nn.Linear(width, classes)

    def experts(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> the standardised outputs of the last N layers, (B, N, L, D)."""
        hidden_states = self.encoder(ids, output_hidden_states=True).hidden_states
        stack = torch.stack(hidden_states[-self.manager.num_experts :], dim=1)  # (B, N, L, D)
        return standardize(stack)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> logits (B, classes)."""
        merged = self.manager(self.experts(ids))  # (B, L, D); without training the mean of the N
        return self.head(merged[:, 0])


def make_model(num_experts: int = 6) -> ManagedClassifier:
    """A small random encoder of six layers. With a pre-trained one, only this function changes."""
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH + 2,
        initializer_range=0.2,  # so that the layers of a random encoder differ
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ManagedClassifier(RobertaModel(config, add_pooling_layer=False), num_experts, CLASSES)
    # The encoder stays as it is: only the manager and the head learn. Without this line all do.
    model.encoder.requires_grad_(False)
    return model


def toy_batch(generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Random token ids (B, L), and the class of each row (B,), which its first token decides.

    The lowest layer of a random encoder still shows that token best: watch its weight grow.
    """
    ids = torch.randint(
        2, VOCABULARY, (rows, LENGTH), generator=generator
    )  # 1 is RoBERTa's padding
    return ids, ids[:, 0] % CLASSES


@torch.no_grad()
def layer_weights(model: ManagedClassifier) -> list[float]:
    """The learnt weight of each layer, from the first to the last; their sum is 1."""
    model.eval()  # in training mode there is noise on the scores
    ids, _ = toy_batch(torch.Generator().manual_seed(1), rows=1)
    weights = model.manager.weights(model.experts(ids))  # (B, N, L, 1)
    return weights.mean(dim=(0, 2, 3)).tolist()


def train(model: ManagedClassifier, steps: int = 120) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    model.train()
    for _ in range(steps):
        ids, labels = toy_batch(generator)
        loss = F.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show_weights(when: str, weights: list[float]) -> None:
    cells = [f"{weight:.3f}" for weight in weights]
    print(f"weights of layers 1 to {len(weights)}, {when}: {' '.join(cells)}")


def main() -> None:
    torch.manual_seed(0)
    model = make_model()
    show_weights("before", layer_weights(model))
    losses = train(model)
    for step in range(0, len(losses), 30):
        print(f"step {step:3d}: loss {losses[step]:.3f}")
    print(f"step {len(losses) - 1:3d}: loss {losses[-1]:.3f}")
    show_weights("after", layer_weights(model))


if __name__ == "__main__":
    main()
