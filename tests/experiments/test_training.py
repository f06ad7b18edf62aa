"""When a run counts as lost."""

import math

import pytest

from lora_ga.experiments.suites.training import EXPLODED, WINDOW, DivergedError, check_loss


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_a_run(loss: float) -> None:
    check_loss([3.0, 2.0])
    with pytest.raises(DivergedError, match=f"the training loss is {loss} at step 3"):
        check_loss([3.0, 2.0, loss])


def test_a_loss_that_explodes_ends_a_run_and_a_single_peak_does_not() -> None:
    high = 2.0 * EXPLODED
    check_loss([1.0] * WINDOW + [high])
    check_loss([1.0] + [high] * (WINDOW - 2))  # too early to say
    with pytest.raises(DivergedError, match=f"the training loss is 20 at step {WINDOW + 1}, it began at 1"):
        check_loss([1.0] + [high] * WINDOW)
