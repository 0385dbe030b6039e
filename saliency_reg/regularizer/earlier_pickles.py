"""Pickles of version 0.1.0: the names that its modules had, and the attributes that its regularizers had."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
from types import ModuleType, SimpleNamespace
from typing import Any

from ..distributed import StaticGraphCheck
from .options import Options
from .reach import Reach
from .sample_mixing import SampleMixing

_TIMM, _TRANSFORMERS = "integrations.timm", "integrations.transformers"
#: Modules that pickles name, and where what they held is now. Those whose name a package has now are found in its face.
_MOVED = {
    "distances": "saliency",
    "evaluation": "saliency.extraction",
    "feature_surgery": "surgery.feature",
    "first_call": "regularizer.sample_mixing",
    "fork_surgery": "surgery.feature.combiner",
    "hooks": "torch_tools.hooks",
    "joined_batch": "distributed",
    "parameter_surgery": "surgery.parameters",
    "pending": "relations",
    "reminders": "regularizer.reminders",
    "sampling": "regularizer.task_sample",
    "schedule": "regularizer.strength",
    "structure": "regularizer.reach",
    "surgery_report": "report",
    "weighting": "surgery.weighting",
    f"{_TIMM}.feature_layout": f"{_TIMM}.backbone.feature_layout",
    f"{_TIMM}.head_config": f"{_TIMM}.model.head_config",
    f"{_TIMM}.pooling": f"{_TIMM}.model.pooling",
    f"{_TIMM}.unmodified": f"{_TIMM}.classifier.unmodified",
    f"{_TRANSFORMERS}.collator": f"{_TRANSFORMERS}.model.collator",
    f"{_TRANSFORMERS}.configuration": f"{_TRANSFORMERS}.model.configuration",
    f"{_TRANSFORMERS}.head_config": f"{_TRANSFORMERS}.model.head_config",
    f"{_TRANSFORMERS}.masked": f"{_TRANSFORMERS}.model.masked",
    f"{_TRANSFORMERS}.output": f"{_TRANSFORMERS}.model.output",
    f"{_TRANSFORMERS}.pooling": f"{_TRANSFORMERS}.model.pooling",
    f"{_TRANSFORMERS}.trainer_callback": f"{_TRANSFORMERS}.trainer.callback",
    f"{_TRANSFORMERS}.trainer_loss": f"{_TRANSFORMERS}.trainer.loss",
    f"{_TRANSFORMERS}.unmodified": f"{_TRANSFORMERS}.classifier.unmodified",
}
#: Classes with another name now, or that are only read from here.
_RENAMED: dict[str, Any] = {
    "SaliencyEvaluator": "SaliencyExtractor",
    "ForkSurgery": "GradientCombiner",
    "OfSquareRoot": "_OfSquareRoot",
    "FirstCall": SimpleNamespace,
    "StrengthSchedule": SimpleNamespace,
}
_PACKAGE = __name__.partition(".")[0]


class _MovedModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # else a package's __path__ would make this one, too
            raise AttributeError(name)
        renamed = _RENAMED.get(name, name)
        if not isinstance(renamed, str):
            return renamed
        target = _MOVED[self.__name__.removeprefix(f"{_PACKAGE}.")]
        return getattr(importlib.import_module(f"{_PACKAGE}.{target}"), renamed)


class FinderOfMovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules above when a pickle asks for them, after all other finders have found none."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        moved = name.startswith(f"{_PACKAGE}.") and name.partition(".")[2] in _MOVED
        return importlib.machinery.ModuleSpec(name, self) if moved else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def as_now(state: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a pickled regularizer, whichever version wrote them."""
    if "_evaluator" not in state:
        return state
    state = dict(state)
    extractor, first_call, schedule = (state.pop(name) for name in ("_evaluator", "_first_call", "_schedule"))
    sampler = state["_modules"]["sampler"]
    arguments = {**vars(extractor), **vars(schedule), **vars(first_call), **state}
    options = Options.among(
        {**arguments, "max_tasks_per_step": sampler.most, "seed": sampler.seed, "run_all_heads": False, "batch_axis": 0}
    )
    for name in ("metric", "reduction", "check_finite"):
        del state[name]
    reach = Reach(None, options.target, options.scalarize)
    reach.form, reach.reaches = state.pop("_form"), state.pop("_reaches_backbone")
    reach._differentiated = first_call._differentiated
    mixing = SampleMixing(options.cross_sample)
    vars(mixing).update({name: value for name, value in vars(first_call).items() if name in vars(mixing)})
    shape, closed_form = state.pop("_feature_shape"), state.pop("_closed_form")
    state.update(
        _options=options,
        _extractor=extractor,
        _joined_batch=state.pop("_joiner"),
        _static_graph=StaticGraphCheck(),
        _mixing=mixing,
        _reach=reach,
        _seen=None if shape is None else (shape, closed_form),
    )
    return state
