import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from e2e_sae_plugin.demo import (
    bits_per_byte,
    corpus,
    demo_dataset,
    demo_tokens,
    load_demo_model,
    load_demo_tokenizer,
    run,
)
from e2e_sae_plugin.demo.corpus import split_of, stdlib_files, stdlib_texts
from e2e_sae_plugin.demo.model import MODEL_DIRECTORY
from e2e_sae_plugin.demo.run import KINDS, demo_config, run_demo


def test_no_file_is_in_both_splits_and_about_a_tenth_is_held_out():
    train, evaluation = stdlib_files("train"), stdlib_files("evaluation")
    assert not set(train) & set(evaluation)
    share = len(evaluation) / (len(train) + len(evaluation))
    assert 0.05 < share < 0.15


def test_split_depends_on_the_path_alone():
    assert split_of("json/decoder.py") == split_of("json/decoder.py")
    assert {split_of(f"module_{i}.py") for i in range(100)} == {"train", "evaluation"}


def test_corpus_leaves_out_tests_and_site_packages(tmp_path):
    for name in ("kept.py", "site-packages/left.py", "test/left.py", "pkg/tests/left.py", "pkg/kept.py", "note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    found = stdlib_files("train", tmp_path) + stdlib_files("evaluation", tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in found) == ["kept.py", "pkg/kept.py"]


def test_files_in_other_encodings_are_decoded_and_broken_ones_skipped(tmp_path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'caf\xe9'\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"name = '\xff\xfe'\n")
    texts = stdlib_texts("train", tmp_path) + stdlib_texts("evaluation", tmp_path)
    assert len(texts) == 1
    assert "café" in texts[0]


def test_folder_without_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No Python source below"):
        stdlib_files("train", tmp_path)
    with pytest.raises(ValueError, match="split must be 'train' or 'evaluation', got 'test'"):
        stdlib_files("test")  # pyright: ignore[reportArgumentType]


def test_tokenizer_round_trips_source_and_starts_with_the_special_token():
    tokenizer = load_demo_tokenizer()
    source = "def f(x):\n\treturn {'é': x ** 2}\n"
    ids = tokenizer.encode(source)
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(ids, skip_special_tokens=True) == source


def test_demo_tokens_are_whole_sequences_that_start_with_the_special_token(tmp_path):
    (tmp_path / "a.py").write_text("value = 1\n" * 200)
    (tmp_path / "b.py").write_text("other = 2\n" * 200)
    split = split_of("a.py")
    tokens = demo_tokens(split, 16, root=tmp_path)
    assert tokens.shape[1] == 16
    assert (tokens[:, 0] == 0).all()
    again = demo_tokens(split, 16, root=tmp_path)
    assert torch.equal(tokens, again)
    assert demo_dataset(split, 16, root=tmp_path)[0]["tokens"] == tokens[0].tolist()
    with pytest.raises(ValueError, match="context_size must be at least 2"):
        demo_tokens(split, 1, root=tmp_path)


def test_bits_per_byte_of_a_model_that_knows_nothing_is_that_of_uniform_guessing():
    model, tokenizer = load_demo_model(), load_demo_tokenizer()
    with torch.no_grad():
        model.unembed.W_U.zero_()
        model.unembed.b_U.zero_()
    text = "import os\n" * 600
    n_tokens = len(tokenizer.encode(text))  # the file and its separator
    used = n_tokens - n_tokens % 255
    n_bytes = len(str(tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:used])).encode())
    assert bits_per_byte(model, tokenizer, [text]) == pytest.approx(used * 11 / n_bytes, rel=1e-4)  # 2**11 = vocabulary


def test_bundled_model_predicts_held_out_source_as_its_card_says():
    report = json.loads((MODEL_DIRECTORY / "training.json").read_text())
    assert report["bits_per_byte"]["evaluation_with_tests"] <= 1.15  # all held-out files of the library
    measured = report["bits_per_byte"]["evaluation"]
    texts = stdlib_texts("evaluation")[:12]
    # A sample, on whatever Python runs this: files differ a lot in how predictable they are.
    assert bits_per_byte(load_demo_model(), load_demo_tokenizer(), texts) < measured + 0.35


def test_bundled_model_continues_code_in_recognisable_python():
    model, tokenizer = load_demo_model(), load_demo_tokenizer()
    prompt = "def parse_args(argv=None):\n    parser = "
    tokens = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        for _ in range(40):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    continued = tokenizer.decode(tokens[0], skip_special_tokens=True)[len(prompt) :]
    assert "\n    parser.add_argument(" in continued


def test_wheel_budget_of_the_bundled_files():
    assert sum(path.stat().st_size for path in MODEL_DIRECTORY.iterdir()) < 5_000_000


def test_demo_kinds_differ_in_nothing_but_objective():
    configs = [demo_config(kind, None, 10_240, 0).to_dict() for kind in KINDS]
    for cfg in configs:
        cfg.pop("objective")
        cfg.pop("local_first")
        cfg["sae"].pop("metadata")
        cfg["logger"].pop("run_name")
    assert configs[0] == configs[1] == configs[2]


def test_demo_runs_prints_one_table_and_writes_loadable_saes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "EVALUATION_PROMPTS", 20)
    monkeypatch.setattr(corpus, "stdlib_files", lambda *given, **named: stdlib_files(*given, **named)[:8])
    text = run_demo(tmp_path, training_tokens=10_240)
    for kind in KINDS:
        assert f"\n{kind.name} " in text
        sae = SAE.load_from_disk(str(tmp_path / kind.name.replace("+", "_")))
        assert sae.cfg.metadata.objective["kl"] == kind.objective.kl
        assert Path(tmp_path / kind.name.replace("+", "_") / "metrics.jsonl").read_text()
    assert "layer 5" in text
    assert "Load one" in text
    assert "Language model" in capsys.readouterr().out
    weights = [(tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("local", "e2e", "e2e_ds")]
    again = run_demo(tmp_path, training_tokens=10_240)
    assert again.split("in all")[0].splitlines()[:-1] == text.split("in all")[0].splitlines()[:-1]
    with pytest.raises(ValueError, match="holds another run, which would be overwritten"):
        run_demo(tmp_path, training_tokens=20_480)
    with pytest.raises(ValueError, match=r"local_first=0\.6 leaves none of the 2 steps"):
        run_demo(tmp_path / "other", training_tokens=1024)
    assert not (tmp_path / "other").exists()  # refused before any was trained
    assert weights == [
        (tmp_path / name / "sae_weights.safetensors").read_bytes() for name in ("local", "e2e", "e2e_ds")
    ]
