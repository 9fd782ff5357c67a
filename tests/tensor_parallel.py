"""Run by `test_large_models` in two processes: the gradient through weights that Hugging Face has split."""

from __future__ import annotations

import sys
import warnings

from test_large_models import spliced, terms_and_gradient
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Passing `tp_plan` directly")  # its successor is of transformers 5.1x
    whole = terms_and_gradient(spliced("llama", AutoModelForCausalLM.from_pretrained(sys.argv[1])))
    split_model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto")
    assert hasattr(split_model.model.layers[1].mlp.up_proj.weight, "device_mesh"), "nothing is split"
    split = terms_and_gradient(spliced("llama", split_model))
    error = float((split[1] - whole[1]).norm() / whole[1].norm())
    assert error < 1e-4, error
    assert abs(split[0]["kl_loss"] - whole[0]["kl_loss"]) < 1e-4 * whole[0]["kl_loss"]
    sys.stdout.write("the gradients agree\n")
