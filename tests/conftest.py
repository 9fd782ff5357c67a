"""Offline, quiet W&B, run-time shape checks of the whole package, and the host's own warnings, listed one by one."""

from __future__ import annotations

import os
import signal

# A background job of a shell, or one under nohup, begins with SIGINT ignored, which tests of interruptions send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports huggingface_hub or wandb, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # where triton is installed, it takes a GPU for granted
os.environ["HF_XET_CLIENT_RETRY_MAX_ATTEMPTS"] = "1"  # its default keeps a test of failing storage waiting for minutes
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # processes beside each other: with several threads each they wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for _variable in ("WANDB_MODE", "WANDB_API_KEY", "TQDM_DISABLE"):  # tests look at bars
    os.environ.pop(_variable, None)

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated function of these modules is checked, not only the public ones that check themselves. Left out:
# `config`, `objective` and `presets`, which answer a wrong value with a ValueError of their own, and `trainer`, one of
# whose types is a Protocol of the host that cannot be checked at run time.
install_import_hook(
    [
        f"e2e_sae_plugin.{module}"
        for module in (
            "architectures",
            "build",
            "checkpoint.folder",
            "checkpoint.resume",
            "checkpoint.run_folder",
            "checkpoint.state",
            "data",
            "evaluation",
            "faults",
            "interruption",
            "losses",
            "metrics_log",
            "preflight",
            "runner",
            "seekable_store",
            "splice",
            "spliced_losses",
            "summary",
            "token_stream",
        )
    ],
    "shape_checks.checked",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# The tiny models gain nothing from more than one. OMP_NUM_THREADS=2 tries sums in another order.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# Examples are drawn alike everywhere, and none is a failure because a busy machine took long over it.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

# What is not ours to fix. Everything else that warns fails a test (pyproject.toml).
HOST_WARNINGS = [
    # SAELens imports transformer_lens.utils, which TransformerLens renamed.
    r"ignore:The 'utils' module has been deprecated:DeprecationWarning:sae_lens\.load_model",
    # TransformerLens, wherever a HookedTransformer is built; both families are supported while both exist.
    r"ignore:HookedTransformer is deprecated and will be removed in 4\.0:DeprecationWarning",
    # SAELens's store copies rows of a torch-formatted dataset with torch.tensor().
    r"ignore:To copy construct from a tensor:UserWarning:sae_lens\.training\.activations_store",
    # SAELens compares rows with training tokens, so every dataset of the tests looks too small to it.
    r"ignore:The training dataset contains fewer samples:UserWarning",
    # SAELens, at loading any SAE whose model was loaded with keyword arguments (its own default has one).
    r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs:UserWarning:sae_lens\.saes\.sae",
]


def pytest_configure(config: pytest.Config) -> None:
    for line in HOST_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
