"""Sharing SAEs on the Hugging Face Hub, and loading shared ones."""
