"""The methods that are compared, each once: under its name in every command line, table and file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from saliency_reg import SaliencyRegularizer

from ..runtime.errors import OptionError, need
from .loss_weightings import UNCERTAINTY, LossWeighting, torchjd_loss_weighting
from .surgeries import MGDA_UB, MGDA_UB_UNIT, PCGRAD, PCGRAD_PARAMETERS, Surgery, torchjd_surgery

#: Before the names that TorchJD gives.
TORCHJD = "torchjd:"
#: Architectures that methods differ in more than their layers.
HARD_SHARING, SINGLE_TASK, MERGED, SOFT_SHARING = "hard_sharing", "single_task", "merged", "soft_sharing"
BRANCHING, GROUPS_APART = "branching", "groups_apart"
#: Name of the methods below that share by relations between the tasks, all together.
RELATIONS = "relations"


@dataclass(frozen=True)
class Method:
    """A way to train many tasks; each has exactly one hyper-parameter that is tuned, or none.

    Attributes:
        key: its name, the same everywhere.
        label: for people.
        rule: relation rule of SRDML, ``"fixed"`` for uniform weights; without one there is no regularizer.
        metric: of the distance between saliencies.
        surgery: of the task gradients, if any.
        architecture: what the tasks share, one of :data:`recipes.models.architectures.ARCHITECTURES`.
        earlier: names under which older results know it.
        fixed: of a method that is not tuned: what stands in place of the value, in words.
        temperature: of a method that is not tuned.
        head_penalty: kind of a :class:`saliency_reg.HeadPenalty`.
        frozen: the heads are trained on the standardised features of trained hard sharing, which stay as they are.
        rep_mtl: the penalties of a :class:`saliency_reg.RepMTL`.
        gradnorm: the weights of a :class:`saliency_reg.GradNorm`.
        loss_weighting: what makes one loss of those of the tasks; by default their sum.
        decay_of: key of the method whose tuned weight decay it has; by default its own, or the baseline's with a penalty.
        saliency: more options of its :class:`saliency_reg.SaliencyRegularizer`, such as ``pool`` and ``target``.
        view: of the relations between the tasks, a key of :data:`saliency_reg.VIEWS`, along which the network is split.
        permuted: the tasks change places in it, for a control of the same shape.
        selective: estimators are shared by a :class:`saliency_reg.SelectiveSharing`.
    """

    key: str
    label: str
    rule: str | None = None
    metric: str = "l1"
    surgery: Surgery | None = None
    architecture: str = HARD_SHARING
    earlier: tuple[str, ...] = ()
    fixed: str | None = None
    temperature: float | None = None
    head_penalty: str | None = None
    frozen: bool = False
    rep_mtl: bool = False
    gradnorm: bool = False
    loss_weighting: LossWeighting | None = None
    decay_of: str | None = None
    saliency: Mapping[str, Any] = field(default_factory=dict, hash=False)
    view: str | None = None
    permuted: bool = False
    selective: bool = False

    def __post_init__(self) -> None:
        if self.saliency and self.rule is None:
            raise OptionError(
                f"{self.key} has options of the saliency, {', '.join(self.saliency)}, and no penalty that they could be of. "
                "Give it a rule, or leave them out."
            )

    @property
    def shared(self) -> bool:
        """Whether the tasks share a backbone; otherwise each has a network of its own."""
        return self.architecture not in (SINGLE_TASK, MERGED)

    @property
    def by_relations(self) -> bool:
        """Whether who shares what is found in the course of the training."""
        return self.view is not None or self.selective

    @property
    def tuned(self) -> bool:
        """Whether there is anything to tune."""
        return self.fixed is None

    @property
    def penalty(self) -> str | None:
        """The kind of the penalty whose strength is tuned, if there is one."""
        if self.rule is not None:
            return self.metric
        if self.head_penalty is not None:
            return self.head_penalty
        return "rep_mtl" if self.rep_mtl else SOFT_SHARING if self.architecture == SOFT_SHARING else None

    @property
    def parameter(self) -> str:
        """What is tuned; of a method that is not, what it is trained with: results with other defaults are others."""
        if self.architecture == MERGED:
            return "scaling"
        if not self.tuned:
            return f"defaults: {self.metric}, {self.rule}, temperature {self.temperature:g}"
        return "weight decay" if self.penalty is None else f"strength, {self.penalty}"


class Methods(Mapping[str, Method]):
    """All methods by their name; also found by earlier names.

    Args:
        torchjd: ``"torchjd:UPGrad"`` and the like are found, too, though not listed: any weighting of gradients or losses
            that TorchJD has.
        families: names that command lines have for several methods.
    """

    def __init__(self, torchjd: bool = False, families: tuple[str, ...] = ()) -> None:
        self.families = families
        self._methods: dict[str, Method] = {}
        self._of_torchjd: dict[str, Method] = {}
        self._torchjd = torchjd

    @property
    def hint(self) -> str:
        """What else is found by its name, for help texts."""
        found = [f"{TORCHJD}NAME for what TorchJD has, such as {TORCHJD}UPGrad"] if self._torchjd else []
        return "".join(f", or {own}" for own in (*found, *(f"{name} for all of that kind" for name in self.families)))

    def add(self, method: Method) -> Method:
        """Make a method known to every study, table and command line.

        Raises:
            OptionError: its name is taken.
        """
        for name in (method.key, *method.earlier):
            if name in self:
                raise OptionError(f"there is a method {name!r} already. Give the new one another key.")
        self._methods[method.key] = method
        return method

    def __getitem__(self, name: str) -> Method:
        key = self.name_of(name)
        if self._torchjd and key.startswith(TORCHJD):
            if key not in self._of_torchjd:
                self._of_torchjd[key] = _of_torchjd(key)
            return self._of_torchjd[key]
        return self._methods[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def name_of(self, name: str) -> str:
        """The present name of a method with this one, or the name itself if there is none."""
        return next((key for key, method in self._methods.items() if name in method.earlier), name)


def package_defaults() -> dict[str, Any]:
    """Rule, metric and temperature that the package has if nothing is passed, and its shares."""
    regularizer = SaliencyRegularizer(None, tasks=["a", "b"])
    relations = regularizer.relations
    return {
        "rule": relations.rule,
        "metric": regularizer.metric,
        "temperature": relations.temperature,
        "fixed": "0.2 on heads alone, else 0.001",
    }


def _of_torchjd(key: str) -> Method:
    """``torchjd:NAME`` weighs losses, or gradients at the feature map; ``torchjd:NAME@parameters`` those of parameters.

    Raises:
        OptionError: TorchJD has nothing of that name that can be used.
    """
    name = key.removeprefix(TORCHJD)
    if name in need("torchjd.scalarization").__all__:
        weighting = torchjd_loss_weighting(name)
        return Method(key, weighting.label, loss_weighting=weighting)
    surgery = torchjd_surgery(name)
    return Method(key, surgery.label, surgery=surgery)


METHODS = Methods(torchjd=True)
BASELINE = METHODS.add(Method("hard_sharing", "Hard sharing")).key

for _method in (
    Method("single_task", "Single-task", architecture=SINGLE_TASK),
    Method("srdml_uniform", "SRDML, uniform weights", rule="fixed", earlier=("uniform",)),
    Method("srdml_uniform_sqeuclidean", "SRDML, sqeuclidean, uniform weights", rule="fixed", metric="sqeuclidean"),
    Method("srdml_uniform_cosine", "SRDML, cosine, uniform weights", rule="fixed", metric="cosine"),
    Method("srdml_uniform_sqchordal", "SRDML, sqchordal, uniform weights", rule="fixed", metric="sqchordal"),
    Method("srdml_projected", "SRDML, projected", rule="projected"),
    Method("srdml", "SRDML", rule="entropic", earlier=("srdml_entropic",)),
    Method("srdml_default", "SRDML, not tuned", **package_defaults()),
    Method("srdml_sqeuclidean", "SRDML, sqeuclidean", rule="entropic", metric="sqeuclidean"),
    Method("srdml_cosine", "SRDML, cosine", rule="entropic", metric="cosine"),
    Method("srdml_sqchordal", "SRDML, sqchordal", rule="entropic", metric="sqchordal"),
    Method("srdml_authors", "SRDML, authors", rule="authors"),
    Method("pcgrad", PCGRAD.label, surgery=PCGRAD, earlier=("pcgrad_feature",)),
    Method("pcgrad@parameters", PCGRAD_PARAMETERS.label, surgery=PCGRAD_PARAMETERS, earlier=("pcgrad_parameters",)),
    Method("mgda_ub", MGDA_UB.label, surgery=MGDA_UB),
    Method("mgda_ub_unit", MGDA_UB_UNIT.label, surgery=MGDA_UB_UNIT),
    Method("srdml_cosine+pcgrad", f"SRDML, cosine, w/ {PCGRAD.label}", "entropic", "cosine", PCGRAD),
    Method(
        "srdml_cosine+pcgrad@parameters",
        f"SRDML, cosine, w/ {PCGRAD_PARAMETERS.label}",
        "entropic",
        "cosine",
        PCGRAD_PARAMETERS,
    ),
    Method(
        "srdml+pcgrad",
        f"SRDML w/ {PCGRAD.label}",
        rule="entropic",
        surgery=PCGRAD,
        earlier=("srdml_pcgrad", "srdml_pcgrad_feature"),
    ),
    Method(
        "srdml+pcgrad@parameters",
        f"SRDML w/ {PCGRAD_PARAMETERS.label}",
        rule="entropic",
        surgery=PCGRAD_PARAMETERS,
        earlier=("srdml_pcgrad_parameters",),
    ),
    Method("uncertainty", UNCERTAINTY.label, loss_weighting=UNCERTAINTY),
    Method("gradnorm", "GradNorm", gradnorm=True),
    Method("rep_mtl", "Rep-MTL", rep_mtl=True),
    Method("hard_sharing_frozen", "Hard sharing, frozen features", frozen=True, decay_of=BASELINE),
    Method("lasso", "Lasso", head_penalty="lasso"),
    Method("lasso_frozen", "Lasso, frozen features", head_penalty="lasso", frozen=True),
    Method("l21", "L21", head_penalty="l21"),
    Method("l21_frozen", "L21, frozen features", head_penalty="l21", frozen=True),
    Method("mean_regularised", "Mean-regularised", head_penalty="mean"),
    Method("mean_regularised_frozen", "Mean-regularised, frozen features", head_penalty="mean", frozen=True),
    Method("mrn", "MRN", head_penalty="mrn"),
    Method("mtrl", "MTRL", head_penalty="mtrl"),
    Method("mmoe", "MMoE on features", architecture="mmoe"),
    Method("ple", "PLE on features", architecture="ple"),
    Method("cross_stitch", "Cross-stitch", architecture="cross_stitch"),
    Method("soft_sharing", "Soft sharing", architecture=SOFT_SHARING),
    Method(
        "merged_single_task",
        "Merged single-task",
        architecture=MERGED,
        fixed="chosen on validation",
        decay_of="single_task",
    ),
    *(
        Method(f"branch_{view}", f"Branching, {label}", architecture=BRANCHING, view=view)
        for view, label in (
            ("saliency_distance", "saliency distance"),
            ("gradient_cosine", "gradient cosine"),
            ("error_cooccurrence", "error co-occurrence"),
            ("label_correlation", "label correlation"),
            ("tag", "TAG"),
        )
    ),
    Method("branch_random", "Branching, permuted tasks", architecture=BRANCHING, view="tag", permuted=True),
    Method("groups_apart", "Groups apart, TAG", architecture=GROUPS_APART, view="tag"),
    Method("groups_apart_random", "Groups apart, permuted tasks", architecture=GROUPS_APART, view="tag", permuted=True),
    Method("selective_sharing", "Selective sharing", selective=True),
):
    METHODS.add(_method)
