"""Maps of dictionaries in the plane by UMAP. Optional: `pip install 'e2e-sae-plugin[umap]'`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from e2e_sae_plugin._typing import shape_checked
from e2e_sae_plugin.evaluation.geometry import unit_rows


@shape_checked
def umap_coordinates(
    dictionaries: Mapping[str, Tensor], *, seed: int = 0, n_neighbors: int = 15, min_dist: float = 0.1
) -> dict[str, Tensor]:
    """Lay out the directions of several dictionaries in one plane: figures 19 and 20 of arXiv 2405.12241.

    One map is fitted to all directions together, at unit norm and by cosine distance, so that the dictionaries can be
    compared in it. Axes and distances between far regions mean nothing. With `seed`, UMAP runs on one core and gives
    the same map again on the same machine.

    Args:
        dictionaries: `[n, d_in]` each, decoder directions of alive features by name.
        n_neighbors: how many neighbours make up a direction's surroundings (UMAP's default).
        min_dist: how close the map puts neighbours (UMAP's default).

    Returns:
        `[n, 2]` by name, fp32, on the CPU.

    Raises:
        ImportError: umap-learn is not installed.
        ValueError: the dictionaries differ in `d_in`, an entry is not finite, or there are not more directions than
            `n_neighbors`, which must be at least 2.
    """
    for name, rows in dictionaries.items():
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"Dictionary {name!r} is {rows.dtype} of shape {tuple(rows.shape)}; expected floats [n, d_in]."
            )
    widths = {name: rows.shape[1] for name, rows in dictionaries.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"The dictionaries differ in d_in: {widths}. Map SAEs of one place in one model.")
    sizes = {name: len(rows) for name, rows in dictionaries.items()}
    if n_neighbors < 2 or sum(sizes.values()) <= max(n_neighbors, 3):
        raise ValueError(
            f"UMAP needs n_neighbors of at least 2 and more directions than that, 4 or more; got {n_neighbors} and "
            f"{sum(sizes.values())} directions in all. Set n_neighbors lower, or map more features."
        )
    units = np.concatenate([unit_rows(rows).cpu().numpy() for rows in dictionaries.values()])
    try:
        from umap import UMAP
    except ImportError as error:
        raise ImportError(
            "UMAP maps need umap-learn, which is not installed: pip install 'e2e-sae-plugin[umap]'"
        ) from error
    # One job, said outright: with a seed, UMAP takes no more and warns of it.
    mapper = UMAP(
        n_components=2, metric="cosine", n_neighbors=n_neighbors, min_dist=min_dist, random_state=seed, n_jobs=1
    )
    coordinates = torch.from_numpy(np.asarray(mapper.fit_transform(units), dtype=np.float32))
    return dict(zip(sizes, coordinates.split(list(sizes.values())), strict=True))
