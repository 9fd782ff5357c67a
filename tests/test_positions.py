"""From a hook name to the block that the spliced pass starts at, `L - l`, and the default downstream points."""

from __future__ import annotations

import pytest

from e2e_sae_plugin.splice.positions import hugging_face_position, near_matches, transformer_lens_position

INSIDE = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
TRANSFORMER_LENS = ["hook_embed", "ln_final.hook_normalized"] + [f"blocks.{b}.{i}" for b in range(4) for i in INSIDE]
BRIDGE = [f"blocks.{b}.{inside}" for b in range(4) for inside in ("hook_in", "hook_out", "attn.hook_out")]
HUGGING_FACE = ["model", "model.embed_tokens", "model.layers", "lm_head"] + [
    f"model.layers.{b}{inside}" for b in range(4) for inside in ("", ".mlp", ".self_attn", ".mlp.down_proj")
]


# fmt: off
@pytest.mark.parametrize(
    ("hook_name", "start_block", "enters_block", "layers_after", "downstream_blocks"),
    [
        # A residual stream entering block b is a^(b): downstream from b + 1 to L - 1.
        ("blocks.0.hook_resid_pre",  0, True,  4, (1, 2, 3)),
        ("blocks.2.hook_resid_pre",  2, True,  2, (3,)),
        # The residual stream leaving block b is the one entering b + 1: the same place.
        ("blocks.1.hook_resid_post", 2, True,  2, (3,)),
        # Inside block b: l = b, and the first later residual stream is the one entering b + 1.
        ("blocks.1.hook_mlp_out",    1, False, 3, (2, 3)),
        ("blocks.1.hook_attn_out",   1, False, 3, (2, 3)),
        ("blocks.1.attn.hook_z",     1, False, 3, (2, 3)),
        ("blocks.1.hook_resid_mid",  1, False, 3, (2, 3)),
        # Nothing enters a later block.
        ("blocks.3.hook_resid_pre",  3, True,  1, ()),
        ("blocks.2.hook_resid_post", 3, True,  1, ()),
        ("blocks.3.hook_mlp_out",    3, False, 1, ()),
        ("blocks.3.hook_resid_post", 4, True,  0, ()),
    ],
)
def test_transformer_lens_names(hook_name, start_block, enters_block, layers_after, downstream_blocks):
    position = transformer_lens_position(hook_name, 4, TRANSFORMER_LENS)
    assert (position.start_block, position.enters_block, position.layers_after) == (
        start_block, enters_block, layers_after
    )  # fmt: skip
    assert position.default_downstream == tuple(f"blocks.{k}.hook_resid_pre" for k in downstream_blocks)


def test_bridge_names_without_aliases_use_the_names_of_the_bridge():
    entering = transformer_lens_position("blocks.1.hook_in", 4, BRIDGE)
    assert (entering.start_block, entering.enters_block) == (1, True)
    assert entering.default_downstream == ("blocks.2.hook_in", "blocks.3.hook_in")
    leaving = transformer_lens_position("blocks.0.hook_out", 4, BRIDGE)
    assert (leaving.start_block, leaving.enters_block) == (1, True)
    inside = transformer_lens_position("blocks.1.attn.hook_out", 4, BRIDGE)
    assert (inside.start_block, inside.enters_block) == (1, False)


# fmt: off
@pytest.mark.parametrize(
    ("hook_name", "start_block", "enters_block", "layers_after", "downstream_layers"),
    [
        # The output of layer b enters block b + 1; later residual streams are the outputs of later layers, up to the
        # one that enters the last block.
        ("model.layers.0",               1, True,  3, (1, 2)),
        ("model.layers.1",               2, True,  2, (2,)),
        ("model.layers.2",               3, True,  1, ()),
        ("model.layers.3",               4, True,  0, ()),
        # Inside layer b: the output of layer b itself is the first later residual stream.
        ("model.layers.1.mlp",           1, False, 3, (1, 2)),
        ("model.layers.1.self_attn",     1, False, 3, (1, 2)),
        ("model.layers.0.mlp.down_proj", 0, False, 4, (0, 1, 2)),
        ("model.layers.3.mlp",           3, False, 1, ()),
    ],
)
def test_hugging_face_names(hook_name, start_block, enters_block, layers_after, downstream_layers):
    position = hugging_face_position(hook_name, "model.layers", 4, HUGGING_FACE)
    assert (position.start_block, position.enters_block, position.layers_after) == (
        start_block, enters_block, layers_after
    )  # fmt: skip
    assert position.default_downstream == tuple(f"model.layers.{k}" for k in downstream_layers)


def test_near_matches_are_named_and_nothing_is_said_without_any():
    assert near_matches("blocks.2.hook_resid_pr", TRANSFORMER_LENS).startswith(
        " Near matches: blocks.2.hook_resid_pre, "
    )
    assert near_matches("xyzzy", TRANSFORMER_LENS) == ""


@pytest.mark.parametrize("hook_name", ["blocks.4.hook_resid_pre", "blocks.1.resid_pre", "blocks.-1.hook_resid_pre"])
def test_hooks_that_the_model_does_not_have_are_refused_with_near_matches(hook_name: str):
    with pytest.raises(ValueError, match=rf"no hook_name '{hook_name}'. Near matches: blocks\.\d\.hook_resid"):
        transformer_lens_position(hook_name, 4, TRANSFORMER_LENS)


@pytest.mark.parametrize("hook_name", ["hook_embed", "ln_final.hook_normalized"])
def test_transformer_lens_hooks_outside_the_blocks_are_refused(hook_name: str):
    with pytest.raises(ValueError, match=rf"hook_name '{hook_name}' is not inside a block.*blocks\.0\.hook_resid_pre"):
        transformer_lens_position(hook_name, 4, TRANSFORMER_LENS)


def test_module_paths_that_the_model_does_not_have_are_refused_with_near_matches():
    with pytest.raises(ValueError, match=r"no hook_name 'model\.layers\.4'. Near matches: model\.layers"):
        hugging_face_position("model.layers.4", "model.layers", 4, HUGGING_FACE)


@pytest.mark.parametrize("hook_name", ["lm_head", "model", "model.layers", "model.embed_tokens"])
def test_modules_outside_the_decoder_layers_are_refused(hook_name: str):
    with pytest.raises(ValueError, match=r"not a decoder layer or inside one. Expected model\.layers\.<layer>"):
        hugging_face_position(hook_name, "model.layers", 4, HUGGING_FACE)
