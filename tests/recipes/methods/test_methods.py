"""The registry of methods: every name once, earlier names, and new methods."""

import re

import pytest
import torch
from torch import nn

from recipes import celeba, cifar_grid, cifar_mtl, digits, folder, go_emotions, go_emotions_grid, tabular
from recipes.methods.methods import BASELINE, METHODS, Method, Methods
from recipes.methods.surgeries import MGDA_UB, MGDA_UB_UNIT, PCGRAD, PCGRAD_PARAMETERS
from recipes.runtime.errors import OptionError
from recipes.studies.results_file import ResultsFile, key_of
from saliency_reg import SaliencyRegularizer

#: Name of a version before to what it trained: rule, metric, surgery, and whether there is one backbone.
EARLIER = {
    "single_task": (None, "l1", None, False),
    "hard_sharing": (None, "l1", None, True),
    "uniform": ("fixed", "l1", None, True),
    "srdml_projected": ("projected", "l1", None, True),
    "srdml_entropic": ("entropic", "l1", None, True),
    "srdml_cosine": ("entropic", "cosine", None, True),
    "srdml_sqchordal": ("entropic", "sqchordal", None, True),
    "srdml_authors": ("authors", "l1", None, True),
    "pcgrad": (None, "l1", PCGRAD, True),
    "pcgrad_feature": (None, "l1", PCGRAD, True),
    "pcgrad_parameters": (None, "l1", PCGRAD_PARAMETERS, True),
    "mgda_ub": (None, "l1", MGDA_UB, True),
    "mgda_ub_unit": (None, "l1", MGDA_UB_UNIT, True),
    "srdml_pcgrad": ("entropic", "l1", PCGRAD, True),
    "srdml_pcgrad_feature": ("entropic", "l1", PCGRAD, True),
    "srdml_pcgrad_parameters": ("entropic", "l1", PCGRAD_PARAMETERS, True),
}
NAMES = pytest.mark.parametrize("name", EARLIER)


class TestNames:
    @NAMES
    def test_every_earlier_name_finds_its_method(self, name):
        assert name in METHODS
        method = METHODS[name]
        assert (method.rule, method.metric, method.surgery, method.shared) == EARLIER[name]
        assert METHODS.name_of(name) == method.key
        assert METHODS[method.key] is method

    @NAMES
    def test_old_lines_of_a_results_file_are_found(self, name, tmp_path):
        cell = {"data": "digits", "method": name, "seed": 0}
        present = {**cell, "method": METHODS[name].key}
        assert key_of(cell) == key_of(present)
        ResultsFile(tmp_path / "results.jsonl").add(cell, {"score": 0.5}, {})
        assert ResultsFile(tmp_path / "results.jsonl").get(present) == {"score": 0.5}

    def test_all_together_are_the_methods(self):
        assert {METHODS.name_of(name) for name in EARLIER} < set(METHODS)
        assert len(METHODS) == len(set(METHODS)) == 47
        labels = [method.label for method in METHODS.values()]
        assert len(set(labels)) == len(labels)
        assert METHODS[BASELINE].key == "hard_sharing"

    def test_other_names_are_none(self):
        assert "srdml_l1" not in METHODS
        assert METHODS.name_of("srdml_l1") == "srdml_l1"
        with pytest.raises(KeyError):
            METHODS["srdml_l1"]

    def test_each_tunes_one_thing(self):
        for method in METHODS.values():
            expected = "weight decay" if method.penalty is None else f"strength, {method.penalty}"
            assert (method.parameter == expected) is method.tuned

    def test_one_has_the_defaults_of_the_package_and_is_not_tuned(self):
        (method,) = [own for own in METHODS.values() if not own.tuned and own.rule is not None]
        regularizer = SaliencyRegularizer(None, tasks=["a", "b"])
        assert method.key == "srdml_default"
        assert (method.rule, method.metric) == (regularizer.relations.rule, regularizer.metric)
        assert method.parameter == f"defaults: {method.metric}, {method.rule}, temperature {method.temperature:g}"
        model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "heads": nn.Linear(2, 2)})
        shares = SaliencyRegularizer(model, heads="heads", tasks=["a", "b"]).share, regularizer.share
        assert method.fixed == "{} on heads alone, else {}".format(*shares)

    def test_levels_of_surgery_are_always_named(self):
        for level, surgery in (("feature", PCGRAD), ("parameters", PCGRAD_PARAMETERS)):
            own = [method.label for method in METHODS.values() if method.surgery is surgery]
            named = f"PCGrad ({level})"
            assert set(own) == {named, f"SRDML w/ {named}", f"SRDML, cosine, w/ {named}"}

    @pytest.mark.parametrize(
        "recipe", [celeba, cifar_grid, cifar_mtl, digits, folder, go_emotions, go_emotions_grid, tabular]
    )
    def test_every_recipe_names_them_all(self, recipe, capsys):
        with pytest.raises(SystemExit) as stop:
            recipe.main(["--help"])
        assert stop.value.code == 0
        text = "".join(capsys.readouterr().out.split())
        assert "".join(", ".join(METHODS).split()) in text


class TestNewMethods:
    @pytest.mark.parametrize("key", [*METHODS, *EARLIER])
    def test_name_that_is_taken(self, key):
        before = dict(METHODS)
        for method in (Method(key, "Mine"), Method("mine", "Mine", earlier=(key,))):
            with pytest.raises(OptionError, match=re.escape(f"there is a method '{key}' already")):
                METHODS.add(method)
        assert dict(METHODS) == before

    def test_order_is_that_of_adding(self):
        methods = Methods()
        added = [methods.add(Method(key, key.upper())) for key in ("b", "a")]
        assert list(methods.values()) == added


class TestSurgeries:
    def test_mgda_prefers_small_gradients_and_its_variant_does_not(self):
        gramian = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
        assert MGDA_UB.weighting(0)(gramian).tolist() == pytest.approx([100 / 101, 1 / 101], abs=1e-3)
        assert MGDA_UB_UNIT.weighting(0)(gramian).tolist() == pytest.approx([0.5, 0.5])
