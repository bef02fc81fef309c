"""The published policy losses. grpo.py has GRPO's loss and the parts that all share; each rival family has a file.

`loss.kind` names one of LOSSES, and `loss.options` holds the settings that only this loss has. A new loss is a subclass of
`Loss` and one line here. With one update per rollout every ratio is 1, and all losses give the same policy
gradient up to the divisor.

Where they come from: Dr. GRPO and KL-Cov from the authors' code; GRPO, CISPO and GSPO from verl and TRL; LUSPO from TRL
(its paper was not read). UNVERIFIED are R2VPO (third-party codes), MinPRO (its objective from a survey) and DHPO (its
abstract).
"""

from __future__ import annotations

from nanolapo.config import Config
from nanolapo.config_file import one_of
from nanolapo.losses.grpo import BatchTotals, Loss, LossInputs, clipped_surrogate, policy_loss, row_weights
from nanolapo.losses.kl_cov import KlCov
from nanolapo.losses.r2vpo import R2vpo
from nanolapo.losses.sequence import Dhpo, Gspo, Luspo
from nanolapo.losses.tokens import Cispo, Minpro

__all__ = ["BatchTotals", "Loss", "LossInputs", "clipped_surrogate", "policy_loss", "row_weights"]  # grpo.py's

LOSSES: dict[str, type[Loss]] = {
    "grpo": Loss,
    "gspo": Gspo,
    "luspo": Luspo,
    "dhpo": Dhpo,
    "cispo": Cispo,
    "minpro": Minpro,
    "kl_cov": KlCov,
    "r2vpo": R2vpo,
}


def load_loss(config: Config) -> Loss:
    """Build the loss that loss.kind names. Raises UserError for an unknown kind, and for settings it cannot work with."""
    return LOSSES[one_of(config.loss.kind, LOSSES, "loss.kind")](config)
