"""The hooks that record the latest forward of a model: its shared feature map, and the outputs of its heads."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import ShardedHeads, is_sharded
from ..torch_tools import ModuleHooks, in_backward, owners_of_hooks, version_of, warn_user
from .aliases import HeadAliases
from .forward import HeadRun, RecordedForward, Ways
from .graph_names import Tracing
from .heads import Heads, comes_from, first_part, goes_on_message, items_per_head, last_part, of_methods
from .heads.attachable import check_attachable
from .linear import weight_as_now
from .lookup import FeatureChoice, NamedFeature, locate_features
from .nested import Item, contents, first_tensor, pick, put, put_argument, tensors_in, why_unusable
from .other_heads import HeadCall, OtherHeads, autocast_as_now
from .places import Place
from .raw_inputs import RawInputs
from .reading import LatestForward, UnreadForwards


class FeatureCapture(LatestForward):
    """Hooks on a model that record the latest forward, until it is read or the next one with gradients begins.

    A forward begins when the model is called, or, for models whose parts are called one by one, when a head runs that has
    run already. With ``run_all``, heads that did not run in it are run when it is read, as those that did were called.
    With ``keep``, the model keeps this object alive. It may be built beside the owners of hooks that it is ``instead_of``,
    which then go.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        aliases: HeadAliases | None = None,
        *,
        run_all: bool = False,
        keep: bool = False,
        instead_of: Sequence[object] = (),
    ) -> None:
        check_attachable(model, heads, run_all=run_all, instead_of=instead_of)
        self.enabled = self._attached = True
        self.heads = heads
        self.run_all = run_all
        #: As the user gave them.
        self.chosen = feature, output
        self._other_heads = OtherHeads(heads)
        self.aliases = HeadAliases(heads) if aliases is None else aliases
        self._output_items = items_per_head(output, heads)
        self._model = weakref.ref(model)
        # With output= it is said what the output is.
        self._goes_on = heads.goes_on if output is None else ()
        self.sharded = ShardedHeads(model, [*heads.modules, *(module for _, _, module in self._goes_on)])
        self._looked_behind = self._told_of_more = False
        self._tracing = Tracing(wanted=not keep)
        self._latest: RecordedForward | None = None
        self._why_none = (
            f"the model has not run a forward yet. Call the model before the regularizer.{of_methods(heads)}"
        )
        self._running = False  # the model's own forward
        self._exception_before: object = None
        features = locate_features(model, feature)
        self.feature_names = [named.name for named in features]
        self._feature_items = [named.items for named in features]
        # All has been checked: nothing was set on the model before this line.
        self._hooks = ModuleHooks(self, keep)
        self._ways = [Ways() for _ in features]
        self._raw_inputs = RawInputs(self.aliases, any(named.port == "input" for named in features) and not keep)
        #: Heads, and whether the model changes in place what they return; not known of those that are not in it.
        self._changes_output: dict[int, bool] = dict.fromkeys(range(len(heads.modules)), False) if keep else {}
        self._unread = UnreadForwards()
        self._least_runs = 1 if heads.columns or run_all else 2  # of a forward that could have been read
        self._set_hooks(model, features)

    @classmethod
    def attached_to(cls, model: nn.Module) -> list[FeatureCapture]:
        """Return the captures whose hooks are on the modules of ``model``."""
        owners = [owner for module in model.modules() for owner in owners_of_hooks(module)]
        return list(dict.fromkeys(owner for owner in owners if isinstance(owner, cls)))

    @property
    def model(self) -> nn.Module | None:
        """The model that the hooks are on; ``None`` if it is gone, or they are."""
        return self._model() if self._attached else None

    def remove(self) -> None:
        self._attached = False
        self._hooks.remove()
        self._forget("the regularizer was removed from the model. Build a new SaliencyRegularizer")

    @property
    def attached(self) -> bool:
        """Whether its hooks are on the model."""
        return self._attached

    def device(self) -> torch.device | None:
        return next((parameter.device for head in self.heads.modules for parameter in head.parameters()), None)

    def describe(self) -> tuple[str, str]:
        """Describe the heads and the feature, for a person."""
        return self.heads.describe(), ", ".join(self.feature_names) or "what the heads are called with"

    def _set_hooks(self, model: nn.Module, features: Sequence[NamedFeature]) -> None:
        # Before FSDP2 gathers what this may free.
        self._hooks.before(model, self._before_model, first=is_sharded(model))
        self._hooks.after(model, self._after_model, always=True)
        for index, named in enumerate(features):
            if named.port == "output":
                self._hooks.after(named.module, self._after_feature, index)
            else:
                self._hooks.before(named.module, self._before_feature, index)
        for index, module in enumerate(self.heads.modules):
            # FSDP2 hands each head a tensor of its own, which comes from the shared one.
            first = first_part(module)
            self._hooks.before(first, self._before_head, index, first=is_sharded(first))
            self._hooks.after(last_part(module), self._after_head, index)
        for index, _, module in self._goes_on:
            self._hooks.before(module, self._before_more, index)
            self._hooks.after(module, self._after_more, index)

    # What the hooks call, in the order in which a forward runs. Checkpointing runs modules again during the backward pass:
    # that is no new forward, but it has to go the way that the forward went.

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.enabled or in_backward():
            return None
        self._running = True
        self.sharded.release()
        self._exception_before = sys.exc_info()[1]
        # A forward without gradients (an evaluation, a teacher's) does not displace one that waits to be read.
        if torch.is_grad_enabled() or self._latest is None or not self._latest.active:
            self._begin().trace = self._tracing.begin(module)
        return self._raw_inputs.replaced(args, kwargs) if torch.is_grad_enabled() else None

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running or in_backward():
            return
        self._running = False
        self._tracing.end()
        exception, before = sys.exc_info()[1], self._exception_before
        self._exception_before = None
        if exception is not None and exception is not before:
            self._forget("the latest forward raised an exception. Call the model again")
        elif self._latest is not None:
            self._latest.complete = bool(self._latest.runs)
            self._latest.returned = None if self._looked_behind else output

    def _after_feature(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        items = self._feature_items[index]
        replaced = self._on_feature(index, pick(output, items), output, None if items else module)
        return None if replaced is None else put(output, items, replaced)

    def _before_feature(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        items = self._feature_items[index] or first_tensor(args, kwargs)[0]
        whole = args if items and isinstance(items[0], int) else kwargs
        feature = pick(whole, items) if items else None
        replaced = None
        if isinstance(feature, Tensor) and feature.is_floating_point() and self._live() and not in_backward():
            replaced = self._raw_inputs.see(self.feature_names[index], feature)
        in_its_place = self._on_feature(index, feature, whole)
        replaced = in_its_place if replaced is None else replaced
        return None if replaced is None else put_argument(args, kwargs, items, replaced)

    def _on_feature(self, index: int, feature: Any, whole: Any, made_by: nn.Module | None = None) -> Tensor | None:
        """Record a named feature; return what takes its place."""
        if not self._live():
            if self.enabled and self._running and self._latest is not None and not in_backward():
                self._latest.without_grad.add(index)
            return None
        if in_backward():
            return self.aliases.of_feature(index, feature, recorded=False) if isinstance(feature, Tensor) else None
        recorded = self._current()
        if not self._running and recorded.runs:
            recorded = self._begin()
        why = why_unusable(feature)
        if why or not isinstance(feature, Tensor) or not feature.is_floating_point():
            name = self.feature_names[index]
            recorded.problem = (
                f"the feature {name!r} {why}."
                if why
                else f"the feature {name!r} is a {type(feature).__name__}, expected a floating-point tensor; found "
                f"{contents(whole)}. Name the part that is one, e.g. 'encoder:output.0' or "
                "'encoder:output.last_hidden_state'."
            )
            return None
        replaced = self.aliases.of_feature(index, feature, recorded=True)
        recorded.features[index] = Place.of(feature if replaced is None else replaced, made_by)
        return replaced

    def _before_head(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._live():
            if self.enabled and not in_backward() and not self._running and self._latest is None:
                self._latest = RecordedForward(active=False)
            return None
        source = first_tensor(args, kwargs)[1]
        if in_backward():
            if source is not None and not source.requires_grad:
                args, kwargs = self.aliases.with_stand_ins(args, kwargs, source, recorded=False)
            return self.aliases.hand_out(index, args, kwargs, (), recorded=False)[0]
        recorded, name = self._forward_of(index, source), self.heads.names[index]
        if why := next(filter(None, map(why_unusable, (*args, *kwargs.values()) if source is None else (source,))), ""):
            recorded.runs[index] = HeadRun(name, None, -1, unusable=why)
            return None
        if self.run_all and source is not None and recorded.call is None:
            recorded.call = args, dict(kwargs), autocast_as_now(source.device.type)
        if source is not None and not source.requires_grad:
            args, kwargs = self.aliases.with_stand_ins(args, kwargs, source)
            source = first_tensor(args, kwargs)[1]
        run = recorded.run_of(name, source)
        run.given = ((), {}) if source is not None else (args, kwargs)
        run.differentiable = sum(one.requires_grad for _, one in tensors_in(args, kwargs))
        if self.observed:
            run.call = HeadCall.of(self.heads.modules[index], args, kwargs, self._output_items[index], source)
        features = [recorded.features[feature].tensor for feature in sorted(recorded.features)]
        (new_args, new_kwargs), run.edge = self.aliases.hand_out(index, args, kwargs, features, recorded=True)
        recorded.runs[index] = run
        recorded.aliased |= new_args is not args or new_kwargs is not kwargs
        return new_args, new_kwargs

    def _forward_of(self, index: int, source: Tensor | None) -> RecordedForward:
        """Return the forward that this head runs in, which begins here where the model is not called as a whole."""
        recorded = self._current()
        if self._running and index in recorded.runs:
            recorded.problem = (
                f"head {self.heads.names[index]!r} ran twice in one forward, so its output is not one per sample. Call "
                "the model once per view, or pass regularizer(outputs=..., features=...)."
            )
        elif not self._running and self.aliases.done:
            return self._begin()
        elif not self._running and (recorded.complete or index in recorded.runs):
            displaced = len(recorded.runs) if recorded.complete else 0
            recorded = self._begin()
            recorded.displaced = displaced
        elif not self._running and source is not None and not self.feature_names and not recorded.may_hold(source):
            others = {**recorded.other_runs, **recorded.runs}
            recorded = self._begin()
            recorded.other_runs = others
        return recorded

    def _after_head(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        recorded = self._latest
        if recorded is None or index not in recorded.runs or not self._live() or in_backward():
            return None
        run, items = recorded.runs[index], self._output_items[index]
        run.output = pick(output, items)
        run.whole, run.weight = not items and module is self.heads.modules[index], weight_as_now(module)
        run.ended = True
        if run.output is None and items:
            recorded.problem = (
                f"output={items[0]!r} is no part of what head {self.heads.names[index]!r} returned: {contents(output)}. "
                "Pass a key, an attribute or an index of it."
            )
        if isinstance(run.output, Tensor):
            run.output_version = version_of(run.output)
            if self._changes_output.get(index, True):
                run.kept = run.output.clone()
        run.version_after = -1 if run.source is None else version_of(run.source)
        named = recorded.features.get(0)
        return self.aliases.after_head(index, output, run, items, None if named is None else named.tensor)

    def _before_more(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        run = None if self._latest is None else self._latest.runs.get(index)
        if run is not None and self._live() and not in_backward():
            run.goes_on = comes_from(first_tensor(args, kwargs)[1], run.output)

    def _after_more(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        run = None if self._latest is None else self._latest.runs.get(index)
        if run is None or not run.goes_on:
            return None
        run.goes_on = False
        if not self._told_of_more:
            self._told_of_more = True
            warn_user(goes_on_message(self.heads.tasks[index], run.name, index, module, self._goes_on))
        return self._after_head(index, module, args, output)

    def _live(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def _current(self) -> RecordedForward:
        latest = self._latest
        return latest if latest is not None and latest.active else self._begin()

    def _begin(self) -> RecordedForward:
        before, training = self._latest, first_part(self.heads.modules[0]).training
        if torch.is_grad_enabled():
            self._kept = None
        self._latest = RecordedForward(active=torch.is_grad_enabled(), training=training)
        if before is not None and before.active and not before.over and len(before.runs) >= self._least_runs:
            self._unread.add(before.training)
        self.aliases.begin_forward(self._latest.active)
        return self._latest
