"""A model whose blocks are on two devices, moved between them by accelerate's hooks as a `device_map` has it."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from second_device import other_device
from test_large_models import MODELS, spliced, terms_and_gradient
from torch import nn

other = other_device


@pytest.mark.parametrize("first_on_second", [1, 2])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_blocks_on_several_devices_as_with_a_device_map(other: str, family: str, first_on_second: int):
    """Accelerate's hooks move what each block is given; the SAE's place may be on either side of the border."""
    expected_terms, expected = terms_and_gradient(spliced(family, MODELS[family]()))
    model = MODELS[family]()
    body = model.get_submodule(model.base_model_prefix)
    layers = list(body.h if family == "gpt2" else body.layers)
    norm = body.ln_f if family == "gpt2" else body.norm
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # tied to the embedding in GPT-2
    for place, modules in (
        ("cpu", layers[:first_on_second]),
        (other, [*layers[first_on_second:], norm, model.lm_head]),
    ):
        for module in modules:
            module.to(place)
            add_hook_to_module(module, AlignDevicesHook(execution_device=place))
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True, place_submodules=False))
    terms, gradient = terms_and_gradient(spliced(family, model))
    assert terms == pytest.approx(expected_terms, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
