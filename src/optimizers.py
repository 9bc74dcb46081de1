"""Optimizer recipes and learning-rate schedules, by name.

T5's embedding starts two orders of magnitude larger than its projections, so one absolute rate is too small for the one or too
large for the others and training stalls. Every recipe but plain `adamw`, in 32 bit or 8, therefore makes steps relative to the size
(RMS) of the parameter. `adafactor_t5` is the recipe of the T5 paper, kept to compare with.

Ours are relative to the size at the start. Relative to the size of the moment, as Adafactor's are, weights have no size to settle at: at
high rates they grow exponentially without decay, and shrink away with it, until residual branches no longer count beside the embedding.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.optim.adamw import adamw
from transformers.optimization import Adafactor

from src.config import TrainingSettings
from src.precision import best_precision

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic iteration of Muon: kellerjordan.github.io/posts/muon
SMALLEST_RMS = 1e-2  # a parameter that starts at zero must still move (as in Adafactor, arXiv 1804.04235, section 8)
# Bytes of state that a trainable parameter of a matrix costs.
STATE_BYTES = {"adamw": 8, "adamw_rms_scaled": 8, "muon": 4, "adafactor_t5": 0, "paged_adamw_8bit": 2}


class OptimizerError(ValueError):
    """An optimizer that does not exist, or nothing for it to train."""


class RMSScaledOptimizer(torch.optim.Optimizer):
    """Steps of `lr * max(RMS(parameter at its first step), 1e-2) * direction`: `lr` is a change relative to where it started.

    A group's `direction` is "adam" (bias-corrected AdamW, arXiv 1711.05101; nanoT5 scales it by the size of the moment) or "muon"
    (momentum made orthogonal, scaled to twice the usual RMS of an Adam step; arXiv 2502.16982, eq. 4, takes it once). Weight decay
    is decoupled.
    """

    def __init__(self, groups: Iterable[dict], lr: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "direction": "adam", "momentum": 0.95}
        options["fused"] = True  # makes `load_state_dict` put the count of steps on the parameter's device, where the fused step wants it
        super().__init__(groups, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if "size" not in self.state[parameter]:
                    rms = float(torch.linalg.vector_norm(parameter)) / math.sqrt(parameter.numel())
                    self.state[parameter]["size"] = max(SMALLEST_RMS, rms)
            step = muon_step if group["direction"] == "muon" else adam_step
            step(parameters, self.state, group)


def adam_step(parameters: Iterable[torch.Tensor], states: Mapping, group: dict) -> None:
    """PyTorch's fused AdamW at the rate `lr * size`; its decay is a share of that rate, so `size` is taken out of it again."""
    by_size: dict[float, list[torch.Tensor]] = {}  # what starts at one size, as all norms do, takes its step together
    for parameter in parameters:
        state = states[parameter]
        by_size.setdefault(state["size"], []).append(parameter)
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for size, alike in by_size.items():
        adamw(
            alike,
            [parameter.grad for parameter in alike],
            *([states[parameter][name] for parameter in alike] for name in ("exp_avg", "exp_avg_sq")),
            [],
            [states[parameter]["step"] for parameter in alike],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] * size,
            weight_decay=group["weight_decay"] / size,
            eps=group["eps"],
            maximize=False,
        )


def muon_step(parameters: Iterable[torch.Tensor], states: Mapping, group: dict) -> None:
    """Along Nesterov momentum with its singular values pushed to 1, times 0.4 sqrt(larger side), an RMS of 0.4."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}  # matrices of one shape go through the iteration together
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
        if "momentum" not in states[parameter]:
            states[parameter]["momentum"] = torch.zeros_like(parameter)
    for shape, alike in by_shape.items():
        gradients, momenta = [parameter.grad for parameter in alike], [states[parameter]["momentum"] for parameter in alike]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        orthogonal = orthogonalise(torch.stack(updates)).to(updates[0].dtype).unbind()
        rate = group["lr"] * 0.4 * math.sqrt(max(shape))
        torch._foreach_mul_(orthogonal, [rate * states[parameter]["size"] for parameter in alike])
        torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(alike, orthogonal)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest matrices with all singular values near 1, by Newton-Schulz iteration: (matrices, rows, columns).

    In bf16, whose rounding the iteration forgives, but only where that is native: emulated it took a minute a step.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(torch.bfloat16 if best_precision() == "bf16" else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def is_projection(name: str, parameter: nn.Parameter) -> bool:
    """A weight matrix inside a block: not an embedding, the output layer, a position bias, a norm or an offset."""
    outside = ("shared", "embed_tokens", "lm_head", "relative_attention_bias")
    return parameter.ndim == 2 and not any(part in name for part in outside)


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer `settings.optimizer` over the trainable parameters: projections decay, all others learn at `other_rate`.

    `adafactor_t5` follows the paper's own rate, so neither the rates nor `schedule` and `warmup_steps` touch it.

    Raises:
        OptimizerError: nothing to train, or the optimizer wants what is not there.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise OptimizerError("the model has no trainable parameter: unfreeze some or add adapters")
    projections = [parameter for name, parameter in trainable if is_projection(name, parameter)]
    others = [parameter for name, parameter in trainable if not is_projection(name, parameter)]
    groups = [
        {"params": projections, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0, "lr": settings.learning_rate * settings.other_rate},
    ]
    groups = [group for group in groups if group["params"]]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
        case "adamw_rms_scaled":
            return RMSScaledOptimizer(groups, settings.learning_rate)
        case "muon":
            if projections:
                groups[0]["direction"] = "muon"
            return RMSScaledOptimizer(groups, settings.learning_rate)
        case "paged_adamw_8bit":  # states in 8 bit, paged to main memory when the GPU is full (arXiv 2305.14314, section 3)
            if not torch.cuda.is_available():
                raise OptimizerError("optimizer paged_adamw_8bit needs a CUDA device: choose adamw")
            try:
                from bitsandbytes.optim import PagedAdamW8bit
            except ImportError:
                raise OptimizerError(
                    "optimizer paged_adamw_8bit needs bitsandbytes: run `pip install bitsandbytes`, or choose adamw"
                ) from None

            return PagedAdamW8bit(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        case "adafactor_t5":  # rate min(1e-2, 1 / sqrt(step)) times RMS(parameter), arXiv 1910.10683, section 3.1.2
            return Adafactor([parameter for _, parameter in trainable], relative_step=True, scale_parameter=True, warmup_init=False)
    raise AssertionError(f"{settings.optimizer} is one of OPTIMIZERS and has no recipe here")


def relative_rate(step: int) -> float:
    """The rate of `adafactor_t5` at step `step` (0, 1, ...). It takes that by itself; this is for the log."""
    return min(1e-2, (step + 1) ** -0.5)


def learning_rate_factor(schedule: str, step: int, warmup_steps: int, progress: float) -> float:
    """What the learning rate is multiplied with before step `step` (0, 1, ...), after a linear warm-up.

        cosine        1 -> 0.02 along half a cosine of `progress`
        linear        1 -> 0 in `progress`
        inverse_sqrt  sqrt(warmup_steps / step)
        constant      1

    Args:
        progress: share of the budget that is used, 0..1.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match schedule:
        case "cosine":
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "linear":
            return max(0.0, 1 - progress)
        case "inverse_sqrt":
            return math.sqrt(max(1, warmup_steps) / max(1, step))
        case _:  # constant
            return 1.0
