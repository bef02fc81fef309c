"""Sampling the next step while this one trains (`rollout.ahead: 1`; off by default).

The sampler keeps the weights of before the update meanwhile. So a step trains on rollouts that are one step old, and
`loss.tis_cap` weighs their tokens by how much likelier they have become since (or, with `loss.old_logprobs: sampler`, the
clipped ratio does, counted from the weights that sampled them). Only engine and grader work in the thread; the method is
asked, and the ranks meet, in the main one.

Not sampled ahead: the first step, a second round of dynamic sampling, a monitor pass, and the step behind a checkpoint of
`run.checkpoint_every`. So a checkpoint holds no rollouts, and a run that was killed repeats the steps it would have done.
(After a Ctrl-C, which waits for both, the next step is sampled anew, from the newest weights.) Only what is not sampled
ahead can show whether sampler and trainer still hold the same weights.

On a GPU, where this has not been tried, the sampler does not sleep, and both work on the same device.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from threading import Event

import torch

from nanolapo.metrics import Stopwatch
from nanolapo.rollouts import Rollouts
from nanolapo.sampling import Share, answer, ask, draw_round
from nanolapo.session import Ahead, Session, progress


@contextmanager
def sampling_ahead(s: Session, watch: Stopwatch) -> Iterator[None]:
    """Sample the next step's first round beside whatever is done while this context is open, and wait for it at the end.

    What went wrong in the thread is raised here; an error in the main thread ends the sampling, too.
    """
    step = s.step + 1
    share_done = progress(s.config, s.token_limit, step, s.sampled_tokens)
    if not s.config.rollout.ahead or share_done >= 1 or step % s.config.run.checkpoint_every == 0:
        yield
        return
    with watch("sample"):
        s.method.progress = share_done
        plan = s.method.sampling(step)
        draw = draw_round(s, plan, step, 0)
        share, stop = ask(s, plan, draw, step), Event()
        s.method.progress = s.progress  # the update's hooks belong to this step
    job = s.thread.submit(work, s, share, stop)
    try:
        yield
        with watch("sample"):  # what is left of it
            rollouts = job.result()
    except BaseException:
        stop.set()
        s.grader.abandon()
        wait([job])
        raise
    rollouts.unmatched_B[:] = True
    s.ahead = Ahead(plan, draw, rollouts)


def work(s: Session, share: Share, stop: Event) -> Rollouts:
    torch.set_num_threads(torch.get_num_threads())  # a thread's OpenMP begins with its own number
    if s.ranks.device.type == "cuda":
        torch.cuda.set_device(s.ranks.device)  # ... and with the first GPU
        torch.cuda.synchronize()  # the weights came through the main thread's stream
    return answer(s, share, Stopwatch(), stop)
