"""The type checker of the import hook in conftest.py."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# An int is as good as a float, as for every type checker that reads the code (PEP 484).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
