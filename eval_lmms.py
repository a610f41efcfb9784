"""The MLLM under lmms-eval 0.7.3, with which the paper's 20 datasets are measured (TCSVT 2025,
section V, tables XII and XIII).

    python eval.py lmms --checkpoint F --tasks chartqa,ai2d --batch_size 16
    torchrun --nproc_per_node 8 eval.py lmms --checkpoint F --tasks mmmu_val --output_path out

All other flags are lmms-eval's own. It needs an environment of its own: INSTALL below. The model is
registered under the name NAME; its class, which needs lmms-eval, is in runs/lmms_model.py.
`answer_requests` builds the prompts and the batches, and needs none of it.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from eval_chat import Prompt, answer, make_prompt
from fields import make_parser

NAME = "llava_ov_manager"
INSTALL = (
    'pip install -r requirements.txt "lmms-eval==0.7.3" "filelock<4"; beside a torch for CPUs also '
    "pip uninstall torchvision"
)
MAX_NEW_TOKENS = 1024  # lmms-eval's default


class Request(NamedTuple):
    """What lmms-eval asks."""

    context: str
    settings: dict[str, Any]  # max_new_tokens, temperature, top_p, do_sample ...
    pictures: Callable[[], Sequence[Image.Image] | None]  # opened only when it is answered


class Generation(NamedTuple):
    """How answers are generated; the requests of a batch share it."""

    max_new_tokens: int
    temperature: float
    top_p: float


def generation_of(settings: dict[str, Any]) -> Generation:
    """Of lmms-eval's settings. Without do_sample the likeliest token is taken.

    "until" is not read, as in LLaVA-OneVision's own class: only the end of the turn ends an answer.
    """
    max_new_tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
    if not settings.get("do_sample"):
        return Generation(max_new_tokens, 0.0, 1.0)
    temperature = settings.get("temperature")
    top_p = settings.get("top_p")
    return Generation(
        max_new_tokens,
        1.0 if temperature is None else float(temperature),
        1.0 if top_p is None else float(top_p),
    )


def plan_batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """The numbers of the requests, batch by batch: those of a batch share their settings, and are
    about as long.
    """
    groups: dict[Generation, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(generation_of(request.settings), []).append(number)
    batches = []
    for numbers in groups.values():
        ordered = sorted(numbers, key=lambda number: len(requests[number].context))
        for start in range(0, len(ordered), batch_size):
            batches.append(ordered[start : start + batch_size])
    return batches


def prompt_of(request: Request, model: Any, tokenizer: Any) -> Prompt:
    """The prompt of a request: its pictures in front of the text, or where it has <image>."""
    pictures = list(request.pictures() or ())
    return make_prompt(request.context, pictures, model, tokenizer)


def answer_requests(
    requests: Sequence[Request], model: Any, tokenizer: Any, batch_size: int, is_first: bool = True
) -> list[str]:
    """The answers in the order of the requests.

    A prompt that is longer than the model's max_length has an empty one: they are counted and said,
    as an error would end the whole evaluation.
    """
    answers = [""] * len(requests)
    num_too_long = 0
    for numbers in tqdm(plan_batches(requests, batch_size), desc="answers", disable=not is_first):
        prompts = [prompt_of(requests[number], model, tokenizer) for number in numbers]
        generation = generation_of(requests[numbers[0]].settings)
        for number, text in zip(
            numbers, answer(prompts, model, tokenizer, *generation), strict=True
        ):
            answers[number] = text or ""
            num_too_long += text is None
    if num_too_long:
        print(
            f"note: {num_too_long} of {len(requests)} prompts are longer than max_length "
            f"{model.config.max_length}; their answer is empty",
            flush=True,
        )
    return answers


# ---------------------------------------------------------------- the command
def lmms_arguments(argv: list[str]) -> list[str]:
    """lmms-eval's own arguments: --checkpoint and --tokenizer become --model_args."""
    parser = make_parser("All other flags are those of lmms-eval.", "lmms")
    parser.add_argument("--checkpoint", required=True, help="folder of the model")
    parser.add_argument("--tokenizer", default="", help="folder or file; none = beside the model")
    parser.add_argument("--tasks", required=True, help="lmms-eval's names, comma-separated")
    known, others = parser.parse_known_args(argv)
    for name in ("checkpoint", "tokenizer"):
        path = getattr(known, name)
        if "," in path or "=" in path:
            raise ValueError(f"--{name} {path} has a comma or =, which lmms-eval takes for its own")
    model_args = f"checkpoint={known.checkpoint}"
    if known.tokenizer:
        model_args += f",tokenizer={known.tokenizer}"
    return ["--model", NAME, "--model_args", model_args, "--tasks", known.tasks, *others]


def main(argv: list[str]) -> None:
    """Hand over to lmms-eval's command line. Raises ValueError where it is not installed."""
    arguments = lmms_arguments(argv)
    try:
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise ValueError(f"lmms-eval 0.7.3 cannot be imported ({error}): {INSTALL}") from error
    sys.path.insert(0, str(Path(__file__).parent / "runs"))
    manifest = ModelManifest(NAME, simple_class_path="lmms_model.LlavaOvManager")
    MODEL_REGISTRY_V2.register_manifest(manifest)
    sys.argv = [sys.argv[0], *arguments]
    cli_evaluate()
