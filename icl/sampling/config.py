"""Every setting of a learning-coefficient estimate, typed and checked; contradictions are errors."""

from typing import Literal, Self

from pydantic import Field, model_validator

from icl.config import Settings
from icl.sampling.kernels import KERNELS
from icl.sampling.parametrisation import Physical, Scales, standard_nbeta, to_physical

EvalMethod = Literal["grad-minibatch", "new-minibatch", "fixed-minibatch", "dataset"]
EvalMetric = Literal["likelihood-derived", "singular-fluctuation", "batch-loss", "weights", "covariance", "hessian"]

_SCALES = ("gradient_scale", "localization_scale", "noise_scale")
_PHYSICAL = ("epsilon", "gamma", "temperature", "nbeta")


class SamplerConfig(Settings):
    """How to sample around w* and what to average.

    The constants are given either as `epsilon`, `gamma` and `nbeta` (or `temperature`), or as `gradient_scale`, `localization_scale` and
    `noise_scale` (see `icl.sampling.parametrisation`). A step size given means plain SGLD at that step size; none given means the
    underdamped kernel of `icl.sampling.langevin`, whose step size and localisation are found by pilot chains (`icl.sampling.tuning`).
    """

    later = ("kernel_constants",)

    sampling_method: str = "auto"
    """The kernel; "auto" is "sgld" where a step size is given and "langevin" where none is."""
    num_chains: int = Field(default=8, ge=1)
    num_draws: int = Field(default=1000, ge=1)
    """Recorded draws per chain."""
    num_burnin_steps: int = Field(default=0, ge=0)
    """Steps before the first draw."""
    num_steps_bw_draws: int = Field(default=1, ge=1)
    """Steps from one draw to the next."""
    num_burn_in: int | None = None
    """Accepted and ignored, with a note in the log: published runs spell burn-in so, and their numbers rest on its being ignored."""

    epsilon: float | None = Field(default=None, gt=0)
    """Step size ε. None: found by pilot chains (langevin only)."""
    gamma: float | None = Field(default=None, ge=0)
    """Localisation γ. None: found together with the step size; 1 where the step size is given."""
    nbeta: float | None = Field(default=None, ge=0)
    """Effective inverse temperature nβ; n / temperature if not given."""
    temperature: float | Literal["auto", "adaptive"] | None = None
    """T = 1/β; "auto" (also "adaptive", also None) is log n."""
    gradient_scale: float | None = Field(default=None, ge=0)
    localization_scale: float | None = Field(default=None, ge=0)
    noise_scale: float | None = Field(default=None, gt=0)

    weight_decay: float = Field(default=0.0, ge=0)
    noise_level: float = Field(default=1.0, ge=0)
    """Standard deviation of the injected noise relative to the sampler's; 0 gives gradient descent."""
    bounding_box_size: float | None = Field(default=None, gt=0)
    """Every coordinate stays within w* ± this."""
    rmsprop_decay: float = Field(default=0.99, gt=0, lt=1)
    rmsprop_stability: float = Field(default=0.1, gt=0)
    diffusion_factor: float = Field(default=0.01, gt=0)
    """The thermostat's D (sgnht)."""
    friction: float | None = Field(default=None, gt=0)
    """η of the underdamped kernel; None: critical damping of the localisation."""
    kernel_constants: dict[str, float] = Field(
        default={}, description="constants of a kernel that have no setting above"
    )

    grad_batch_origin: Literal["infinite-dataset", "eval-dataset"] = "infinite-dataset"
    grad_batch_size: int = Field(default=1024, ge=1)
    independent_batches: bool = False
    """False: at one step all chains see one batch. True: `batches` is called with (step, chain seed)."""

    eval_method: EvalMethod = "grad-minibatch"
    """What the recorded loss is taken on: the gradient's batch at the weights before the update, a new batch after it, always the first
    evaluation batch, or the whole set."""
    eval_batch_size: int | None = Field(default=None, ge=1)
    eval_dataset_size: int = Field(default=8192, ge=1)
    """n: samples of the evaluation set, and the n of nβ = n / T."""
    eval_loss_fn: Literal["mse", "subsequence-mse"] = "mse"
    """"subsequence-mse" drives the chain by the mean loss of the first k tokens, k uniform on 1..K anew at every step."""
    eval_metrics: tuple[EvalMetric, ...] = ("likelihood-derived",)
    eval_online: bool = False
    """Report the running estimate after every draw (`LLCResult.running`)."""
    per_token: bool = False
    num_evals: int = Field(default=5, ge=1)
    """Eigenvalues kept of a covariance."""

    include: tuple[str, ...] = ("**",)
    """Patterns of parameter names to sample: `*` matches within a dotted segment, `**` anything."""
    exclude: tuple[str, ...] = ()
    """Patterns of parameter names to leave at w*; they win over `include`."""

    init_seed: int | None = None
    """Chain i's noise is a function of init_seed + i. None: drawn once and recorded with the result."""
    num_init_loss_batches: int | None = Field(default=None, ge=1)
    """Batches that L(w*) is averaged over. None: the very batches of the draws, which cancels their noise; see `estimate_llc`."""
    cores: int = Field(default=1, ge=1)
    """CPU worker threads, each of which runs whole groups of chains."""
    max_memory_bytes: int | None = Field(default=None, ge=1)
    """Bound on what the chains of one group take (weights, noise, and what a backward pass keeps of each), and on a kept weight trace; it
    decides how many chains make one group. None: 2 GiB, and for groups on an accelerator half of what is free there."""

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
                f"nbeta={self.nbeta} and temperature={self.temperature} contradict each other; give one (nbeta = n / temperature)"
            )
        if isinstance(self.temperature, float | int) and self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.sampling_method != "auto" and self.sampling_method not in KERNELS:
            raise ValueError(f"sampling_method={self.sampling_method!r} is unknown; choose auto, {', '.join(KERNELS)}")
        kernel = KERNELS[self.method]
        unknown = sorted(set(self.kernel_constants) - (kernel.own_constants - set(kernel.settings)))
        if unknown:
            raise ValueError(
                f"kernel_constants: {self.method} has no constant {unknown[0]!r} without a setting of its own"
            )
        if self.step_size is None and self.method != "langevin":
            raise ValueError(
                f"sampling_method={self.sampling_method!r} needs epsilon; only 'langevin' finds its own step size"
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
    def step_size(self) -> float | None:
        """ε, or None where it is to be found during burn-in."""
        return self.epsilon if self.noise_scale is None else self.noise_scale

    @property
    def method(self) -> str:
        """The kernel, with "auto" resolved."""
        if self.sampling_method == "auto":
            return "langevin" if self.step_size is None else "sgld"
        return self.sampling_method

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
