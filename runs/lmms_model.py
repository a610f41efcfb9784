"""LLaVA-OV-Manager as a model of lmms-eval 0.7.3. `python eval.py lmms` registers this class; it is
not run by itself.
"""

import functools
from typing import Any

from lmms_eval.api.model import lmms

from eval_lmms import Request, answer_requests
from weights import load_mllm
from world import ranks


class LlavaOvManager(lmms):
    """The thin side that faces lmms-eval: what it asks becomes a Request."""

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.model, self.tokenizer, _ = load_mllm(checkpoint, tokenizer, device or "auto")
        self.device = next(self.model.parameters()).device
        self.batch_size = int(batch_size)
        self._rank, self._world_size = ranks()

    def request_of(self, instance: Any) -> Request:
        """What lmms-eval asks; the pictures of a question are opened when it is answered."""
        context, settings, doc_to_visual, doc_id, task, split = instance.args
        document = self.task_dict[task][split][doc_id]
        return Request(context, settings, functools.partial(doc_to_visual, document))

    def generate_until(self, requests: list[Any]) -> list[str]:
        questions = [self.request_of(instance) for instance in requests]
        is_first = self._rank == 0
        return answer_requests(questions, self.model, self.tokenizer, self.batch_size, is_first)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("none of the paper's datasets is measured by likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("none of the paper's datasets has several rounds")
