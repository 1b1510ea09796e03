"""The READMEs' Python runs, their links lead somewhere, and the table is what the code prints."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muon_jax

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = ["README.md", "muon_jax/README.md"]
READMES += [str(p.relative_to(ROOT)) for p in ROOT.glob("experiments/*/README.md")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


class Layer(nnx.Module):
    """The model of the README's table."""

    def __init__(self, rngs):
        self.embedding = nnx.Embed(512, 64, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, use_bias=True, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(64, rngs=rngs)
        self.up = nnx.Linear(64, 256, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(256, 64, use_bias=False, rngs=rngs)
        self.lm_head = nnx.Linear(64, 512, use_bias=False, rngs=rngs)


def test_the_routing_table_is_what_a_flax_model_prints():
    params = nnx.state(nnx.eval_shape(lambda: Layer(nnx.Rngs(0))), nnx.Param)
    (shown,) = (block for block in blocks("text") if "other" in block and "why" in block)
    assert muon_jax.routing_table(params) == shown.rstrip("\n")


def test_the_first_example_runs():
    params = {"wte": jnp.ones((32, 8)), "mlp": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}
    names = {"params": params, "grads": params}
    exec(blocks("python")[0], names)
    updates, _ = names["tx"].update(params, names["state"], params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert all(jnp.all(update != 0) for update in jax.tree.leaves(updates))


PARAMS = {
    "encoder": {"kernel": jnp.ones((4, 4))},
    "lora_a": jnp.ones((8, 2)),
    "gate": {"kernel": jnp.ones((8, 8))},
    "fused": {"kernel": jnp.ones((8, 3, 8))},
    "backbone": {"kernel": jnp.ones((4, 4))},
    "head": {"kernel": jnp.ones((4, 2))},
}


ROUTES = [
    {"lora_a": "muon", "encoder": "frozen"},
    {"gate": "other", "encoder": "muon"},
    {"backbone": "frozen", "head": "other"},
    {"fused": "muon", "gate": "muon"},
]


@pytest.mark.parametrize("example", range(4))
def test_the_routing_examples_do_what_they_say(example):
    (source,) = (block for block in blocks("python") if "backbone" in block)
    call, params = ast.parse(source).body[example].value, PARAMS
    (routing,) = (ast.unparse(given.value) for given in call.keywords if given.arg == "routing")
    if "backbone" in routing:
        params = {name: PARAMS[name] for name in ("backbone", "head")}
    labels = muon_jax.label_params(params, eval(routing, {"muon_jax": muon_jax}))
    tx = eval(ast.unparse(call), {"muon_jax": muon_jax})
    updates, _ = tx.update(params, tx.init(params), params)
    for name, route in ROUTES[example].items():
        assert set(jax.tree.leaves(labels[name])) == {route}, name
    for label, update in zip(jax.tree.leaves(labels), jax.tree.leaves(updates), strict=True):
        assert bool(jnp.any(update != 0)) == (label != "frozen")


def test_the_test_command_is_one_line_that_ci_can_find():
    commands = re.findall(r"^pip install .*pytest.*$", README, flags=re.MULTILINE)
    assert len(commands) == 1


def test_the_chain_runs():
    (source,) = (block for block in blocks("python") if "optax.chain" in block)
    names = {"muon_jax": muon_jax, "optax": optax}
    exec(source, names)
    params = {"mlp": {"kernel": jnp.ones((8, 16))}}
    updates, _ = names["tx"].update(params, names["tx"].init(params), params)
    assert jnp.any(updates["mlp"]["kernel"])


def test_the_map_is_the_tree():
    """Every module of the package and of the studies, in its folder, and no other."""
    folders, shown = [], set()
    for line in README.split("## Map")[1].split("```")[1].splitlines()[1:]:
        first, *others = line.split()
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if first.endswith("/"):
            folders.append(first)
        shown |= {"".join(folders) + word for word in (first, *others) if word.endswith(".py")}
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("muon_jax", "experiments")
        for path in ROOT.glob(f"{folder}/**/*.py")
        if not path.stem.startswith("__")
    }
    assert shown == modules
    assert len(README.splitlines()) <= 280


def test_a_function_of_the_users_own_is_enough_at_every_place():
    params = {"mlp": {"kernel": jnp.eye(4, 8)}}
    (source,) = (block for block in blocks("python") if "before=" in block)
    names = {"muon_jax": muon_jax}
    exec(source, names)
    gradients = {"mlp": {"kernel": jnp.ones((4, 8))}}
    updates, _ = names["tx"].update(gradients, names["tx"].init(params), params)
    new = optax.apply_updates(params, updates)["mlp"]["kernel"]
    np.testing.assert_allclose(jnp.linalg.norm(new), 2.0, rtol=1e-6)  # on its sphere
    assert float(jnp.abs(new - params["mlp"]["kernel"]).max()) > 0


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_to_files_and_headings(readme):
    text = re.sub(r"```.*?```", "", (ROOT / readme).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text)
    assert links or readme != "README.md"
    for path, heading in links:
        target = (ROOT / readme).parent / path if path else ROOT / readme
        assert target.exists(), f"{readme} links to {path}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in anchors, f"{readme} links to {path}#{heading}"
