"""One trained module with what belongs to it: which parameters train, their master weights, optimizer, EMA,
gradient clipping, and its share of a checkpoint. Not here: what the loss is (train/methods/), and when steps
are taken, logged and saved (train/run/).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from opensoraplan.parallel.apply import forget_gathered
from opensoraplan.parallel.ranks import ALONE, Ranks
from opensoraplan.parallel.shards import local
from opensoraplan.runtime.quantisation import QUANTISED
from opensoraplan.train.config import OptimizerSettings
from opensoraplan.train.learner.ema import Ema, make_ema
from opensoraplan.train.learner.gradient_clip import Clip, Clipping, global_norm, scale_
from opensoraplan.train.learner.master import MasterWeights
from opensoraplan.train.learner.optimizer import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)

# The parts of a checkpoint that belong to the learner of this name have no prefix.
MODEL = "model"


class Learner:
    """A module of which the parameters of `weights` are trained; the others are frozen.

    Frozen parameters have no master copy, no optimizer state and no EMA, and stay in the precision that the
    module computes in. A checkpoint has them only if `save_frozen` is on. `clip` None: gradients are used as
    they are. `schedule` gives the learning rate of an optimizer step, from 0; None: it stays what it is.

    One step is `begin_step`, `backward` once for each micro-batch, `clip_gradients`, and `finish_step` unless
    the gradients are to be skipped.
    """

    def __init__(
        self,
        weights: MasterWeights,
        optimizer: torch.optim.AdamW,
        *,
        name: str = MODEL,
        ema: Ema | None = None,
        clip: Clip | None = None,
        schedule: Callable[[int], float] | None = None,
        save_frozen: bool = False,
    ) -> None:
        self.module = weights.module
        self.optimizer = optimizer
        self.ema = ema
        self._weights = weights
        self._clip = clip
        self._schedule = schedule
        self._prefix = "" if name == MODEL else f"{name}_"
        self._saved = {name: _saved_weights(weights, frozen=save_frozen)}

    @classmethod
    def from_settings(
        cls,
        module: nn.Module,
        settings: OptimizerSettings,
        *,
        clip: Clip | None = None,
        master: torch.dtype = torch.float32,
        compute: torch.dtype = torch.float32,
        save_frozen: bool = False,
        lr_ratios: Mapping[str, float] = MappingProxyType({}),
    ) -> "Learner":
        """Train the parameters of `module` that require gradients as the settings say, those in `lr_ratios`
        at a multiple of the learning rate. They are changed in `master` precision; the module itself goes
        over to `compute`.
        """
        weights = MasterWeights(module, master=master, compute=compute)
        return cls(
            weights,
            make_optimizer(weights.parameters, settings, lr_ratios),
            ema=make_ema(weights.parameters, settings),
            clip=clip,
            schedule=lambda step: learning_rate(step, settings),
            save_frozen=save_frozen,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name: the master weights of the trained parameters."""
        return self._weights.parameters

    @property
    def rate(self) -> float:
        """The learning rate of the step under way."""
        return self.optimizer.param_groups[0]["lr"]

    def begin_step(self, step: int) -> None:
        """Clear the gradients and set the learning rate of optimizer step number `step`, from 1."""
        if self._schedule is not None:
            set_learning_rate(self.optimizer, self._schedule(step - 1))
        self.optimizer.zero_grad(set_to_none=True)
        self._weights.forget_gradients()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, a scalar, to those of the step."""
        loss.backward()
        self._weights.take_gradients()

    def clip_gradients(self) -> tuple[float, Clipping]:
        """The norm of the step's gradients, and what was done about it. "skip": leave the step out.

        Raises GradientOutlierError if the clip is to stop at outliers. All ranks of a mesh call this.
        """
        assert self._clip is not None
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = global_norm(gradients).item()
        clipping = self._clip.decide(norm)
        if clipping.action == "clipped":
            scale_(gradients, clipping.scale)
        return norm, clipping

    def finish_step(self, step: int) -> None:
        """Change the weights by the step's gradients, and let the EMA follow them."""
        self.optimizer.step()
        self._weights.publish()
        if self.ema is not None:
            self.ema.update(step)

    @contextmanager
    def use_ema(self) -> Iterator[None]:
        """The module has the EMA's weights inside the block, if there is an EMA, and its own again after."""
        if self.ema is None:
            yield
            return
        with self.ema.swap_in():
            self._publish()
            yield
        self._publish()

    def _publish(self) -> None:
        """Let the module compute with the weights that there are now."""
        self._weights.publish()
        forget_gathered(self.module)

    def learned_tensors(self) -> Iterator[Tensor]:
        """What a checkpoint has of the module, and the EMA of its weights."""
        for tensors in self._saved.values():
            yield from tensors.values()
        yield from () if self.ema is None else self.ema.values.values()

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The learner's tensors in a checkpoint, by part and name. To load a checkpoint, fill them in place
        and call `load_state_dict`.
        """
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        parts: dict[str, Mapping[str, Tensor]] = {**self._saved, f"{self._prefix}optimizer": optimizer}
        return parts if self.ema is None else {**parts, f"{self._prefix}ema": self.ema.values}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has of the learner beside `parts`, for JSON: the clip's statistics, if any."""
        statistics = {} if self._clip is None else self._clip.state_dict()
        return {"clip": statistics} if statistics else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, once `parts` are filled."""
        self._weights.publish()
        if self._clip is not None and "clip" in state:
            self._clip.load_state_dict(state["clip"])


def _saved_weights(weights: MasterWeights, *, frozen: bool) -> dict[str, Tensor]:
    """The trained weights in the optimizer's precision, the module's persistent buffers but for those of
    quantised weights, and on request the frozen weights.
    """
    module, saved = weights.module, dict[str, Tensor](weights.parameters)
    persistent = module.state_dict().keys()
    for prefix, owner in module.named_modules():
        if not isinstance(owner, QUANTISED):
            buffers = owner.named_buffers(prefix, recurse=False)
            saved |= {name: buffer for name, buffer in buffers if name in persistent}
    if frozen:
        saved |= {name: p for name, p in module.named_parameters() if name not in saved}
    return saved


@torch.no_grad()
def check_finite(tensors: Iterable[Tensor], ranks: Ranks = ALONE) -> None:
    """Raise FloatingPointError in all processes if some of these weights are not finite in one."""
    if ranks.any(not all(bool(local(tensor).isfinite().all()) for tensor in tensors)):
        raise FloatingPointError(
            "the weights are not finite: the run has diverged, and its weights are not saved. Resume "
            "from an earlier checkpoint, or start a new run with a lower optimizer.lr"
        )
