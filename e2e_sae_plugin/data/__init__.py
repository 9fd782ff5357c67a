"""Training and evaluation data: rows of text or of token ids, from files, folders and the Hub."""

from e2e_sae_plugin.data.load import LoadedData as LoadedData
from e2e_sae_plugin.data.load import load_data as load_data
from e2e_sae_plugin.data.load import loaded_data as loaded_data
from e2e_sae_plugin.data.settings import DataSettings as DataSettings
