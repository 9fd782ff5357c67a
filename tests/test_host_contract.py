"""The host's methods that this package re-implements or calls against its naming rules have not changed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.loading.pretrained_sae_loaders import sae_lens_huggingface_loader
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, calculate_pre_act_loss
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.standard_sae import StandardTrainingSAE
from sae_lens.saes.topk_sae import TopK, TopKTrainingSAE, calculate_topk_aux_acts
from sae_lens.tokenization_and_batching import _add_tokens_to_batch, concat_and_batch_sequences
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.upload_saes_to_huggingface import _upload_sae, upload_saes_to_huggingface

# (host method, sha256 of its source in sae-lens 6.54.12, what of ours follows it)
FOLLOWED: list[tuple[Callable[..., Any], str, str]] = [
    (
        upload_saes_to_huggingface,
        "ef5faed11eaeab0f040f46b79e2ed14a745d2ef337987be936546560547d9619",
        "hub.upload.push_to_hub",
    ),
    (
        _upload_sae,
        "46f43a0d4dde8152139065edc19f707118848c155caa8fbc60b12cd736d930a1",
        "hub.gather and hub.sae_folder.SHARED_FILES",
    ),
    (
        sae_lens_huggingface_loader,
        "d619747267faa5f36421cbf770b0bb6fa2102be6491cf20da5f0801519ea1043",
        "hub.load._reader",
    ),
    (
        LanguageModelSAETrainingRunner.run,
        "8d21360c373ea4d8dd8d5f93bdf31cc842acc426afe095f00452344992ac15d5",
        "runner.E2ESAETrainingRunner.run",
    ),
    (
        LanguageModelSAETrainingRunner.run_trainer_with_interruption_handling,
        "87cfb32d0035f06f908e91cbdfb1f2986525028f5c3a45b7e09117ad9ac3d887",
        "runner.E2ESAETrainingRunner.run_trainer_with_interruption_handling",
    ),
    (
        SAETrainer.fit,
        "4c5471712766ff467ffac0e84233d34a71feca95345692014ba8fcf64c434747",
        "trainer.E2ESAETrainer.fit and fold_activation_scaling",
    ),
    (
        SAETrainer.step,
        "2ff7739cd5d3f5886c70809aab473ba3fcf62980bac360adefc0de3ea8afde0c",
        "step.SplicedStepTrainer.step",
    ),
    (
        SAETrainer._train_step,
        "f609adeefc260444d2d9256bf3b6e5346469a9f7b258cb92da2f3bcb1f229bc2",
        "step.SplicedStepTrainer.step, _clip_gradients and _update; gradient.GradientTrainer.sae_forward",
    ),
    (
        SAETrainer._is_logging_step,
        "bd0db408cb149f75f69308544de2db134b64165606e4fca3fd2a7dcb26d6c99e",
        "trainer.E2ESAETrainer._is_logging_step",
    ),
    (
        SAETrainer._run_and_log_evals,
        "03b7e0e5753677a3246584f00db9f4dd2758a7d247cc074985e5065d494f7b52",
        "trainer.E2ESAETrainer.evaluate and _is_evaluation_step",
    ),
    (
        TrainingSAE.training_forward_pass,
        "56466380b617ff34400a1c9870a02f2dcf60eda2fe0adc8f2d4bced6f9e62b9a",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.calculate_aux_loss,
        "5c226123b7590046445c826541e4f2b7068f869b5f1d8debd7f91cc573127ebc",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.encode_with_hidden_pre,
        "0749d62ae9b8c2b29d2b7b9cce93422353647acec1843fb4b9624f4a92678d89",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        StandardTrainingSAE.decode,
        "ab3493a65dd79fb1e596736262e571baaf9225c1b5ec624fde2a52e312fb1d28",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        TopKTrainingSAE.encode_with_hidden_pre,
        "0deaab8e48b5ae331b64d895a1d94e9e2ef37463470d28e4aa701a38840df03c",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        TopKTrainingSAE.decode,
        "dbdcd8d0d2476611c428a58769c5e1da7e8cf6524a8bad5a1677bfd2051a529c",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        TopKTrainingSAE.calculate_topk_aux_loss,
        "895b3966b97a68ae4856ff7a2de3350cdad045b957697539413b90256e5e1603",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        calculate_topk_aux_acts,
        "f55b4077c7b700401d645e4b70b74963891f4913a699a7de0ecacc5381cbf340",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        TopK.forward,
        "ccbbd5ec13727baa91840fd68a97f2d7cdf4df25ef142c169944a2666f4d56c7",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        BatchTopK.forward,
        "cac6fa7b354d22fa96f1704c7c69057d3ff7dcc4733dfab4a33bd596a2a37b70",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        BatchTopKTrainingSAE.training_forward_pass,
        "d5806c8a77c236e5505a7028f9859db5c6d0290482bcbaf3b5746f535f383592",
        "kernels.topk_sae.training_forward_pass",
    ),
    (
        JumpReLUTrainingSAE.training_forward_pass,
        "8468d9e0c1468133caabad7e0ee317eef857c94161e67d037cf1721b377f93ce",
        "kernels.sharded_sae._jumprelu_forward_pass",
    ),
    (
        JumpReLUTrainingSAE.calculate_aux_loss,
        "205acfe983bf4d9229932277f9d139797d11247292786fb8b2289c0610e90b63",
        "kernels.sharded_sae._jumprelu_forward_pass",
    ),
    (
        calculate_pre_act_loss,
        "d92b9b6e5979a1b131bbdb1bd8596c0b9a4f8f259b82b9e758edb8db3d30e969",
        "kernels.sharded_sae._jumprelu_forward_pass",
    ),
    (
        TrainingSAE.process_sae_in,
        "de4a381e7364582141e745cdbde1f5452d9bcc870692a7b94e012e87241db452",
        "kernels.relu_sae.training_forward_pass",
    ),
    (
        MatryoshkaBatchTopKTrainingSAE._iterable_decode,
        "5a5cb4471147216956f1f29be0b82618bf884fc3ed4c879099ba083117ada41f",
        "architectures.inner_reconstructions",
    ),
    (
        SAETrainer.save_checkpoint,
        "2405b5e2109908a28dc579677c43b839b8d0e708182b74bcdf99771cb2fe3ba7",
        "trainer.E2ESAETrainer.save_checkpoint and checkpoint.checkpointer",
    ),
    (
        SAETrainer.save_trainer_state,
        "afd16b5fdddd824d6674af009be437ff00410861b0ebec16ce14dad15d0d060c",
        "checkpoint.state.capture and save",
    ),
    (
        SAETrainer.load_trainer_state,
        "57831e00e917d629a233a376a7a3b8b1c071c6b52ea1a49f4fdb8d1d461e768e",
        "checkpoint.state.load",
    ),
    (
        SAETrainer._checkpoint_if_needed,
        "c8d7b7f788df8c05a731d01c89659798ac7b43f82188505a492e3894e16ca951",
        "checkpoint.checkpointer.Checkpointer.after_step",
    ),
    (
        LanguageModelSAETrainingRunner.save_checkpoint,
        "a5901cfc14246abc8c2d1a9365b3b3d5ab85f5f4efe198a7593a900c7666e0cb",
        "runner.E2ESAETrainingRunner.save_checkpoint",
    ),
    (
        ActivationsStore._iterate_raw_dataset,
        "1ee66afe044092e1d83592c2f545ddbcbf4a2f7610497035b28cf7fc50c64cb7",
        "seekable_store.SeekableActivationsStore",
    ),
    (
        ActivationsStore._iterate_raw_dataset_tokens,
        "fb14cda814f179b5f70c16d3f132b38b75b0c20960d529a87c06213853e066db",
        "seekable_store.SeekableActivationsStore",
    ),
    (
        ActivationsStore._iterate_tokenized_sequences,
        "a07f05522eb24179f13137c75a5799bc2af154c19d80c0ad7be2c6e99d4a15c3",
        "seekable_store.SeekableActivationsStore",
    ),
    (
        ActivationsStore.get_batch_tokens,
        "b2c104f2541d7c068310e3d7aed781a4bdace43718901aa57d6c3404b10e78a3",
        "token_stream.TokenStream",
    ),
    (
        concat_and_batch_sequences,
        "6dd1e08216ff26b7f74b15026e8a813ba8fb610e3a6d5b3c534230f227ac5922",
        "seekable_store.untaken_tokens",
    ),
    (
        _add_tokens_to_batch,
        "833df68b6766ee799c6cd38599e6cc80cba28caeeb8dc0b82a8d0c247befa2bc",
        "seekable_store.untaken_tokens",
    ),
]


def source_digest(method: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(method).encode()).hexdigest()


@pytest.mark.parametrize(("method", "digest", "ours"), FOLLOWED, ids=lambda value: getattr(value, "__qualname__", ""))
def test_host_method_that_is_re_implemented_has_not_changed(method: Callable[..., Any], digest: str, ours: str):
    found = source_digest(method)
    assert found == digest, (
        f"The installed SAELens has another {method.__qualname__} than sae-lens 6.54.12. Read what changed in "
        f"{inspect.getsourcefile(method)}, carry it over to e2e_sae_plugin.{ours} (which follows it), then put "
        f"{found!r} here."
    )
