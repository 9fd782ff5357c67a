"""Small SAEs to share, and what an exception must not hold."""

from __future__ import annotations

import torch
from helpers import runner_config, training_sae
from sae_lens.saes.sae import TrainingSAE

REPO = "someone/saes"
HOOK = "blocks.1.hook_resid_pre"


def an_sae(architecture: str = "topk", seed: int = 0) -> TrainingSAE:
    """In training form, with weights and metadata as after a run."""
    sae = training_sae(runner_config(architecture))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2-small", HOOK
    return sae


def texts_of(error: BaseException | None) -> list[str]:
    """What an exception, and all that hangs on it, says: a traceback, a log or a debugger may show any of it."""
    seen: list[str] = []
    todo = [error]
    while todo:
        each = todo.pop()
        if each is not None:
            seen += [str(each), repr(each), *map(str, each.args), *map(repr, vars(each).values())]
            todo += [each.__cause__, each.__context__]
    return seen
