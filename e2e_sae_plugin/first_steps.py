"""A guard against runs that train nothing: it compares the parameters after the first updates with the ones before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from e2e_sae_plugin.precision import accumulation_dtype

N_UPDATES = 10


class FirstSteps:
    """Stops a run whose first updates change no parameter, which would otherwise end with the SAE that it began with."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] | None = None
        self._n_updates = 0

    def before_update(self, parameters: Mapping[str, Parameter]) -> None:
        """Note the parameters before the first update."""
        if self._before is None:
            self._before = _sums(parameters)

    @property
    def are_over(self) -> bool:
        """Whether enough updates have been made."""
        return self._n_updates >= N_UPDATES

    def after_update(self, parameters: Mapping[str, Parameter]) -> None:
        """Count an update; compare after the last of the first ones.

        Raises:
            ValueError: If none of the parameters has changed.
        """
        self._n_updates += 1
        if self.are_over:
            self.check(parameters)

    def check(self, parameters: Mapping[str, Parameter]) -> None:
        """Compare the parameters with those before the first update, if there was one.

        Raises:
            ValueError: If none of them has changed.
        """
        if self._before is None:
            return
        after = _sums(parameters)
        if all(torch.equal(after[name], before) for name, before in self._before.items()):
            raise ValueError(
                f"The first {self._n_updates} steps have changed none of the SAE's trained parameters "
                f"({', '.join(self._before)}). Check lr and frozen_parameters."
            )


@torch.no_grad()
def _sums(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Sum and sum of squares of each parameter; an update that moves any number moves them."""
    sums: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        dtype = accumulation_dtype(parameter.device)
        sums[name] = torch.stack([parameter.sum(dtype=dtype), parameter.square().sum(dtype=dtype)])
    return sums
