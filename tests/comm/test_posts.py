"""What ranks post of themselves, and when all have said their last word."""

import time

import torch.distributed as dist

from lhcp.comm.posts import Members, Posts, Timing
from lhcp.comm.whereabouts import Place, Whereabouts

TIMING = Timing(beat=0.02, silence=0.1)


def test_all_have_ended_when_the_living_said_so_and_the_others_are_silent() -> None:
    """Fails if a rank ends before one that lives has said its last word, or waits for a dead one.

    An exit breaks the messages of the others: under load they would end in words of gloo's.
    """
    store = dist.HashStore()
    ranks = [Posts(Members(store, rank, 3), TIMING) for rank in range(3)]

    def posted(*those: int) -> bool:
        for rank in those:
            ranks[rank].post(Whereabouts(Place(1, "forward", 6)), look=True)
        ranks[0].clock.tick()
        ranks[0].post(Whereabouts(Place(1, "forward", 6)), look=True)
        return ranks[0].all_ended

    assert not posted(1, 2)
    ranks[1].last_word(Place(1, "forward", 6), "stalled", "")
    assert not posted(2)
    # Rank 2 is silent from now on, and rank 1 repeats its word.
    until = time.monotonic() + 2 * TIMING.silence
    while time.monotonic() < until:
        ended = posted(1)
        time.sleep(TIMING.beat)
    assert ended
