"""Steps that tell the largest attention logit beside those that do not, where a kernel hides it."""

import finetuning
import jax
import jax.numpy as jnp
import numpy as np
import pretraining
import pytest

from experiments.compiled import measure
from experiments.language import attention
from experiments.pretrain.step import Trainer

CLIP = 0.5


def kernel(q, k, v, segments, threshold):
    """Attention that tells the log-sum-exp of its logits, and nothing else of them."""
    mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None]
    mixed, logsumexp = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=True, return_residual=True
    )
    return mixed, attention._largest(q, k, segments, logsumexp, threshold)


def stepped(study, arm):
    """The trainer, and state and metrics after a step of each of its programs, plain first."""
    if study == "finetune":
        config = finetuning.training(with_={"clip_threshold": CLIP}, warmup=0)
        trainer = finetuning.Trainer(config, arm, finetuning.NORMED, pretraining.one_device())
        start, windows = lambda: finetuning.start(trainer), trainer.place(finetuning.batch())
    else:
        config = pretraining.training(model=pretraining.DENSE, warmup=0)
        variants = type(config.variants)(clip_threshold=CLIP)
        config = type(config)(**{**vars(config), "variants": variants})
        trainer = Trainer(config, arm, pretraining.one_device(), pretraining.VOCABULARY)
        rows = np.random.default_rng(0).integers(0, pretraining.VOCABULARY, (1, 8, 17))
        start = lambda: trainer.start(0)  # noqa: E731
        windows = jax.device_put(rows.astype(np.int32), trainer.windows)
    return trainer, [
        jax.device_get(trainer.advance(start(), windows, look=look)) for look in (False, True)
    ]


@pytest.fixture
def hidden_logits(monkeypatch):
    monkeypatch.setattr(attention, "_kernel", lambda *_: kernel)


@pytest.mark.parametrize(
    ("study", "arm"), [("finetune", "adamw"), ("pretrain", "adamw"), ("pretrain", "muonclip")]
)
def test_looking_changes_no_update(hidden_logits, study, arm):
    trainer, ((plain, unlooked), (looking, looked)) = stepped(study, arm)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(looking), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert looked["max_logit"] > CLIP
    if arm == "muonclip":  # it clips, and so it knows
        assert unlooked["max_logit"] == pytest.approx(looked["max_logit"], rel=1e-5)
    else:
        assert np.isnan(unlooked["max_logit"])
        more = measure(trainer.looking).flops - measure(trainer.program).flops
        assert more >= 2 * 8 * 4 * 16 * 16 * 8  # a product of queries and keys a layer
    for name in ("loss", "gradient_norm"):
        assert unlooked[name] == pytest.approx(looked[name], rel=1e-6)


def test_a_clip_takes_bounds_below_its_threshold(hidden_logits):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8))
    with jax.set_mesh(pretraining.one_device()):
        _, exact = attention.causal_attention(q, k, v)
        threshold = float(jnp.median(exact))
        _, found = attention.causal_attention(q, k, v, threshold=threshold)
        _, bound = attention.causal_attention(q, k, v, threshold=np.inf)
    np.testing.assert_allclose(found[exact > threshold], exact[exact > threshold], rtol=1e-6)
    assert jnp.all((bound >= exact) & (bound <= exact + np.log(16)))
    known = attention.largest_known({"attention": found}, threshold)
    assert known == pytest.approx(float(exact.max()))
    assert np.isnan(attention.largest_known({"attention": found}, float(exact.max()) + 9))
    assert np.isnan(attention.largest_known({}, None))


def test_where_logits_are_at_hand_there_is_one_program():
    trainer = finetuning.trainer_of(finetuning.training())
    assert attention.shows_logits(trainer.mesh, 16, 8, jnp.float32)
    assert trainer.looking is trainer.program
