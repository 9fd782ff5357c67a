"""The cost of runs on several devices or processes, and of models in few bits: bytes by hand and as torch holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import hook_of, proxy, runner_config, spliced_model, tiny_llama_model, training_sae
from test_cost import gpt2_small

from e2e_sae_plugin.cli import main
from e2e_sae_plugin.cost.estimate import estimate_run
from e2e_sae_plugin.cost.memory import step_memory
from e2e_sae_plugin.cost.placement import COPIES, placements
from e2e_sae_plugin.cost.ranks import config_of_rank, ranks_of, ring_bytes
from e2e_sae_plugin.cost.workload import SavedBytes, Workload, changed, model_bytes, workload_of

SAVED = SavedBytes(50_000.0, 100.0)


def llama_workload(model: Any) -> Workload:
    config = runner_config("topk", hook_name=hook_of("llama"), sae={"d_in": model.config.hidden_size})
    return workload_of(config, spliced_model(config, proxy(model)), training_sae(config))


def test_bf16_weights_take_half():
    wide, narrow = tiny_llama_model(), tiny_llama_model().bfloat16()
    parameters = sum(p.numel() for p in wide.parameters())
    buffers = sum(b.nbytes for b in narrow.buffers())  # of the rotary embedding
    assert llama_workload(narrow).model.weight_bytes == 2 * parameters + buffers
    assert llama_workload(wide).model.weight_bytes == 4 * parameters + sum(b.nbytes for b in wide.buffers())
    assert llama_workload(narrow).model.element_bytes == 2


def test_quantised_weights_are_counted_with_their_scales(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    from test_quantised_models import EIGHT_BIT, FOUR_BIT, load, plain, saved

    folder = saved("llama", tmp_path)
    blocks = plain("llama").model.layers
    matrices = [m.weight for m in blocks.modules() if isinstance(m, torch.nn.Linear)]
    elements = sum(weight.numel() for weight in matrices)
    rest = sum(t.nbytes for t in [*plain("llama").parameters(), *plain("llama").buffers()]) - 4 * elements
    eight = load(folder, quantization_config=EIGHT_BIT)
    assert model_bytes(eight) == elements + 4 * sum(len(weight) for weight in matrices) + rest
    four = load(folder, quantization_config=FOUR_BIT)
    in_blocks_of_64 = 4 * elements // 64
    code_book = 16 * 4 * len(matrices)
    assert (
        elements / 2 + in_blocks_of_64 + rest <= model_bytes(four) <= elements / 2 + in_blocks_of_64 + code_book + rest
    )
    largest = max(weight.numel() for weight in matrices)
    for model in (eight, four):
        work = llama_workload(model)
        assert work.model.element_bytes == 4  # activations are fp32
        assert work.model.dequantised_bytes == 4 * largest
        assert work.model.block_weights == llama_workload(plain("llama")).model.block_weights


def test_an_sae_that_is_not_made_is_counted_whole():
    estimate = estimate_run(runner_config("topk", model_name="e2e-sae-demo", sae={"d_in": 128, "d_sae": 1000}), 0)
    assert estimate.memory.parts["SAE weights"] == 4 * (2 * 128 * 1000 + 1000 + 128)
    assert estimate.memory.parts["optimizer state"] == 2 * estimate.memory.parts["SAE gradients"]


def test_each_device_holds_its_part():
    work = gpt2_small()
    model, sae = placements(work, SAVED, "cuda:1", "cuda:0", {"cuda:0": 10**12})
    assert (model.device, model.holds, model.available_bytes) == ("cuda:0", "model", 10**12)
    assert (sae.device, sae.holds, sae.available_bytes) == ("cuda:1", "SAE", None)
    whole = step_memory(work, SAVED, on_cpu=False)
    for part in ("model weights", "KL chunk", "spliced activations", "clean activations"):
        assert model.memory.parts[part] == whole.parts[part]
        assert part not in sae.memory.parts
    for part in ("SAE weights", "SAE gradients", "optimizer state", "SAE activations"):
        assert sae.memory.parts[part] == whole.parts[part]
        assert part not in model.memory.parts
    copies = COPIES * work.sae_prompts * work.trained_positions * work.sae.d_in * 4
    for phase, size in whole.phases.items():
        assert model.memory.phases[phase] + sae.memory.phases[phase] - copies == size, phase
    together = placements(work, SAVED, "cuda:0", "cuda:0", {})
    assert [one.memory for one in together] == [whole]


def test_the_libraries_are_counted_where_the_process_is():
    model, sae = placements(gpt2_small(), SAVED, "cuda:0", "cpu", {})
    assert "Python and libraries" in model.memory.parts
    assert "Python and libraries" not in sae.memory.parts


def test_ranks_by_hand():
    work = gpt2_small()
    ranks = ranks_of(changed(work, step_prompts=2, micro_prompts=2), 4)
    assert ranks.tokens_per_rank == 2 * 256
    assert ranks.reduced_bytes == work.sae.trained_bytes  # fp32
    assert ranks.sent_bytes == work.sae.trained_bytes * 3 // 2
    in_bf16 = dataclasses.replace(work.sae, trained_bytes=work.sae.trained_bytes // 2)
    assert ranks_of(dataclasses.replace(work, sae=in_bf16), 4, 2).reduced_bytes == ranks.reduced_bytes
    assert [ring_bytes(100, n) for n in (1, 2, 4)] == [0, 100, 150]


def test_a_step_is_split_evenly_or_refused():
    config = runner_config("topk", store_batch_size_prompts=4)
    share = config_of_rank(config, 2)
    assert (share.step_size_prompts, share.micro_batch_size_prompts) == (2, 2)
    assert config.step_size_prompts == 4
    with pytest.raises(ValueError, match=r"--ranks 3 cannot share the 4 sequences.*divisor of 4"):
        config_of_rank(config, 3)
    with pytest.raises(ValueError, match="at least 1"):
        config_of_rank(config, 0)


def test_the_command_says_what_ranks_and_devices_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = runner_config("topk", model_name="e2e-sae-demo", sae={"d_in": 128, "d_sae": 1000}, llm_device="cuda:1")
    content = {k: v for k, v in config.to_dict().items() if not k.startswith("sae_lens")}
    file, figures = tmp_path / "run.yaml", tmp_path / "cost.json"
    file.write_text(yaml.safe_dump(content))
    assert main(["estimate", "--config", str(file), "--no-measure", "--ranks", "2", "--json", str(figures)]) == 0
    text = capsys.readouterr().out
    assert "2 ranks: 16 of a step's 32 tokens on each" in text
    assert "cuda:1, which holds the model" in text
    assert "cpu, which holds the SAE" in text
    read = json.loads(figures.read_text())
    assert read["ranks"]["reduced_bytes"] == 4 * (2 * 128 * 1000 + 1000 + 128)
    assert [one["holds"] for one in read["devices"]] == ["model", "SAE"]
    whole = estimate_run(config, 0)
    assert read["run_flops"] == pytest.approx(whole.run_flops)
    assert main(["estimate", "--config", str(file), "--no-measure", "--ranks", "3"]) == 2
