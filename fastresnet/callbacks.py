"""Code of a user that a training from Python calls."""

from __future__ import annotations

from pathlib import Path


class StopTraining(Exception):
    """Request to end a run after the epoch; `Callback.epoch_end` raises it."""


class Callback:
    """Receiver of what happens in a run; it ignores what a subclass does not define.

    Of several processes, only the main one calls it.
    """

    def epoch_end(self, row: dict[str, float]) -> None:
        """Receive the line of metrics.csv of an epoch, after its evaluation.

        It has `epoch` (from 1), `step`, `lr`, `train_loss`, `train_accuracy`, loss and accuracy of the evaluated split
        (`test_loss`, `test_accuracy`, with `val_split` `val_loss`, `val_accuracy`) and `overflows`. Accuracies are in
        percent.
        """

    def checkpoint(self, path: Path) -> None:
        """Receive the path of a complete checkpoint: `last.ckpt` in the run folder, which the next one replaces.

        The thread that has written it calls this, beside the training. The next one is not written before it returns.
        """
