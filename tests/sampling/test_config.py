"""Settings of the sampler: two parametrisations, presets, contradictions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl.config import ConfigError
from icl.sampling import AUTOMATIC, CALIBRATED, PUBLISHED, SamplerConfig
from icl.sampling.parametrisation import Physical, Scales, standard_nbeta, to_physical

positive = st.floats(1e-8, 1e8)


@given(positive, positive, positive)
def test_the_conversion_is_the_inverse_of_the_sampler_s_formulas(epsilon, gamma, nbeta):
    back = to_physical(Scales(epsilon * nbeta / 2, epsilon * gamma / 2, epsilon))
    assert (back.epsilon, back.gamma, back.nbeta) == pytest.approx((epsilon, gamma, nbeta), rel=1e-12)


def test_published_constants():
    assert to_physical(Scales(0.01, 0.001, 0.0003)) == Physical(
        0.0003, pytest.approx(6.6667, rel=1e-4), pytest.approx(66.667, rel=1e-4)
    )
    assert PUBLISHED.method == "sgld"
    assert PUBLISHED.step_size == 3e-4
    assert PUBLISHED.localization == pytest.approx(20 / 3)
    assert PUBLISHED.inverse_temperature == pytest.approx(200 / 3)
    assert (PUBLISHED.num_chains, PUBLISHED.num_draws, PUBLISHED.num_burnin_steps) == (10, 5000, 0)


def test_temperature_is_log_n_by_default_and_n_over_it_is_nbeta():
    for temperature in (None, "auto", "adaptive"):
        config = SamplerConfig(epsilon=1e-4, temperature=temperature, eval_dataset_size=1000)
        assert config.inverse_temperature == pytest.approx(1000 / math.log(1000))
    assert SamplerConfig(epsilon=1e-4, temperature=50.0, eval_dataset_size=1000).inverse_temperature == 20.0
    assert standard_nbeta(2**20) == pytest.approx(2**20 / math.log(2**20))


def test_a_given_step_size_means_sgld_and_none_the_underdamped_kernel():
    assert SamplerConfig(epsilon=1e-4).method == "sgld"
    assert SamplerConfig().method == "langevin"
    assert AUTOMATIC.step_size is None
    assert CALIBRATED.method == "langevin"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"epsilon": 1e-4, "noise_scale": 1e-4, "gradient_scale": 1.0, "localization_scale": 1.0},
            ["epsilon", "noise_scale"],
        ),
        ({"noise_scale": 1e-4}, ["gradient_scale", "localization_scale"]),
        ({"epsilon": 1e-4, "nbeta": 3.0, "temperature": 2.0}, ["nbeta=3.0", "temperature=2.0"]),
        ({"epsilon": 1e-4, "temperature": -1.0}, ["temperature", "positive"]),
        ({"sampling_method": "sgld"}, ["epsilon"]),
        ({"epsilon": 1e-4, "eval_batch_size": 7}, ["eval_batch_size=7", "grad_batch_size=1024"]),
        ({"num_chain": 3}, ["num_chain", "num_chains"]),
        ({"eval_dataset_size": 2}, ["eval_dataset_size"]),
    ],
)
def test_contradictions_name_the_keys(settings, words):
    with pytest.raises(ConfigError) as error:
        SamplerConfig.parse(settings)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_the_reference_codes_keys_are_accepted():
    config = SamplerConfig.parse({
        "num_chains": 10, "num_draws": 5000, "num_burn_in": 1000, "num_steps_bw_draws": 1, "sampling_method": "sgld",
        "grad_batch_origin": "eval-dataset", "grad_batch_size": 1024, "gradient_scale": 0.01, "localization_scale": 0.001,
        "noise_scale": 0.0003, "eval_method": "grad-minibatch", "eval_batch_size": 1024, "eval_dataset_size": 1048576,
        "eval_loss_fn": "mse", "eval_metrics": ["likelihood-derived", "batch-loss"], "eval_online": True, "per_token": True,
        "num_evals": 5, "include": ["**"], "exclude": [], "init_seed": 0, "num_init_loss_batches": None, "cores": 1,
    })  # fmt: skip
    assert config.num_steps == 5000, "the misspelt burn-in is ignored, as in the published runs"


def test_a_copy_is_checked_like_a_new_record():
    for update, said in (
        ({"num_drawss": 10}, "did you mean 'num_draws'"),
        ({"num_draws": -3}, "num_draws"),
        ({"nbeta": 100.0, "temperature": 3.0}, "contradict"),
    ):
        with pytest.raises(ConfigError, match=said):
            AUTOMATIC.model_copy(update=update)
    changed = AUTOMATIC.model_copy(update={"num_draws": 7})
    assert changed == SamplerConfig(**{**AUTOMATIC.model_dump(exclude_unset=True), "num_draws": 7})
    assert "eval_dataset_size" not in changed.model_fields_set  # so that n is still taken from the data


def test_a_setting_of_another_kernel_is_told():
    (remark,) = SamplerConfig(epsilon=1e-4, friction=50.0).without_effect()
    assert "friction has no effect" in remark
    assert not SamplerConfig(friction=50.0).without_effect()
    assert SamplerConfig(target_error=0.1, eval_metrics=("weights",)).without_effect()
