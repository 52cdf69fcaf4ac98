"""All settings of a learning-coefficient estimate, typed and checked. Contradictions are errors."""

from typing import Literal, Self

from pydantic import Field, model_validator

from icl.config import Settings
from icl.sampling.kernels import KERNELS
from icl.sampling.parametrisation import Physical, Scales, standard_nbeta, to_physical

NoiseLaw = Literal["independent", "sequential"]
EvalMethod = Literal["grad-minibatch", "new-minibatch", "fixed-minibatch", "dataset"]
EvalMetric = Literal["likelihood-derived", "singular-fluctuation", "batch-loss", "weights", "covariance", "hessian"]

_SCALES = ("gradient_scale", "localization_scale", "noise_scale")
_PHYSICAL = ("epsilon", "gamma", "temperature", "nbeta")
_OF_KERNELS = {
    "friction": "langevin",
    "rmsprop_decay": "rmsprop_sgld",
    "rmsprop_stability": "rmsprop_sgld",
    "diffusion_factor": "sgnht",
}
"""Settings of one kernel."""


PUBLISHED_LANGUAGE_ESTIMATOR = "published-language"


class SamplerConfig(Settings):
    """How to sample around w*, the trained weights, and what to measure on the draws.

    A sampler has three constants: the step size ε, the localisation γ (how strongly chains are pulled back to w*), and the inverse
    temperature nβ (the factor of the loss). Give them as `epsilon`, `gamma` and `nbeta` (or `temperature`), or as `gradient_scale`,
    `localization_scale` and `noise_scale` (see `icl.sampling.parametrisation`). With a step size, the kernel is plain SGLD. Without one it
    is the underdamped kernel of `icl.sampling.langevin`, and short pilot chains find its step size (`icl.sampling.tuning`).
    """

    later = (
        "kernel_constants", "control_variates", "test_target", "target_error", "max_draws", "batch_order", "noise_law",
        "localization_units", "estimator", "grad_accumulation_steps", "autocast", "matmul_precision",
    )  # fmt: skip

    sampling_method: str = Field(
        default="auto",
        description=f"the kernel, the rule of a chain's step: {', '.join(KERNELS)}; auto: sgld if a step size is given, otherwise langevin",
    )
    num_chains: int = Field(default=8, ge=1, description="E, the number of chains")
    num_draws: int = Field(default=1000, ge=1, description="recorded draws of each chain")
    num_burnin_steps: int = Field(default=0, ge=0, description="steps before the first draw")
    num_steps_bw_draws: int = Field(default=1, ge=1, description="steps from one draw to the next")
    num_burn_in: int | None = Field(
        default=None,
        description="ignored, with a note in the log, as in the code of the published runs. Use num_burnin_steps",
    )

    epsilon: float | None = Field(
        default=None, gt=0, description="ε, the step size; null: pilot chains find it (only with langevin)"
    )
    gamma: float | None = Field(
        default=None,
        ge=0,
        description="γ, the localisation: how strongly chains are pulled back to w*; null: 1, or if pilot chains find the step size, "
        "max(1, λ_max / 44100) with λ_max the largest curvature that they meet",
    )
    localization_units: Literal["absolute", "relative"] = Field(
        default="absolute",
        description="units of weights for γ and ε. absolute: the weights as they are; relative: each group of weights in units of its own "
        "root mean square at w*",
    )
    nbeta: float | None = Field(
        default=None,
        ge=0,
        description="nβ, the inverse temperature: the factor of the loss; null: eval_dataset_size / temperature",
    )
    temperature: float | Literal["auto", "adaptive"] | None = Field(
        default=None, description="T = 1/β; auto, adaptive and null: log eval_dataset_size"
    )
    gradient_scale: float | None = Field(
        default=None,
        ge=0,
        description="ε nβ / 2, the factor of the gradient in a step; give it and the next two instead of ε, γ, nβ",
    )
    localization_scale: float | None = Field(
        default=None, ge=0, description="ε γ / 2, the factor of the distance from w* in a step"
    )
    noise_scale: float | None = Field(default=None, gt=0, description="ε, the variance of a step's noise")

    weight_decay: float = Field(
        default=0.0, ge=0, description="pull of the weights towards zero, in addition to γ's towards w*"
    )
    noise_level: float = Field(
        default=1.0,
        ge=0,
        description="factor of the noise in a step; 1: the sampler's own noise, 0: no noise, which is gradient descent",
    )
    bounding_box_size: float | None = Field(
        default=None, gt=0, description="largest distance of each weight from its value at w*; null: none"
    )
    rmsprop_decay: float = Field(
        default=0.99, gt=0, lt=1, description="decay per step of the mean squared gradient (rmsprop_sgld)"
    )
    rmsprop_stability: float = Field(
        default=0.1, gt=0, description="added to the root of the mean squared gradient (rmsprop_sgld)"
    )
    diffusion_factor: float = Field(default=0.01, gt=0, description="D, the thermostat's diffusion (sgnht)")
    friction: float | None = Field(
        default=None, gt=0, description="η, the friction (langevin); null: critical damping of the localisation"
    )
    kernel_constants: dict[str, float] = Field(
        default={}, description="constants of a kernel that have no setting of their own"
    )

    control_variates: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="subtract from each gradient the gradient of the same batch at w*, which removes much of the mini-batch noise; auto: "
        "only if pilot chains find the step size, and find that this is worth its cost",
    )
    test_target: bool = Field(
        default=True,
        description="spend up to a fifth more gradients on tests whether the chains sample the target density",
    )
    target_error: float | None = Field(
        default=None,
        gt=0,
        description="after num_draws, take more draws until the standard error is below this fraction of the estimate, or below ten times "
        "this number",
    )
    max_draws: int | None = Field(
        default=None, ge=1, description="with target_error, the most draws of each chain; null: four times num_draws"
    )

    grad_batch_origin: Literal["infinite-dataset", "eval-dataset"] = Field(
        default="infinite-dataset",
        description="where the batches of gradients come from: new data, or the evaluation set",
    )
    grad_batch_size: int = Field(default=1024, ge=1, description="sequences in the batch of a gradient")
    batch_order: Literal["auto", "in turn", "random"] = Field(
        default="auto",
        description="order of the batches of a list or loader. in turn: cyclic; random: drawn at random at every step, so that their order "
        "cannot drive a chain; auto: random if pilot chains find the step size, otherwise in turn",
    )
    grad_accumulation_steps: int = Field(
        default=1,
        ge=1,
        description="number of pieces in which a batch goes through the model, to save memory",
    )
    autocast: Literal["bf16"] | None = Field(
        default=None,
        description="bf16: run the model, also at w*, in bfloat16 by PyTorch's autocast; null: in its own precision",
    )
    matmul_precision: Literal["highest", "tf32x3", "tf32"] = Field(
        default="highest",
        description="of matrix products, also at w*. highest: float32; tf32: factors rounded to 10 bits, several times as fast on a GPU's "
        "tensor cores; tf32x3: three such products, nearly float32. Elsewhere the roundings are imitated, slowly",
    )
    independent_batches: bool = Field(
        default=False,
        description="false: all chains see the same batch at a step; true: each chain has its own, from `batches(step, chain seed)`",
    )

    eval_method: EvalMethod = Field(
        default="grad-minibatch",
        description="where the loss of a draw is taken. grad-minibatch: on the gradient's batch, before the update; "
        "new-minibatch: on a new batch, after it; fixed-minibatch: always on the first evaluation batch; dataset: on the whole "
        "evaluation set",
    )
    eval_batch_size: int | None = Field(
        default=None, ge=1, description="sequences of an evaluation batch; null: grad_batch_size"
    )
    eval_dataset_size: int = Field(
        default=8192, ge=1, description="n: sequences of the evaluation set, and the n of nβ = n / T"
    )
    eval_loss_fn: Literal["mse", "subsequence-mse"] = Field(
        default="mse",
        description="the loss that drives the chain. mse: the mean over all tokens; subsequence-mse: the mean over the first k "
        "tokens, with a new k from 1..K at every step",
    )
    eval_metrics: tuple[EvalMetric, ...] = Field(
        default=("likelihood-derived",), description="what is computed from the draws, besides the estimate λ̂ itself"
    )
    eval_online: bool = Field(default=False, description="whether the estimate after every draw is kept as a table")
    per_token: bool = Field(
        default=False,
        description="ignored; the reference code's sweep files have it. λ̂ of each token is always reported",
    )
    num_evals: int = Field(
        default=5, ge=1, description="number of eigenvalues of a covariance or a Hessian that are kept"
    )

    include: tuple[str, ...] = Field(
        default=("**",),
        description="patterns of the parameters to sample; * matches within one part of a dotted name, ** matches anything",
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="patterns of the parameters to leave at w*, even if include matches them"
    )

    init_seed: int | None = Field(
        default=None, description="seed of the noise of the chains; null: a random one, kept with the result"
    )
    noise_law: NoiseLaw = Field(
        default="independent",
        description="seed of the noise of chain c. independent: made from init_seed and c, so that no two seeds share a chain; sequential: "
        "init_seed + c, as in older versions, so that chain 1 of seed 0 is chain 0 of seed 1. For init_seed 0 both are equal",
    )
    estimator: Literal["standard", "published-language"] = Field(
        default="standard",
        description="how λ̂ is computed from the draws' losses. published-language repeats an artefact of the published estimates for the "
        "language model, for comparison with them: about half of nβ L(w*) is added (icl.sampling.online). It is not a measurement",
    )
    num_init_loss_batches: int | None = Field(
        default=None,
        ge=1,
        description="number of batches over which L(w*) is averaged (its spread is taken over at least 8); null: the batches of the draws, "
        "so that their noise cancels",
    )
    cores: int = Field(default=1, ge=1, description="number of CPU threads; each runs whole groups of chains")
    max_memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="bytes that one group of chains (weights, noise, memory of a backward pass), a kept trace of weights, or the losses of "
        "an observable may take; null: 2 GiB, or for groups on an accelerator half of its free memory. Larger observables go to a "
        "temporary file",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        scales = [name for name in _SCALES if getattr(self, name) is not None]
        physical = [name for name in _PHYSICAL if getattr(self, name) is not None]
        if scales and physical:
            raise ValueError(
                f"{', '.join(physical)} and {', '.join(scales)} set the same constants twice; keep either epsilon, gamma, nbeta "
                "(or temperature) or gradient_scale, localization_scale, noise_scale"
            )
        if scales and len(scales) < len(_SCALES):
            missing = [name for name in _SCALES if name not in scales]
            raise ValueError(
                f"{', '.join(scales)} without {', '.join(missing)}; give all three of {', '.join(_SCALES)}"
            )
        if self.nbeta is not None and self.temperature is not None:
            raise ValueError(
                f"nbeta={self.nbeta} and temperature={self.temperature} contradict each other; keep one of them (nbeta = n / temperature)"
            )
        if isinstance(self.temperature, float | int) and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.sampling_method != "auto" and self.sampling_method not in KERNELS:
            raise ValueError(f"sampling_method={self.sampling_method!r} is unknown; choose auto, {', '.join(KERNELS)}")
        kernel = KERNELS[self.method]
        unknown = sorted(set(self.kernel_constants) - (kernel.own_constants - set(kernel.settings)))
        if unknown:
            raise ValueError(
                f"kernel_constants: {self.method} has no constant {unknown[0]!r}, or it has its own setting; remove it"
            )
        if self.step_size is None and self.method != "langevin":
            raise ValueError(
                f"sampling_method={self.sampling_method!r} needs epsilon; only 'langevin' finds its own step size"
            )
        if self.step_size is None and (self.gamma == 0 or self.nbeta == 0):
            given = "gamma=0" if self.gamma == 0 else "nbeta=0"
            raise ValueError(f"{given} leaves pilot chains nothing to find a step size by; give epsilon")
        if self.method == "langevin" and self.friction is None and self.localization + self.weight_decay == 0:
            raise ValueError(
                "gamma=0 gives langevin no friction, so its chains would never come to rest; give friction"
            )
        if self.estimator == PUBLISHED_LANGUAGE_ESTIMATOR and (self.num_burnin_steps or self.num_init_loss_batches):
            given = "num_burnin_steps" if self.num_burnin_steps else "num_init_loss_batches"
            raise ValueError(
                f"estimator='published-language' takes L(w*) from the first draw of each chain, which {given} contradicts; remove {given}"
            )
        if self.eval_method == "grad-minibatch" and self.eval_batch_size not in (None, self.grad_batch_size):
            raise ValueError(
                f"eval_method='grad-minibatch' evaluates on the gradient's batch, but eval_batch_size={self.eval_batch_size} differs "
                f"from grad_batch_size={self.grad_batch_size}; leave eval_batch_size out or choose another eval_method"
            )
        if (
            self.eval_dataset_size < 3
            and self.nbeta is None
            and not scales
            and self.temperature in (None, "auto", "adaptive")
        ):
            raise ValueError(f"nbeta = n / log n needs eval_dataset_size of at least 3, got {self.eval_dataset_size}")
        return self

    @property
    def seed(self) -> int:
        """`init_seed`, once it is given or drawn."""
        assert self.init_seed is not None, "the seed is drawn before sampling"
        return self.init_seed

    def without_effect(self) -> list[str]:
        """A line for each setting that was changed and has no effect beside the others. They are no errors, because a sweep may vary the
        kernel."""
        remarks = []
        for name, kernel in _OF_KERNELS.items():
            if self.method != kernel and getattr(self, name) != type(self).model_fields[name].default:
                remarks.append(f"{name} has no effect: it is of the kernel {kernel}, and this is {self.method}")
        if self.target_error is not None and {"weights", "covariance"} & set(self.eval_metrics):
            remarks.append("target_error has no effect with kept weights, whose number is num_draws; give num_draws")
        return remarks

    @property
    def step_size(self) -> float | None:
        """ε, or None if pilot chains find it."""
        return self.epsilon if self.noise_scale is None else self.noise_scale

    @property
    def method(self) -> str:
        """The kernel, with "auto" resolved."""
        if self.sampling_method == "auto":
            return "langevin" if self.step_size is None else "sgld"
        return self.sampling_method

    @property
    def shuffled(self) -> bool:
        """Whether batches are drawn at random, with "auto" resolved."""
        return self.batch_order == "random" or (self.batch_order == "auto" and self.step_size is None)

    @property
    def localization(self) -> float:
        """γ."""
        if self.gradient_scale is not None:
            return self._physical.gamma
        return 1.0 if self.gamma is None else self.gamma

    @property
    def inverse_temperature(self) -> float:
        """nβ."""
        if self.gradient_scale is not None:
            return self._physical.nbeta
        if self.nbeta is not None:
            return self.nbeta
        if isinstance(self.temperature, float | int):
            return self.eval_dataset_size / self.temperature
        return standard_nbeta(self.eval_dataset_size)

    @property
    def num_steps(self) -> int:
        """Steps of one chain: burn-in + draws × steps between draws."""
        return self.num_burnin_steps + self.num_draws * self.num_steps_bw_draws

    @property
    def _physical(self) -> Physical:
        assert self.gradient_scale is not None
        assert self.localization_scale is not None
        assert self.noise_scale is not None
        return to_physical(Scales(self.gradient_scale, self.localization_scale, self.noise_scale))
