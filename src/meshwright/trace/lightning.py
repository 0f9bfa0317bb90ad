# pyright: reportMissingImports=false
# One of the two packages is enough.
"""Recording a Lightning Trainer: `Trainer(..., callbacks=[RecordCallback("runs/mine")])`, of lightning or
pytorch_lightning."""

import os
import sys
from contextlib import AbstractContextManager
from typing import Any

from meshwright.spec import SettingError
from meshwright.trace.recording import Recording
from meshwright.trace.start import record

try:
    # One package under two names, whose classes differ: the one that the program has loaded.
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        import pytorch_lightning as package
    else:
        import lightning.pytorch as package
except ImportError as error:
    raise SettingError("meshwright.trace.lightning", f"needs lightning ({error})", "pip install lightning") from None

Callback: Any = package.Callback


class RecordCallback(Callback):
    """Records the training of a Trainer into the run folder `run`; options: those of record().

    A step ends with the batch in which an optimizer steps; its loss is what training_step returned for that batch.
    """

    def __init__(self, run: str | os.PathLike[str], **options: Any) -> None:
        self._run = run
        self._options = options
        self._recording: Recording | None = None
        self._validation: AbstractContextManager[None] | None = None
        self._steps = 0
        self._save: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises SettingError as record() does."""
        options = {"trainer": f"Lightning {package.__version__}", **self._options}
        options.setdefault("first_step", trainer.global_step)
        self._steps = trainer.global_step
        self._recording = recording = record(self._run, pl_module, list(trainer.optimizers), **options)
        # No hook tells when a checkpoint is written.
        self._save = save = trainer.save_checkpoint

        def save_outside(*arguments: Any, **others: Any) -> Any:
            with recording.span("checkpoint"):
                return save(*arguments, **others)

        trainer.save_checkpoint = save_outside

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step's boundary, where the optimizer has stepped."""
        if self._recording is not None and trainer.global_step != self._steps:
            self._steps = trainer.global_step
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            self._recording.next_step(loss=loss)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Evaluation begins."""
        if self._recording is not None:
            self._validation = self._recording.span("evaluation")
            self._validation.__enter__()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluation is over."""
        validation, self._validation = self._validation, None
        if validation is not None:
            validation.__exit__(None, None, None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The end."""
        recording = self._let_go(trainer)
        if recording is not None:
            recording.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training breaks off."""
        recording = self._let_go(trainer)
        if recording is not None:
            recording.__exit__(type(exception), exception, None)

    def _let_go(self, trainer: Any) -> Recording | None:
        self.on_validation_end(trainer, None)
        recording, self._recording = self._recording, None
        if recording is not None:
            trainer.save_checkpoint = self._save
        return recording
