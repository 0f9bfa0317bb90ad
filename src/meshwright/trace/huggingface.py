"""Recording a Hugging Face Trainer: `Trainer(..., callbacks=[RecordCallback("runs/mine")])`."""

import os
from contextlib import AbstractContextManager
from typing import Any

from meshwright.spec import SettingError
from meshwright.trace.recording import Recording
from meshwright.trace.start import record

try:
    import transformers
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise SettingError(
        "meshwright.trace.huggingface", f"needs transformers ({error})", "pip install transformers"
    ) from None


class RecordCallback(TrainerCallback):
    """Records the training of a Trainer into the run folder `run`; options: those of record().

    A step's loss is there where the Trainer logs it (logging_steps), as a mean since it last did; tokens are where it
    counts them (include_num_input_tokens_seen) or tokens_per_step is given.
    """

    def __init__(self, run: str | os.PathLike[str], **options: Any) -> None:
        self._run = run
        self._options = options
        self._recording: Recording | None = None
        self._outside: AbstractContextManager[None] | None = None
        # A step that is logged ends with its log, whose loss the Trainer waits for.
        self._logging = False
        self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Raises SettingError as record() does."""
        options = {"trainer": f"Hugging Face Trainer, transformers {transformers.__version__}", **self._options}
        options.setdefault("first_step", state.global_step)
        self._tokens = int(state.num_input_tokens_seen)
        self._recording = record(self._run, others.get("model"), others.get("optimizer"), **options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step's boundary, unless its log is still to come."""
        self._logging = control.should_log
        if not self._logging:
            self._end_step(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """What the Trainer knows of the step; and its boundary."""
        if self._logging and self._recording is not None:
            told = logs or {}
            self._recording.log(
                loss=told.get("loss"), gradient_norm=told.get("grad_norm"), learning_rate=told.get("learning_rate")
            )
            self._end_step(state, control)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where the Trainer did not log after all, or evaluated nothing."""
        if self._logging:
            self._end_step(state, control)
        self._enter("")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The Trainer may evaluate and save between epochs."""
        self._go_out(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluation is over; a save may follow."""
        if self._outside is not None:
            self._enter("checkpoint" if control.should_save else "")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The save is over."""
        self._enter("")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The end."""
        self._enter("")
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.close("stopped" if state.global_step < state.max_steps else "finished")

    def _end_step(self, state: TrainerState, control: TrainerControl) -> None:
        self._logging = False
        if self._recording is None:
            return
        seen, self._tokens = int(state.num_input_tokens_seen) - self._tokens, int(state.num_input_tokens_seen)
        self._recording.next_step(tokens=seen or None)
        self._go_out(control)

    def _go_out(self, control: TrainerControl) -> None:
        if control.should_evaluate:
            self._enter("evaluation")
        elif control.should_save:
            self._enter("checkpoint")

    def _enter(self, name: str) -> None:
        """Leave what is outside of the steps and goes on, and enter the next, "" for none."""
        outside, self._outside = self._outside, None
        if outside is not None:
            outside.__exit__(None, None, None)
        if name and self._recording is not None:
            self._outside = self._recording.span(name)
            self._outside.__enter__()
