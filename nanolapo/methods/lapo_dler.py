"""LAPO's first stage with DLER's optimiser: ours, to tell how much of a result is the reward and how much the optimiser.

From lapo.py come the reward (Eq. 4-5) and M(q), from dler.py the advantage whitened over the batch and dynamic sampling,
and from configs/methods/lapo-dler.yaml DLER's clips and KL. DLER's limit and its reward are left out: the limit is LAPO's.

Dynamic sampling goes by LAPO's reward. So it also keeps groups that are right throughout, if their lengths differ, which
DLER would drop. M(q) sees every group that was sampled, kept or not, as in LAPO: a problem that was dropped because it is
too hard becomes unsolved. A step never samples a problem twice.

Edge: a step without any kept group trains nothing and still updates M(q). State: M(q).
"""

from __future__ import annotations

from nanolapo.methods.dler import Optimiser
from nanolapo.methods.lapo import Discovery


class LapoDler(Optimiser, Discovery):
    """Discovery's reward and map; Optimiser's sampling, keep_groups and advantage."""
