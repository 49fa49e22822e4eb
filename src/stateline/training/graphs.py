"""Forward and backward pass of a batch, recorded once as a CUDA graph and replayed.

Launching a step's thousands of kernels one by one takes the host longer than a fast GPU needs to run them. A recording
is launched at once: the same kernels in the same order, so the same numbers. Its shapes and addresses are fixed, and
the memory that a batch needs stays its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stateline.checks import fail
from stateline.models import LanguageModel
from stateline.ops import cuda
from stateline.training.data import Batch

#: Passes before recording: kernels are compiled, libraries make their handles and workspaces.
WARM_UP = 2


def refuse(device: torch.device) -> None:
    """Raise ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise fail("train", f"cuda_graphs is set, but the device is {device}.", "Drop it, or use --device cuda.")


class Gradients:
    """Adds a batch's gradients to `.grad` of every parameter that the loss reaches, as `loss.backward()` does.

    Records at the first batch; later ones must have its shape. `.grad` belongs to the recording: set it to zero in
    place, never to None.
    """

    def __init__(self, model: LanguageModel, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast
        self._learning = [p for p in model.parameters() if p.requires_grad]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch, divisor: float) -> Tensor:
        """The batch's mean loss over `divisor`, whose gradients are added: a float32 scalar, valid until the next call.

        Raises ValueError for a batch of another shape than the first.
        """
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None
        if batch.inputs.shape != self._inputs.shape or batch.cu_seqlens is not None:
            raise fail("cuda_graphs", f"a batch has shape {tuple(batch.inputs.shape)}, recorded was "
                       f"{tuple(self._inputs.shape)}.", "Every batch needs one shape, and no cu_seqlens.")  # fmt: skip
        self._inputs.copy_(batch.inputs, non_blocking=True)
        self._targets.copy_(batch.targets, non_blocking=True)
        self._divisor.fill_(divisor)
        self._graph.replay()
        return self._loss

    def _record(self, batch: Batch) -> None:
        device = self._learning[0].device
        self._inputs, self._targets = batch.inputs.to(device, copy=True), batch.targets.to(device, copy=True)
        self._divisor = torch.ones((), device=device)
        for p in self._learning:
            p.grad = None
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):  # dropout's numbers are the run's
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._clear()
                    self._pass()
            torch.cuda.synchronize()
            self._clear()
            graph = torch.cuda.CUDAGraph()
            with cuda.capture(graph, stream):  # computes nothing
                self._loss = self._pass()
        self._graph = graph

    def _clear(self) -> None:
        """Zeros where the last pass left gradients; None where the loss does not reach, which an optimiser skips."""
        for p in self._learning:
            if p.grad is not None:
                p.grad = torch.zeros_like(p)

    def _pass(self) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast is not None):
            loss = self.model.loss(self._inputs, self._targets) / self._divisor
        loss.backward()
        return loss.detach()
