"""Parameter groups for optimisers: what weight decay must leave alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from stateline import checks


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices with `weight_decay`, everything else without.

    Without decay: `A_log`, `D`, step-size biases and all other vectors (biases, norm weights), and embeddings, a tied
    output matrix included: decay would pull time constants and rare tokens towards values nobody chose.
    Every parameter is in exactly one group, a shared one once; a layer names further exceptions in a class attribute
    `no_weight_decay`. Parameters for which a layer names a learning rate (`learning_rates`, as those of S4 do for dt,
    A and B) come in further groups, one a rate, with "lr" set.

    >>> [len(g["params"]) for g in param_groups(nn.Linear(2, 2), 0.1)]
    [1, 1]
    """
    checks.number("param_groups", "weight_decay", weight_decay, low=0)
    spared: set[int] = set()
    for module in model.modules():
        names = getattr(type(module), "no_weight_decay", ())
        if isinstance(module, nn.Embedding):
            names = ("weight", *names)
        spared.update(id(getattr(module, name)) for name in names if getattr(module, name) is not None)
    rates = {
        id(getattr(module, name)): rate
        for module in model.modules()
        for name, rate in getattr(module, "learning_rates", {}).items()
    }
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    own: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():  # yields a shared parameter once
        if id(parameter) in rates:
            own.setdefault(rates[id(parameter)], []).append(parameter)
        else:
            (plain if parameter.dim() < 2 or id(parameter) in spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return groups + [{"params": own[rate], "weight_decay": 0.0, "lr": rate} for rate in sorted(own)]
