"""One SAE of a joint run: built, saved and checkpointed as that of a sweep; its steps are made for all of them at once."""

from __future__ import annotations

from typing import Any

from e2e_sae_plugin.splice import SplicedModel, splice_into
from e2e_sae_plugin.sweep.member import MemberRunner


class JointMemberRunner(MemberRunner):
    """Args: as in `MemberRunner`."""

    set_metadata: dict[str, Any]
    """What the SAE's metadata say of the set that it belongs to."""

    def _splice(self, needs_downstream: bool) -> SplicedModel:
        """Downstream terms are those of the pass, whose first SAE may be another."""
        del needs_downstream
        return splice_into(self.model, self.cfg.hook_name, needs_downstream=False)

    def _evaluation_model(self) -> SplicedModel:
        return self.spliced_model

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        for key, value in self.set_metadata.items():
            setattr(self.sae.cfg.metadata, key, value)
