"""llava_manager.py"""
from dataclasses import dataclass
from functools import partial
from torch import Tensor
from torch import nn
from torch.nn import functional as F
from typing import NamedTuple
import math
import re
import torch
from chat import IGNORE, IMAGE_TOKEN
from fields import check_fields, option
from manager import AdaptiveVisualManager, StaticVisualManager, weighted_sum
from model import ViT, ViTBlock, init_weights, run
from chat import encode_chat, encode_prompt  # noqa: F401  (public here, see design)
from multigrid import ImageTiles, count_image_tokens, expand_pinpoints, merge_grids, preprocess_image, select_best_resolution  # noqa: F401


OFFICIAL_FIELDS = {"vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
                   "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads",
                   "mlp_width": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta"}


VISION_FIELDS = {"image_size": "image_size", "patch_size": "patch_size", "vision_width": "hidden_size",
                 "vision_layers": "num_hidden_layers", "vision_heads": "num_attention_heads",
                 "vision_mlp_width": "intermediate_size"}


OPTIONAL_FIELDS = {"max_length": "tokenizer_model_max_length", "grid_pinpoints": "image_grid_pinpoints",
                   "aspect": "image_aspect_ratio", "merge": "mm_patch_merge_type",
                   "tie_embeddings": "tie_word_embeddings"}


SUPPORTED = {"rope_scaling": None, "use_sliding_window": False, "hidden_act": "silu", "mm_projector_type": "mlp2x_gelu",
             "mm_manager_residual": True}


@dataclass
class LlavaManagerConfig:
    """The architecture; the defaults are the paper's: SigLIP-so400m-384, Qwen2-0.5B-Instruct, static managers."""
    # vision: SigLIP, whose last layer is not used (nor built): hidden states 0 .. vision_layers - 1 exist
    image_size: int = option(384, "image size", least=1)
    patch_size: int = option(14, "patch size", least=1)
    vision_width: int = option(1152, "vision width", least=1)
    vision_layers: int = option(27, "vision layers", least=1)
    vision_heads: int = option(16, "vision heads", least=1)
    vision_mlp_width: int = option(4304, "vision mlp width", least=1)
    # language: Qwen2
    vocab_size: int = option(151936, "vocab size", least=1)
    hidden_size: int = option(896, "hidden size", least=1)
    num_layers: int = option(24, "num layers", least=1)
    num_heads: int = option(14, "num heads", least=1)
    num_kv_heads: int = option(2, "num kv heads", least=1)
    mlp_width: int = option(4864, "mlp width", least=1)
    norm_eps: float = option(1e-6, "norm eps", above=0)
    rope_theta: float = option(1e6, "rope theta", above=0)
    tie_embeddings: bool = option(True, "False in the 7B model")
    initializer_range: float = option(0.02, "standard deviation of new matrices, Qwen2's", least=0)
    max_length: int = option(16384, "sequences are cut here after splicing", least=1)
    im_start_id: int = option(151644, "<|im_start|>: adaptive managers find the text query by it", least=0, flag=False)
    eos_ids: tuple[int, ...] = option((151645,), "generation stops at any of them", least=0, flag=False)
    # managers
    manager_type: str | None = option("static", "None | static | adaptive | adaptive_last | adaptive_average | adaptive_cross", choices=("static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross"))
    managed_layers: tuple[int, ...] = option(tuple(range(13, 26)), "hidden states of SigLIP", least=0)
    inject_layers: tuple[int, ...] = option(tuple(range(0, 24, 4)), "LLM layers with a manager before them", least=0)
    managed_grids: str = option("all", "all | base | grids: the tokens that are managed; an image of one tile always is", choices=("all", "base", "grids"))
    # images
    aspect: str = option("anyres_max_9", "square | pad | anyres | anyres_max_K: at most about K tiles' worth of tokens")
    grid_pinpoints: tuple | str = option("(1x1),...,(6x6)", "(width, height) in pixels, or a range of them in tiles")
    merge: str = option("spatial_unpad", "spatial_unpad | flat", choices=("spatial_unpad", "flat"))

    @classmethod
    def base(cls, **overrides) -> "LlavaManagerConfig":
        return cls(**overrides)

    @classmethod
    def tiny(cls, **overrides) -> "LlavaManagerConfig":
        """For the built-in demo data: a 64 x 64 scene is a base tile and a grid of 2 x 2."""
        return cls(**{"image_size": 32, "patch_size": 8, "vision_width": 96, "vision_layers": 4, "vision_heads": 3,
                      "vision_mlp_width": 384, "vocab_size": 320, "hidden_size": 96, "num_layers": 4, "num_heads": 4,
                      "num_kv_heads": 2, "mlp_width": 256, "max_length": 512, "im_start_id": 1, "eos_ids": (2,),
                      "managed_layers": (1, 2), "inject_layers": (0, 2), "aspect": "anyres_max_4",
                      "grid_pinpoints": "(1x1),...,(2x2)", **overrides})

    @classmethod
    def from_official(cls, config: dict, vision: dict | None = None, im_start_id: int = 151644) -> "LlavaManagerConfig":
        """The published config.json of LLaVA-OV-Manager or LLaVA-OneVision -> ours; unknown keys are ignored.
        vision: a HF SigLIP (vision) config; SigLIP-so400m-patch14-384 when not given. Raises ValueError."""
        vision = vision and vision.get("vision_config", vision)
        kind, eos, grids = (config.get(k) for k in ("mm_manager_type", "eos_token_id", "mm_manager_grid_type"))
        names = (("managed_layers", "vision_select_layers"), ("inject_layers", "injection")) if kind else ()
        spans = {k: [f"mm_manager_{name}_{x}" for x in ("start", "end", "interval")] for k, name in names}
        missing = [k for k in [*OFFICIAL_FIELDS.values(), *sum(spans.values(), [])] if k not in config]
        missing += [f"vision {k}" for k in VISION_FIELDS.values() if vision and k not in vision]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        for key, value in SUPPORTED.items():
            if config.get(key, value) != value:
                raise ValueError(f"the config's {key} is {config[key]!r}; only {value!r} is supported")
        values = {ours: config[theirs] for ours, theirs in OFFICIAL_FIELDS.items()}
        values |= {ours: vision[theirs] for ours, theirs in VISION_FIELDS.items() if vision}
        values |= {ours: tuple(range(*(config[k] for k in keys))) for ours, keys in spans.items()}
        values |= {"aspect": "square", "merge": "flat", "tie_embeddings": False, "im_start_id": im_start_id}
        values |= {ours: config[theirs] for ours, theirs in OPTIONAL_FIELDS.items() if config.get(theirs)}
        return cls(**values, eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else eos,
                   manager_type=kind and kind.removesuffix("_zerouni"),
                   managed_grids={None: "all", "main": "base", "grid": "grids"}.get(grids, grids))

    def __post_init__(self):
        for name in ("managed_layers", "inject_layers", "eos_ids"):
            setattr(self, name, tuple(getattr(self, name)))
        self.grid_pinpoints = expand_pinpoints(self.grid_pinpoints, self.image_size)
        check_fields(self)
        if not re.fullmatch(r"square|pad|anyres|anyres_max_[1-9]\d*", self.aspect):
            raise ValueError(f"aspect is {self.aspect!r}; it must be square, pad, anyres or anyres_max_K")
        for width, heads in (("vision_width", "vision_heads"), ("hidden_size", "num_heads"),
                             ("num_heads", "num_kv_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        ends = {"managed_layers": self.vision_layers, "inject_layers": self.num_layers} if self.manager_type else {}
        for name, end in ends.items():
            layers = getattr(self, name)
            if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < end:
                raise ValueError(f"{name} is {layers}; it must be ascending numbers from 0 to {end - 1}")
        if ends and self.inject_layers[0] == 0 and len(self.managed_layers) < 2:
            raise ValueError("a manager at LLM layer 0 drops the last managed layer, so it needs at least two of them")

    @staticmethod
    def check_flags(flags: dict) -> None:
        """Raises ValueError for flags of managers where there are none."""
        if flags.get("manager_type", "static") is not None:
            return
        for name in flags:
            if name in ("managed_layers", "inject_layers", "managed_grids"):
                raise ValueError(f"--{name} means nothing with --manager_type none: no managers")

    def is_static(self, layer: int) -> bool:
        """Whether this LLM layer's manager is static; before layer 0, where the image has not met the text, all are."""
        return self.manager_type == "static" or layer == 0

    @property
    def side(self) -> int:
        """Patches along the side of a tile."""
        return self.image_size // self.patch_size


class Splice(NamedTuple):
    """Index tensors of a batch. A flat position is one in (B * S); image tokens are numbered through the batch."""
    index: Tensor  # (B, S): the source of each position: first the tokens of input_ids, then image tokens, then padding
    lengths: Tensor  # (B,): of each spliced row, without padding, before truncation
    image_rows: Tensor  # (I,): the row of each image
    managed: Tensor  # (M,): the image tokens that managers act on, none of them beyond the truncation
    positions: Tensor  # (M,): their flat positions
    query: Tensor  # (Q,): flat positions of the query tokens of the adaptive managers
    query_mask: Tensor  # (1, M, Q): which of them a managed token sees

    def labels(self, labels: Tensor) -> Tensor:
        """labels (B, L) of input_ids -> (B, S) of the spliced rows; -100 for image tokens and padding."""
        flat = F.pad(labels.to(self.index.device).long().flatten(), (0, 1), value=IGNORE)
        return flat[self.index.clamp(max=labels.numel())]


def plan_splice(input_ids: Tensor, attention_mask: Tensor | None, images, config: LlavaManagerConfig,
                device="cpu") -> Splice:
    """Each placeholder of input_ids (B, L) makes room for its image's tokens; padding, on either side, goes; rows are
    cut at max_length and padded on the right. Computed on the CPU, without a loop over rows or tokens."""
    ids = input_ids.cpu().long()
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    is_image = (ids == IMAGE_TOKEN) & real
    check_inputs(ids, real, is_image, images, config)
    counts = torch.tensor([count_image_tokens(len(x.pixels), x.size, config) for x in images], dtype=torch.long)
    lengths = real.long()  # how many tokens each token of input_ids becomes
    lengths[is_image] = counts
    ends, totals = lengths.cumsum(1), lengths.sum(1)
    S = min(int(totals.max()), config.max_length)
    # of each spliced token: its source in input_ids, its row, its number in the source, its position in the row
    source = torch.repeat_interleave(torch.arange(ids.numel()), lengths.flatten())
    row = source // ids.shape[1]
    offset = torch.arange(len(source)) - (lengths.flatten().cumsum(0) - lengths.flatten())[source]
    position = (ends - lengths).flatten()[source] + offset
    keep, of_image = position < S, is_image.flatten()[source]
    index = torch.full((len(ids), S), ids.numel() + int(counts.sum()))
    index[row[keep], position[keep]] = torch.where(of_image, ids.numel() - 1 + of_image.cumsum(0), source)[keep]
    image = torch.repeat_interleave(torch.arange(len(counts)), counts)
    alone = (counts == config.side**2)[image]  # the only tile of its image
    in_base = offset[of_image] < config.side**2
    acts = {"all": alone | True, "base": alone | in_base, "grids": alone | ~in_base}[config.managed_grids]
    managed = torch.nonzero(acts & keep[of_image])[:, 0]
    positions = (row * S + position)[of_image][managed]
    query = managed[:0], managed[:0]
    if str(config.manager_type).startswith("adaptive_"):
        im_start = (ids == config.im_start_id) & real
        query = plan_query(im_start, is_image, ends - lengths, ends, S, positions, image[managed])
    plan = index, totals, torch.nonzero(is_image)[:, 0], managed, positions, *query
    return Splice(*(x.to(device) for x in plan))


def check_inputs(ids: Tensor, real: Tensor, is_image: Tensor, images, config: LlavaManagerConfig):
    if ids.dim() != 2 or real.shape != ids.shape or not real.any(1).all():
        raise ValueError(f"input_ids {tuple(ids.shape)}, attention_mask {tuple(real.shape)}: not (B, L), or empty row")
    if int(is_image.sum()) != len(images):
        raise ValueError(f"{int(is_image.sum())} placeholders ({IMAGE_TOKEN}) in input_ids, but {len(images)} images")
    bad = ids[real & ~is_image & ((ids < 0) | (ids >= config.vocab_size))]
    if len(bad):
        raise ValueError(f"token id {int(bad[0])} is outside the vocabulary of {config.vocab_size}")
    shape = (3, config.image_size, config.image_size)
    for i, image in enumerate(images):
        if image.pixels.dim() != 4 or image.pixels.shape[1:] != shape:
            raise ValueError(f"image {i} has pixels {tuple(image.pixels.shape)}; should be (T, {str(shape)[1:]}")


def plan_query(im_start: Tensor, is_image: Tensor, starts: Tensor, ends: Tensor, S: int, positions: Tensor,
               image: Tensor) -> tuple[Tensor, Tensor]:
    """The query of the adaptive managers: the text of the first user turn, less the image and a newline beside it. With
    several images only the text after the last one counts. Without a second <|im_start|> ("plain") it is what follows
    the image, less the last newline. An image with an empty query is its own query.
    (B, L): which tokens are <|im_start|>, which are images, where each one starts and ends after splicing. positions,
    image (M,): flat position and image of each managed token. Returns `Splice.query` and `Splice.query_mask`."""
    order, total, far = im_start.cumsum(1), ends[:, -1:], int(ends.max())
    second, third = (starts.masked_fill(~(im_start & (order == k)), far).amin(1, keepdim=True) for k in (2, 3))
    first_image = starts.masked_fill(~is_image, far).amin(1, keepdim=True)
    last_end = ends.masked_fill(~is_image, 0).amax(1, keepdim=True)
    chat, at = order[:, -1:] >= 2, torch.arange(S)
    stop = torch.where(chat, torch.minimum(third, total) - 2, total - 1)  # chat: where the user's <|im_end|> is
    after = (at >= last_end + chat.long()) & (at < stop)
    before = chat & (is_image.sum(1, keepdim=True) == 1) & (at >= second + 3) & (at < first_image - 1)
    is_query = (after | before) & is_image.any(1, keepdim=True)  # (B, S)
    row, text = positions // S, torch.nonzero(is_query.flatten())[:, 0]
    own = ~is_query.any(1)[row]
    # a token sees the queries of its group: its row's (numbered -1, -2, ...), or its image's
    group = torch.where(own, image, -1 - row)
    return torch.cat([text, positions[own]]), (group[:, None] == torch.cat([-1 - text // S, image[own]]))[None]


class KVCache:
    """Keys and values of all layers, allocated once for `capacity` positions. Position p of a row is slot p: prompts of
    different length are padded on the right, and new tokens overwrite padding, so a row does not notice the others."""

    def __init__(self, capacity: int, slots: Tensor):
        self.capacity, self.store, self.mask = capacity, {}, None
        self.slots, self.end = slots, slots.shape[1]  # slots (B, S) of the tokens that are being computed

    def advance(self, slots: Tensor):
        """Go on with one token a row, at slots (B, 1), which sees the slots up to its own."""
        self.slots, self.end = slots, self.end + 1
        self.mask = (torch.arange(self.end, device=slots.device) <= slots)[:, None, None]  # (B, 1, 1, end)

    def append(self, layer: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """k, v (B, H_kv, S, d) of the new tokens -> those of all tokens so far."""
        if layer not in self.store:
            self.store[layer] = [x.new_zeros(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v)]
        slots = self.slots[:, None, :, None].expand_as(k)
        return [store.scatter_(2, slots, x)[:, :, : self.end] for store, x in zip(self.store[layer], (k, v))]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half form: x (B, H, S, d), cos and sin (B or 1, 1, S, d)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class DecoderLayer(nn.Module):
    def __init__(self, config: LlavaManagerConfig, number: int):
        super().__init__()
        width, self.number, self.head_size = config.hidden_size, number, config.hidden_size // config.num_heads
        self.norm_1 = nn.RMSNorm(width, config.norm_eps)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * config.num_kv_heads * self.head_size)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm_2 = nn.RMSNorm(width, config.norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D). Rows are padded on the right only, so the causal mask alone hides the padding."""
        normed = self.norm_1(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
                   for y in (self.q(normed), *self.kv(normed).chunk(2, dim=-1)))  # (B, H or H_kv, S, d)
        q, k, mask = rotate(q, cos, sin), rotate(k, cos, sin), None
        if cache is not None:
            (k, v), mask = cache.append(self.number, k, v), cache.mask
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Qwen2(nn.Module):
    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, inject=None, cache: KVCache | None = None, states: list | None = None) -> Tensor:
        """Embeddings (B, S, D) -> hidden states after the last norm. inject(i, x) -> x acts before layer i; what each
        layer then gets is appended to `states`."""
        positions = torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.slots
        d = self.config.hidden_size // self.config.num_heads
        frequencies = self.config.rope_theta ** (-torch.arange(0, d, 2, device=x.device) / d)
        angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)  # (B or 1, 1, S, d)
        cos, sin = angles.cos(), angles.sin()
        for i, layer in enumerate(self.layers):
            x = x if inject is None else inject(i, x)
            if states is not None:
                states.append(x)
            x = run(layer, self.checkpointing, x, cos, sin, cache)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """logits (B, V) -> token ids (B,): the likeliest for temperature 0, else drawn from the fewest that reach top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    values, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0)
    return order.gather(1, torch.multinomial(values, 1, generator=generator))[:, 0]


class Output(NamedTuple):
    loss: Tensor | None  # mean over the label tokens of the batch; their sum is loss * num_tokens
    logits: Tensor | None  # (B, S, V)
    num_tokens: Tensor | None = None  # (): how many tokens have a loss
    hidden_states: list[Tensor] | None = None  # the input of each LLM layer, then the last hidden state: (B, S, D)


class LlavaManager(nn.Module):
    """LLaVA-OneVision with visual managers. input_ids (B, L) hold one placeholder -200 for each image; images is a flat
    list, in the order of the placeholders, of what preprocess_image returns. Outputs are in spliced positions, padded
    on the right. Any integer dtype will do."""

    blocks_to_compile = (ViTBlock, DecoderLayer)

    def __init__(self, config: LlavaManagerConfig):
        super().__init__()
        self.config = c = config
        D, N = c.hidden_size, len(c.managed_layers)
        self.vision = ViT(c.image_size, c.patch_size, c.vision_width, c.vision_layers - 1, c.vision_heads,
                          c.vision_mlp_width, siglip=True)
        self.vision.ln_post.requires_grad_(False)  # in the official checkpoints, but not used
        self.llm = Qwen2(c)
        init = partial(init_weights, std=c.initializer_range)
        self.apply(init)
        self.projector = nn.Sequential(nn.Linear(c.vision_width, D), nn.GELU(), nn.Linear(D, D))
        self.image_newline = nn.Parameter(torch.randn(D) / math.sqrt(D))
        self.managers = nn.ModuleList()
        if c.manager_type is not None:
            self.layer_embedding = nn.Parameter(torch.randn(N, D) / math.sqrt(D))
            query = c.manager_type.partition("_")[2] or None
            for layer in c.inject_layers:
                # before layer 0 without the last one, which, says the paper, the LLM's input holds already
                static = c.is_static(layer)
                manager = StaticVisualManager(D, N - (layer == 0)) if static else AdaptiveVisualManager(D, N, query)
                self.managers.append(manager.apply(init))

    def set_checkpointing(self, on: bool):
        """Activation checkpointing of SigLIP's blocks, the projector and the LLM's layers."""
        self.vision.checkpointing = self.llm.checkpointing = on

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, images=(), labels: Tensor | None = None,
                logits: bool = True, hidden_states: bool = False) -> Output:
        """input_ids, attention_mask, labels (B, L) -> Output. labels: input_ids, or -100 where there is no loss; the
        logits of a position predict the next one. The loss does not need logits=True, and False saves their memory."""
        plan = plan_splice(input_ids, attention_mask, images, self.config, self.image_newline.device)
        embeddings, inject = self.embed(input_ids, images, plan)
        states, loss, num_tokens = [] if hidden_states else None, None, None
        hidden = self.llm(embeddings, inject, states=states)
        if labels is not None:
            total, num_tokens = self.loss_sum(hidden, plan.labels(labels))
            loss = total / num_tokens.clamp(min=1)
        return Output(loss, self.llm.logits(hidden) if logits else None, num_tokens,
                      [*states, hidden] if hidden_states else None)

    def embed(self, input_ids: Tensor, images, plan: Splice) -> tuple:
        """The LLM's input (B, S, D), and what it calls before each layer."""
        text = self.llm.embed(input_ids.to(self.image_newline.device).long().flatten().clamp(min=0))
        parts, inject = [text, text.new_zeros(1, text.shape[1])], None
        if len(images):
            tokens, increments, experts = self.encode_images(images, plan)
            parts.insert(1, tokens.to(text.dtype))
            inject = partial(self.inject, plan=plan, increments=increments, experts=experts)
        embeddings = torch.cat(parts)[plan.index]
        return embeddings + self.unused(len(images)) if self.training else embeddings, inject

    def unused(self, num_images: int) -> Tensor:
        """0, with a gradient path to the parameters that a batch without images or without grids leaves out: DDP waits
        for every parameter in every step."""
        named = self.named_parameters() if num_images == 0 else [("image_newline", self.image_newline)]
        return 0 * sum(p.flatten()[0] for name, p in named if p.requires_grad and not name.startswith("llm."))

    def encode_images(self, images, plan: Splice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All tiles of the batch in one pass. Returns the LLM's input for all image tokens (L, D); and for the managed
        ones what each static manager adds (K, M, D), and the adaptive managers' experts (1, N, M, D).
        Static managers do not depend on the LLM, and merging is linear: their sums over the experts come first, of all
        managers at once, and only these K results are merged."""
        c, newline, counts = self.config, self.image_newline, [len(image.pixels) for image in images]
        pixels = torch.cat([image.pixels for image in images]).to(newline.device, self.vision.patch.weight.dtype)
        last, managed = c.vision_layers - 1, c.managed_layers if c.manager_type else ()
        kept = sorted({last, *managed})
        states = dict(zip(kept, self.vision(pixels, kept), strict=True))  # each (T, n*n, D_vision)

        def merge(stack, newlines):  # (T, M, L, D), (I or 1, M, D) -> (M, L, D)
            each = zip(stack.split(counts), images, newlines.expand(len(images), -1, -1), strict=True)
            return torch.cat([merge_grids(tiles, image.size, c, line) for tiles, image, line in each], dim=1)

        def insight(state, embedding):  # (T, n*n, D_vision), (D) -> (T, 1, n*n, D)
            x = run(self.projector, self.vision.checkpointing, state)
            return (x + embedding.to(x.dtype))[:, None]

        increments = experts = None
        tokens = merge(self.projector(states[last])[:, None], newline[None, None])[0]
        insights = (insight(states[n], self.layer_embedding[i]) for i, n in enumerate(managed))
        if managed and c.manager_type != "static":
            insights = list(insights)
            experts = merge(torch.cat(insights, 1), newline.expand(1, len(managed), -1))[None, :, plan.managed]
        if managed and c.is_static(c.inject_layers[0]):
            weights = self.static_weights(len(plan.index))[plan.image_rows]  # (I, N, K, 1, D)
            of_tile = weights.repeat_interleave(torch.tensor(counts, device=weights.device), 0, output_size=len(pixels))
            increments = merge(weighted_sum(of_tile.unbind(1), insights), weights.sum(1)[:, :, 0] * newline)
            increments = increments[:, plan.managed]
        return tokens, increments, experts

    def static_weights(self, rows: int) -> Tensor:
        """The weights of all static managers, (rows, N, K, 1, D); 0 for the layer that the one at LLM layer 0 drops."""
        static = [m for m in self.managers if isinstance(m, StaticVisualManager)]
        weights, num_experts = [m.weights(rows).expand(rows, -1, -1, -1) for m in static], len(self.layer_embedding)
        return torch.stack([F.pad(w, (0, 0, 0, 0, 0, num_experts - w.shape[1])) for w in weights], dim=2)

    def inject(self, layer: int, x: Tensor, plan: Splice, increments: Tensor | None, experts: Tensor | None) -> Tensor:
        """x (B, S, D) before an LLM layer, plus what its manager, if it has one, adds to the image tokens."""
        if self.config.manager_type is None or layer not in self.config.inject_layers:
            return x
        k, flat = self.config.inject_layers.index(layer), x.flatten(0, 1)
        if self.config.is_static(layer):
            increment = increments[k]
        else:
            image, query = flat[None, plan.positions], flat[None, plan.query]
            increment = self.managers[k](experts, image, query, plan.query_mask)[0]
        return flat.index_add(0, plan.positions, increment.to(x.dtype)).view_as(x)

    def loss_sum(self, hidden: Tensor, labels: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
        """hidden (B, S, D), labels (B, S) -> the sum of the label tokens' cross entropies, and their number. Only their
        logits, `chunk` at a time, and again in the backward pass: all of (B, S, V) would outweigh the model."""
        def part(rows, targets):
            return F.cross_entropy(self.llm.logits(rows).float(), targets, reduction="sum")

        keep = labels[:, 1:] != IGNORE
        total = 0 * hidden.flatten()[0].float()
        for rows, targets in zip(hidden[:, :-1][keep].split(chunk), labels[:, 1:][keep].split(chunk)):
            total = total + run(part, True, rows, targets)
        return total, keep.sum()

    def count_labels(self, input_ids: Tensor, attention_mask: Tensor | None, images, labels: Tensor) -> int:
        """The num_tokens that forward will give, without running the model: for the mean over a global batch."""
        spliced = plan_splice(input_ids, attention_mask, images, self.config).labels(labels)
        return int((spliced[:, 1:] != IGNORE).sum())

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, images=(), max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """The new token ids only, (B, T), T <= max_new_tokens; after its end a row repeats the eos id. Managers act in
        the prefill, then tokens come one by one from the KV cache. ValueError for a prompt longer than max_length."""
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, temperature {temperature}, top_p {top_p}; "
                             "they must be at least 1, at least 0, and above 0 up to 1")
        device = self.image_newline.device
        plan = plan_splice(input_ids, attention_mask, images, self.config, device)
        (B, S), eos, tokens = plan.index.shape, torch.tensor(self.config.eos_ids, dtype=torch.long, device=device), []
        if int(plan.lengths.max()) > S:
            raise ValueError(f"a prompt has {int(plan.lengths.max())} tokens with its images, more than max_length {S}")
        cache = KVCache(S + max_new_tokens, torch.arange(S, device=device).expand(B, S))
        embeddings, inject = self.embed(input_ids, images, plan)
        hidden = self.llm(embeddings, inject, cache)[torch.arange(B, device=device), plan.lengths - 1]  # (B, D)
        ended = torch.zeros(B, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            token = sample(self.llm.logits(hidden), temperature, top_p, generator)
            tokens.append(torch.where(ended, eos[0], token) if len(eos) else token)
            ended |= torch.isin(token, eos)
            if ended.all() or step == max_new_tokens - 1:
                break
            cache.advance((plan.lengths + step)[:, None])
            hidden = self.llm(self.llm.embed(tokens[-1])[:, None], cache=cache)[:, 0]
        return torch.stack(tokens, dim=1)
