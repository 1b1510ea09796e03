"""The recipes of muon_jax/README.md run, each with the trainer that it is about."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from trees import FAMILIES

import muon_jax

TEXT = (Path(muon_jax.__file__).parent / "README.md").read_text(encoding="utf-8")
FIRST, *RECIPES = TEXT.split("\n## ")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# The package that a recipe needs, if the tests do not bring it along.
PACKAGES = {
    "Haiku": "haiku",
    "numpyro": "numpyro",
    "jaxopt": "jaxopt",
    "tunix": "tunix.sft.peft_trainer",
}


class OptimizerConfig:
    """What the recipe uses of Levanter's, whose release does not import on today's JAX."""

    learning_rate, weight_decay = 0.01, 0.1

    @classmethod
    def register_subclass(cls, name):
        return lambda subclass: subclass

    def lr_scheduler(self, num_train_steps):
        return lambda step: self.learning_rate


def title(recipe):
    return re.split(r"[ :\n]", recipe)[0]


def run(recipe):
    """Every name that a recipe makes, after the first block of the file."""
    if package := PACKAGES.get(title(recipe)):
        pytest.importorskip(package)
    names = {}
    for (source,) in map(PYTHON.findall, (FIRST, recipe)):
        exec(source, names)
    return names


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the trainers' own code
@pytest.mark.parametrize("recipe", [text for text in RECIPES if "losses" in text], ids=title)
def test_the_loss_falls(recipe):
    losses = np.asarray(run(recipe)["losses"])
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", [text for text in RECIPES if "losses" not in text], ids=title)
def test_the_place_of_an_optimizer_gets_one_that_routes(recipe, monkeypatch):
    """Without the trainers, which are large: what they call, on params as they have them."""
    levanter = SimpleNamespace(OptimizerConfig=OptimizerConfig)
    monkeypatch.setitem(sys.modules, "levanter", SimpleNamespace(optim=levanter))
    monkeypatch.setitem(sys.modules, "levanter.optim", levanter)
    names = run(recipe)
    if "get_optimizer" in names:
        config = SimpleNamespace(
            opt_type="muon_jax", muon_beta=0.9, muon_weight_decay=0.1, adam_b1=0.9, adam_b2=0.95
        )
        tx, family = names["get_optimizer"](config, lambda step: 0.01), "maxtext_llama_scan"
    else:
        tx, family = names["MuonJax"]().build(100), "levanter_llama"
    shapes = {tuple(row[0].split("/")): row[1] for row in FAMILIES[family]}
    params = unflatten_dict({path: jnp.ones(shape) for path, shape in shapes.items()})
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    assert set(jax.tree.leaves(muon_jax.label_params(params))) == {"muon", "other"}
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(updates))


def test_every_recipe_has_a_test():
    assert len(RECIPES) == 9
    assert all(len(PYTHON.findall(recipe)) == 1 for recipe in (FIRST, *RECIPES))
