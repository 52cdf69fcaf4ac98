import warnings

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

from icl.analysis.gaussian_process import PUBLISHED_PRIOR, CurvePrior, fit_curve, smooth_curve

X = np.sort(np.random.default_rng(0).uniform(0, 13, 23))
CURVE = 50 * np.tanh(X - 6)
NOISY = CURVE + 3 * np.random.default_rng(1).standard_normal(X.size)
AT = np.linspace(-0.5, 13.5, 29)


@pytest.mark.parametrize(("correlation", "kernel"), [("matern52", Matern(1.0, nu=2.5)), ("rbf", RBF(1.0))])
def test_posterior_and_likelihood_are_those_of_an_independent_implementation(correlation, kernel):
    fit = fit_curve(X, NOISY, 0.0, CurvePrior(correlation))
    kernel = kernel.clone_with_theta(np.log([fit.length_scale]))
    theirs = GaussianProcessRegressor(
        ConstantKernel(fit.amplitude**2) * kernel, alpha=fit.noise_variance[0], optimizer=None
    ).fit(X[:, None], NOISY - fit.offset)
    mean, std = theirs.predict(AT[:, None], return_std=True)
    np.testing.assert_allclose(fit.mean(AT), mean + fit.offset, atol=1e-5)
    np.testing.assert_allclose(fit.std(AT), std, atol=1e-4)
    assert fit.log_marginal_likelihood == pytest.approx(theirs.log_marginal_likelihood_value_, abs=1e-6)


@pytest.mark.parametrize(("correlation", "kernel"), [("matern52", Matern(1.0, nu=2.5)), ("rbf", RBF(1.0))])
def test_hyperparameters_maximise_the_likelihood(correlation, kernel):
    fit = fit_curve(X, NOISY, 0.0, CurvePrior(correlation))
    scale = NOISY.std()
    search = ConstantKernel(1.0, (1e-3, 1e3)) * kernel + WhiteKernel(0.01, (1e-10, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        best = GaussianProcessRegressor(search, n_restarts_optimizer=5, random_state=0).fit(
            X[:, None], (NOISY - NOISY.mean()) / scale
        )
    highest = best.log_marginal_likelihood_value_ - X.size * np.log(scale)
    assert fit.log_marginal_likelihood >= highest - 0.01


@pytest.mark.parametrize("correlation", ["matern52", "rbf"])
def test_slope_is_the_derivative_of_the_mean(correlation):
    fit = fit_curve(X, NOISY, 1.0, CurvePrior(correlation))
    step = 1e-4
    np.testing.assert_allclose(fit.slope(AT), (fit.mean(AT + step) - fit.mean(AT - step)) / (2 * step), atol=1e-5)


@pytest.mark.parametrize("correlation", ["matern52", "rbf"])
def test_draws_have_the_posterior_moments_and_consistent_slopes(correlation):
    fit = fit_curve(X, NOISY, 3.0, CurvePrior(correlation))
    num = 4000
    values, slopes = fit.sample(AT, num, np.random.default_rng(0))
    for drawn, mean, std in ((values, fit.mean(AT), fit.std(AT)), (slopes, fit.slope(AT), fit.slope_std(AT))):
        assert (np.abs(drawn.mean(axis=0) - mean) < 5 * std / np.sqrt(num)).all()
        np.testing.assert_allclose(drawn.std(axis=0), std, rtol=5 / np.sqrt(2 * num))
    fine = np.linspace(2, 4, 201)
    values, slopes = fit.sample(fine, 3, np.random.default_rng(0))
    rise = np.sum((slopes[:, 1:] + slopes[:, :-1]) / 2, axis=1) * (fine[1] - fine[0])
    np.testing.assert_allclose(values[:, -1] - values[:, 0], rise, atol=0.02 * np.abs(slopes).max())


def test_known_errors_are_believed_and_scatter_beyond_them_is_fitted():
    exact = fit_curve(X, CURVE, 3.0)
    assert np.sqrt(exact.noise_variance) == pytest.approx(3.0, rel=0.01)
    x = np.linspace(0, 13, 150)
    noise = 3 * np.random.default_rng(2).standard_normal(x.size)
    fitted = fit_curve(x, 50 * np.tanh(x - 6) + noise, 1.0)
    # The standard deviation of 150 numbers is known to 1/√300 = 6 %.
    np.testing.assert_allclose(np.sqrt(fitted.noise_variance), 3.0, rtol=0.25)


def test_units_do_not_matter():
    fit, scaled = fit_curve(X, NOISY, 2.0), fit_curve(X, 1000 * NOISY - 7, 2000.0)
    np.testing.assert_allclose(scaled.mean(AT), 1000 * fit.mean(AT) - 7, rtol=1e-6)
    np.testing.assert_allclose(scaled.slope_std(AT), 1000 * fit.slope_std(AT), rtol=1e-6)


def test_published_prior_interpolates():
    fit = fit_curve(X, CURVE, 0.0, PUBLISHED_PRIOR)
    np.testing.assert_allclose(fit.mean(X), CURVE, atol=0.05)
    assert fit.offset == 0


@pytest.mark.parametrize("values", [np.ones(9), np.arange(9.0), np.eye(9)[4], 1e-30 * np.arange(9.0)])
@pytest.mark.parametrize("prior", [CurvePrior(), PUBLISHED_PRIOR])
def test_degenerate_curves_have_a_fit(values, prior):
    fit = fit_curve(np.arange(9.0), values, 0.0, prior)
    assert np.isfinite(fit.mean(AT)).all()
    assert np.isfinite(fit.slope_std(AT)).all()


def test_table_at_the_curves_own_steps():
    steps = np.array([0, 10, 100, 1000, 10_000, 100_000])
    table = smooth_curve(steps, 3 * np.log1p(steps) + 2)
    np.testing.assert_allclose(table["spline"], table["value"], atol=1e-3)
    np.testing.assert_allclose(table["d_dlogt"], 3, atol=0.02)
    np.testing.assert_allclose(table["d_dt"], table["d_dlogt"] / (steps + 1))


@pytest.mark.parametrize(
    ("x", "values", "errors", "message"),
    [
        ([0, 1, 2], [1.0, 2.0], 0.0, "one length"),
        ([0, 1], [1.0, 2.0], 0.0, "three points"),
        ([0, 1, 2], [1.0, 2.0, np.nan], 0.0, "finite"),
        ([0, 1, 2], [1.0, 2.0, 3.0], -1.0, "negative"),
    ],
)
def test_refuses_what_is_not_a_curve(x, values, errors, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(x, values, errors)
