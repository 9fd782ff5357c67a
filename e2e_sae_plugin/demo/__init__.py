"""A small language model, trained by this project on Python source, and its data: everything runs offline."""

from e2e_sae_plugin.demo.data import demo_dataset as demo_dataset
from e2e_sae_plugin.demo.data import demo_tokens as demo_tokens
from e2e_sae_plugin.demo.model import bits_per_byte as bits_per_byte
from e2e_sae_plugin.demo.model import load_demo_model as load_demo_model
from e2e_sae_plugin.demo.model import load_demo_tokenizer as load_demo_tokenizer
