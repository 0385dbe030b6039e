"""The callback between a Trainer and a regularizer: optimizer, checkpoints, logs."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .... import SaliencyRegularizer
from ....errors import SaliencyRegError, StateMismatchError, WrongTypeError
from ...shared.libraries import need
from ...shared.report_figures import figures_of
from ..errors import UnsupportedTrainerError

_trainer_callback = need("transformers").trainer_callback
#: Under which the state is kept in ``trainer_state.json``.
STATE_KEY = "SaliencyRegularizer"
_TRAINER_STATE = "trainer_state.json"
logger = logging.getLogger("saliency_reg")


class SaliencyCallback(_trainer_callback.TrainerCallback, _trainer_callback.ExportableState):  # type: ignore[misc,name-defined]
    """Lets the relations follow the Trainer's optimizer, keeps them in checkpoints, and writes figures into the logs.

    The state is part of ``trainer_state.json``, which a Trainer writes last: a checkpoint that has it is whole. A run that
    is resumed from a checkpoint without it is refused.
    """

    def __init__(self, regularizer: SaliencyRegularizer | None = None, *, log_pairs: int = 0) -> None:
        if regularizer is None:
            raise UnsupportedTrainerError(
                f"{type(self).__name__} needs the regularizer as its first argument. If this comes from "
                "restore_callback_states_from_checkpoint=True, which builds callbacks anew: leave that out, the "
                "regularizer's state is restored from the checkpoint in any case."
            )
        if not isinstance(regularizer, SaliencyRegularizer):
            raise WrongTypeError(
                f"regularizer must be a SaliencyRegularizer, found {type(regularizer).__name__}. Use "
                "saliency_regularizer(model, tasks=...), or model.regularizer() of a MultiTaskModel."
            )
        if isinstance(log_pairs, bool) or not isinstance(log_pairs, int) or log_pairs < 0:
            raise WrongTypeError(f"log_pairs must be a whole number from 0 on, found {log_pairs!r}.")
        self.regularizer = regularizer
        self.log_pairs = log_pairs
        #: Whether a Trainer calls this object.
        self.is_callback = False
        #: Processes of the training.
        self.processes = 1
        #: Whether the Trainer multiplies a loss by the number of processes.
        self.averages_over_devices = False
        #: Micro-batches of the present optimizer step.
        self.micro_batches = 1
        self._accumulation = 1
        self._updates_per_epoch: int | None = None
        self._last_of_epoch = 1
        self._update = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.regularizer.tasks)} tasks)"

    # What a Trainer calls.

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a Trainer calls this object, as it is among its callbacks."""
        self.is_callback = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Follow the optimizer, and take up the state of the checkpoint that the run is resumed from.

        Raises:
            UnsupportedTrainerError: an engine whose steps cannot be followed, a compiled model, or a checkpoint without our
                state.
            StateMismatchError: the state of other tasks or settings.
        """
        self.is_callback = True
        if kwargs.get("model") is not None:
            check_attached(self.regularizer, kwargs["model"])
        self._follow(args, kwargs.get("optimizer"))
        self.processes = int(getattr(args, "world_size", 1))
        self.averages_over_devices = bool(getattr(args, "average_tokens_across_devices", False))
        self._accumulation = int(args.gradient_accumulation_steps)
        self._count_batches(kwargs.get("train_dataloader"))
        self._update = 0
        if state.global_step:
            self._restore(state)
            if self._updates_per_epoch is not None and not args.ignore_data_skip:
                self._update = state.global_step % self._updates_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the micro-batches of the step that begins."""
        self._update += 1
        last = self._update == self._updates_per_epoch
        self.micro_batches = self._last_of_epoch if last else self._accumulation

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps of the next epoch anew."""
        self._update = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go back to the relations of the best checkpoint, if its weights were loaded."""
        best = getattr(state, "best_model_checkpoint", None)
        if not getattr(args, "load_best_model_at_end", False) or best is None:
            return
        path = Path(best, _TRAINER_STATE)
        if not path.exists():
            logger.warning(
                "The best checkpoint %s has no %s: the relations are those of the last step.", best, path.name
            )
            return
        saved = _saved_state(json.loads(path.read_text(encoding="utf-8")).get("stateful_callbacks"))
        if saved is None:
            logger.warning("The best checkpoint %s has no relations: they are those of the last step.", best)
            return
        self._load(saved)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the figures of the latest step beside the loss."""
        if not isinstance(logs, dict) or "loss" not in logs:
            return
        figures = self.figures()
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    # What this package calls.

    def figures(self) -> dict[str, float]:
        """Return ``saliency/penalty``, ``saliency/share``, ``saliency/distance_mean``, ..."""
        report = self.regularizer.report
        return {} if report is None else figures_of(report, self.log_pairs, "saliency")

    def state(self) -> dict[str, Any]:
        """Return the state of the regularizer for ``trainer_state.json``, bit for bit."""
        buffer = io.BytesIO()
        torch.save({name: value.cpu() for name, value in self.regularizer.state_dict().items()}, buffer)
        # Trainer files it under the name of this class; it must be found from another class, too.
        return {"args": {}, "attributes": {}, STATE_KEY: base64.b64encode(buffer.getvalue()).decode("ascii")}

    def _restore(self, state: Any) -> None:
        saved = _saved_state(state.stateful_callbacks)
        if saved is None:
            raise UnsupportedTrainerError(
                f"this run goes on from a checkpoint at step {state.global_step} that has no state of a "
                "SaliencyRegularizer: its relations would begin anew. Resume from a checkpoint that was written with the "
                "regularizer, or begin a new run: Trainer.train() without resume_from_checkpoint, from "
                "from_pretrained(the checkpoint)."
            )
        self._load(saved)
        # Not under the name of another class, if it was written by one.
        for name in [name for name, kept in state.stateful_callbacks.items() if _is_ours(kept)]:
            del state.stateful_callbacks[name]
        state.stateful_callbacks[type(self).__name__] = self.state()

    def _load(self, saved: str) -> None:
        loaded = torch.load(io.BytesIO(base64.b64decode(saved)), weights_only=True)
        try:
            self.regularizer.load_state_dict(loaded)
        except SaliencyRegError:
            raise
        except RuntimeError as error:
            raise StateMismatchError(
                f"the checkpoint's state does not fit this regularizer ({error}). Build it with the tasks, relations and "
                "surgery of the run that was saved."
            ) from error

    def _follow(self, args: Any, optimizer: Any) -> None:
        if getattr(args, "deepspeed", None) or "deepspeed" in type(optimizer).__module__.lower():
            raise UnsupportedTrainerError(
                "DeepSpeed updates the parameters by itself, and no hook of a torch optimizer tells when. Train with DDP or "
                "FSDP2, or write a loop with accelerate and call regularizer.step() after each update."
            )
        if getattr(args, "torch_compile", False):
            raise UnsupportedTrainerError(
                "torch_compile=True compiles the whole model, and compiled heads have no second derivative. Leave it out, "
                "and compile the encoder alone: model.encoder.compile(), or model.bert.compile() of a BERT classifier."
            )
        if int(getattr(args, "n_gpu", 1)) > 1:
            raise UnsupportedTrainerError(
                f"this Trainer uses {args.n_gpu} GPUs by DataParallel, which runs copies of the model that are not watched. "
                "Start it with: torchrun --nproc_per_node "
                f"{args.n_gpu} script.py (or set CUDA_VISIBLE_DEVICES to one GPU)."
            )
        if optimizer is None:
            raise UnsupportedTrainerError(
                "the Trainer has no optimizer when its training begins, and the relations have nothing to follow. Build the "
                "regularizer with optimizer=, and pass optimizers=(optimizer, None) to the Trainer."
            )
        self.regularizer.attach_optimizer(optimizer)

    def _count_batches(self, loader: Any) -> None:
        try:
            batches = len(loader)
        except TypeError:  # a stream: nobody knows which step is its last
            self._updates_per_epoch = None
            return
        self._updates_per_epoch = max(math.ceil(batches / self._accumulation), 1)
        self._last_of_epoch = batches % self._accumulation or self._accumulation


def check_attached(regularizer: SaliencyRegularizer, model: Any) -> None:
    """Raise :class:`UnsupportedTrainerError` if the regularizer is not on the model that is trained."""
    if not regularizer.heads:
        raise UnsupportedTrainerError(
            "the regularizer is attached to no model (it was removed, or built without one). Use "
            "saliency_regularizer(model, tasks=...) with the model of this Trainer."
        )
    inside = {id(module) for module in model.modules()}
    if any(id(head) not in inside for head in regularizer.heads):
        raise UnsupportedTrainerError(
            "the regularizer is attached to another model than that of this Trainer, so that its penalty would train "
            "nothing here. Attach it to the model that you pass as model=."
        )


def _is_ours(kept: Any) -> bool:
    return isinstance(kept, Mapping) and STATE_KEY in kept


def _saved_state(callbacks: Any) -> str | None:
    """Return what a checkpoint keeps of a regularizer, whichever class of this package wrote it."""
    found = [kept[STATE_KEY] for kept in (callbacks or {}).values() if _is_ours(kept)]
    return found[-1] if found else None
