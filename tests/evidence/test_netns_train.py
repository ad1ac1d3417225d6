"""Training over namespaces: the loss must fall in both stages."""

from tests.evidence import netns_train


def test_training_must_fall_in_both_stages() -> None:
    """Fails if a loss that rises, stays or is missing in one stage passes for one that falls."""

    def ok(lighthouse: list[float], dense: list[float]) -> list[bool]:
        stages = {"lighthouse": lighthouse, "dense": dense}
        steps = [
            {"stage": stage, "loss": loss, "seconds": 1.0}
            for stage, losses in stages.items()
            for loss in losses
        ]
        return [row["ok"] for row in netns_train.falls({"history": {"steps": steps}})]

    assert ok([5, 4, 4.5, 3], [3.2, 3, 2.9]) == [True, True]
    assert ok([5, 4, 3], [3, 2, 3]) == [True, False]
    assert ok([5, 6], [3, 2]) == [False, True]
    assert ok([5, float("nan")], []) == [False, False]
