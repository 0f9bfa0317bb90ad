"""The reference: the same training in one process, as a bare loop over a plain model.

It shares the model and the stream of samples with the trainer and nothing else: no mesh, no FSDP, no microbatches, its
own loss, clipping and update. What it saw is written down whole; a rank reads of it what it needs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from meshwright.data import Batch, open_stream, to_tensors
from meshwright.models import NOT_COUNTED, Attention, Decoder, Mixture, build_model, build_view, initialize_
from meshwright.record.verification import ATTEND, Comparison, Reference, Rounding, relative_differences
from meshwright.spec import Job, Precision
from meshwright.train.optimizer import learning_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What a tensor of the reference is: the samples' tokens, a module's output, a parameter's gradient, a weight.
SAMPLES = "samples"
OUTPUT, GRADIENT, WEIGHT = "output.", "gradient.", "weight."


class Alone:
    """One process's training of a job, step by step: fp32 weights, and a model in the job's precision."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self._device = device
        self._stream = open_stream(job)
        self._model = build_model(job.model, device=device)
        initialize_(self._model, job.model, job.run.seed)
        self.weights = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        self.biases = dict(self._model.named_buffers())
        for parameter in self._model.parameters():
            # Not the biases that routers choose by, which a rank keeps in fp32 too.
            parameter.data = parameter.data.to(DTYPES[job.layout.precision])

    def batch(self, step: int) -> Batch[Tensor]:
        """The whole global batch of a step."""
        return to_tensors(self._stream.batch(step, 0, self.job.data.global_batch), self._device)

    def outputs(self) -> dict[str, Tensor]:
        """Every module's output over the first step's samples."""
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), watching(self._model, seen):
            logits_of(self._model, self.batch(0))
        return seen

    def gradients(self, step: int) -> tuple[float, dict[str, Tensor]]:
        """A step's mean loss, and its gradients in fp32 before clipping."""
        batch = self.batch(step)
        logits = logits_of(self._model, batch).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self._model.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad.float() for name, p in self._model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def update(self, step: int, gradients: dict[str, Tensor]) -> float:
        """Clip, step, and return the norm before clipping. SGD only: Adam would amplify round-off."""
        settings = self.job.optimizer
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()])).item()
        scale = min(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm > 0 else 1.0
        rate = learning_rate(step, self.job.run.steps, settings)
        for name, parameter in self._model.named_parameters():
            weight = self.weights[name]
            decay = settings.weight_decay if weight.dim() >= 2 else 0.0
            weight -= rate * (scale * gradients[name] + decay * weight)
            parameter.copy_(weight)
        for module in self._model.modules():
            if isinstance(module, Mixture):
                balance(module)
        return norm

    def train(self) -> "Training":
        """All steps."""
        losses: list[float] = []
        norms: list[float] = []
        first: dict[str, Tensor] = {}
        for step in range(self.job.run.steps):
            loss, gradients = self.gradients(step)
            first = first or gradients
            losses.append(loss)
            norms.append(self.update(step, gradients))
        return Training(losses, norms, first)


class Training(NamedTuple):
    """Every step's loss and gradient norm, and the first one's gradients."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def logits_of(model: Decoder, batch: Batch[Tensor]) -> Tensor:
    """The model's logits for whole samples."""
    return model(batch.tokens, build_view(model.spec, batch.tokens.shape[1], batch.documents, batch.tokens.device))


def balance(mixture: Mixture) -> None:
    """Move a mixture's bias by what its experts had in the step that ends, if it has one that moves."""
    counts = mixture.experts.load.take(mixture.router.weight)[1:]
    if mixture.router.bias is not None:
        error = counts.double().mean() - counts.double()
        mixture.router.bias += mixture.experts.settings.bias_rate * error.sign().float()


def train_alone(job: Job, device: torch.device, written: Path) -> Reference:
    """The job's steps in fp32; what the ranks will compare with goes into a safetensors file at `written`.

    A rounding precision is judged by how far it takes one process from fp32, so fp32 is what everything is held to.
    """
    alone = Alone(variant(job, job.run.seed, "fp32"), device)
    outputs = alone.outputs()
    training = alone.train()
    tensors = {SAMPLES: alone.batch(0).tokens} | {OUTPUT + name: output for name, output in outputs.items()}
    tensors |= {GRADIENT + name: gradient for name, gradient in training.gradients.items()}
    weights = alone.weights | alone.biases
    tensors |= {WEIGHT + name: weight for name, weight in weights.items()}
    whole = torch.contiguous_format
    save_file({name: tensor.cpu().clone(memory_format=whole) for name, tensor in tensors.items()}, written)
    return Reference(
        losses=training.losses,
        norms=training.norms,
        counted=int((alone.batch(0).targets != NOT_COUNTED).sum()),
        outputs={name: output.numel() for name, output in outputs.items()},
        gradients={name: gradient.numel() for name, gradient in training.gradients.items()},
        weights={name: weight.numel() for name, weight in weights.items()},
        rounding=measure_rounding(job, device) if job.layout.precision != "fp32" else None,
    )


@contextmanager
def watching(model: nn.Module, seen: dict[str, Tensor]) -> Iterator[None]:
    """Every module's output, by the module's name, in the order in which modules end; and of attention what it mixes,
    which is no module's output, by what its model calls the function."""

    def look(module: nn.Module, name: str, *, given: bool = False) -> None:
        def keep(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            tensor = inputs[0] if given else output
            if isinstance(tensor, Tensor):
                seen[name] = tensor.detach()

        hooks.append(module.register_forward_hook(keep))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            # What its output matrix is given; seen before what that makes of it, because it is asked for first.
            look(module.output, f"{name}.{ATTEND}", given=True)
        if name:
            look(module, name)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measure_rounding(job: Job, device: torch.device, seeds: int = 5) -> Rounding:
    """What the job's precision does to its training in one process."""
    loss, norm = 0.0, 0.0
    gradients: dict[str, float] = {}
    for seed in range(seeds):
        ours, exact = (Alone(variant(job, seed, p), device).train() for p in (job.layout.precision, "fp32"))
        parts = {name: compare(ours.gradients[name], gradient) for name, gradient in exact.gradients.items()}
        for name, difference in relative_differences(parts).items():
            gradients[name] = max(difference, gradients.get(name, 0.0))
        loss = max(loss, *(abs(a / b - 1) for a, b in zip(ours.losses, exact.losses, strict=True)))
        norm = max(norm, *(abs(a / b - 1) for a, b in zip(ours.norms, exact.norms, strict=True)))
    return Rounding(loss=loss, norm=norm, gradients=gradients)


def compare(ours: Tensor, theirs: Tensor) -> Comparison:
    """Two tensors of one shape, in double precision."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    return Comparison(
        difference=(ours - theirs).square().sum().item(),
        reference=theirs.square().sum().item(),
        ours=ours.square().sum().item(),
        product=(ours * theirs).sum().item(),
        elements=ours.numel(),
    )


def variant(job: Job, seed: int, precision: Precision) -> Job:
    """The job with another seed, in a precision."""
    run = msgspec.structs.replace(job.run, seed=seed)
    return msgspec.structs.replace(job, run=run, layout=msgspec.structs.replace(job.layout, precision=precision))
