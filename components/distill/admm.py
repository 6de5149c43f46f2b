"""ELSA: training under a constraint on the number of weights, which ADMM solves; the mask changes while the weights train.

Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM", ICLR 2026 (arXiv 2510.01650):

    minimize f(x)  subject to  x in S,    S: so many weights of each matrix are not zero, or N of every M of a row

f is the loss of training itself, and x starts from the dense weights. With z, a copy of x that alone is sparse, and u, the
scaled dual variable of x = z,

    x   takes steps of Adam on  f(x) + λ/2 · ‖x − z + u‖²,  and every K steps

    z ← Π(x + u),  the z in S with the least  (z − x − u)ᵀ diag(v) (z − x − u):  it keeps the entries of x + u where
                   v · (x + u)²  is largest, as they are
    u ← u + x − z

v is Adam's second moment, which stands for the diagonal of the Hessian (of the Fisher information). In the end x ← Π(x).

An entry that z keeps is x + u there, so that u becomes 0, and where z is 0, u becomes x + u. So `target` = z − u and the places
that z keeps say all of both, and the gradient of the penalty is λ · (x − target).

As in the authors' code, λ is constant, and the gradient of the penalty is added after that of the loss has been clipped, so
that v is that of both. Two things differ: z starts as the dense weights under the mask that is given, while theirs keeps the
largest; and entries are ranked by |x + u| · (√v + ε) with Adam's ε, so that magnitude decides where there has been no gradient.
(Correcting the bias of v would multiply all of a matrix by the same.) All of this is computed in float32.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from components.core.blocks import Matrix, matrices
from components.core.checks import parse_pattern
from components.core.mask.mask import Mask
from components.distill.masking import local
from components.distill.schedule import moments

Counts = Mapping[str, Sequence[tuple[Matrix, int]]]  # name of a parameter → its matrices, and how many weights of each are kept


def counts_of(mask: Mask, model: torch.nn.Module) -> Counts:
    """How many weights of each matrix a mask keeps.

    Args:
        mask: that of the model.
        model: its parameters may be on the meta device.

    Raises:
        ValueError: it has a pattern, and a matrix does not follow it.
    """
    n_of_m = parse_pattern(mask.pattern)
    inside: dict[str, list[Matrix]] = {name: [] for name in mask.tensors}
    for matrix in matrices(model).values():
        if matrix.parameter in inside:
            inside[matrix.parameter].append(matrix)
    counts: dict[str, list[tuple[Matrix, int]]] = {}
    for name, kept in mask.tensors.items():
        counts[name] = [(matrix, int(matrix.of(kept).sum())) for matrix in inside[name]]
        for matrix in inside[name] if n_of_m else ():
            assert n_of_m
            rows = matrix.of(kept)  # [out, in]
            if rows.shape[1] % n_of_m[1] or (rows.reshape(-1, n_of_m[1]).sum(1) != n_of_m[0]).any():
                raise ValueError(f"mask_file must keep {mask.pattern} weights for mask admm, {name} does not")
    return counts


def largest(scores: Tensor, count: int, n_of_m: tuple[int, int] | None) -> Tensor:
    """The mask that keeps the largest scores of a matrix.

    Args:
        scores: [out, in].
        count: how many.
        n_of_m: keep N of every M consecutive weights in a row instead.

    Returns:
        bool [out, in], True = kept: exactly as many as asked for.
    """
    each, size = n_of_m or (count, scores.numel())
    groups = scores.reshape(-1, size)
    best = groups.topk(each, dim=1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter(1, best, True).view(scores.shape)


class Admm:
    """The variables of ADMM for the weights that train. Where these are sharded, so are the variables, in the same way.

    Args:
        parameters: name → trained parameter, dense.
        optimizer: Adam, for them.
        counts: how many weights are kept.
        mask: the support that z starts with.
        penalty: λ.
        place: the part of a full tensor that corresponds to this process's part of a parameter.
        gather: the full tensor, from the part of each process.

    Attributes:
        kept: name → bool, the support of z.
        target: name → z − u.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        counts: Counts,
        mask: Mask,
        penalty: float,
        place: Callable[[Tensor, Tensor], Tensor],
        gather: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.parameters, self.optimizer, self.counts, self.penalty = parameters, optimizer, counts, penalty
        self.place, self.gather, self.n_of_m = place, gather, parse_pattern(mask.pattern)
        self.kept: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            self.kept[name] = torch.zeros_like(parameter, dtype=torch.bool)
            self.target[name] = torch.zeros_like(parameter)
            kept = place(mask.tensors[name], parameter)
            local(self.kept[name]).copy_(kept)
            local(self.target[name]).copy_(local(parameter.detach()) * kept)

    @torch.no_grad()
    def pull(self) -> None:
        """Add the gradient of the penalty to those of the parameters."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:  # such as an expert's that no token was routed to
                parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).add_(local(parameter) - local(self.target[name]), alpha=self.penalty)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Compute z and u; every process must call this.

        Returns:
            float32 [4], sums over this process's part: places that z keeps and did not keep before, places that it keeps, the
            squares of x − z, and those of x.
        """
        sums = []
        for name, parameter in self.parameters.items():
            x, kept, target = local(parameter), local(self.kept[name]), local(self.target[name])
            moved = torch.where(kept, x, x - target)  # x + u
            now = self._largest(name, moved)
            z = moved * now
            sums.append(torch.stack([(now & ~kept).sum(), now.sum(), (x - z).square().sum(), x.square().sum()]))
            target.copy_(torch.where(now, moved, -moved))
            kept.copy_(now)
        return torch.stack(sums).sum(0)

    @torch.no_grad()
    def project(self) -> None:
        """Set x to its projection; every process must call this."""
        for name, parameter in self.parameters.items():
            x = local(parameter)
            x.masked_fill_(~self._largest(name, x), 0)

    @contextlib.contextmanager
    def projected(self) -> Iterator[None]:
        """The weights as they are after `project`, until the end of the `with`; every process must call this."""
        before = {name: local(parameter.detach()).clone() for name, parameter in self.parameters.items()}
        self.project()
        yield
        with torch.no_grad():
            for name, value in before.items():
                local(self.parameters[name]).copy_(value)

    def support(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mask of projected weights, by name: where they are not zero and, if those are too few, at some of the zeros.

        Args:
            weights: whole weights, by name, on any device.
        """
        sizes = {name: weight.to(self.parameters[name].device).abs().float() for name, weight in weights.items()}
        return {name: self._mask(name, size).to(weights[name].device) for name, size in sizes.items()}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the variables, by name."""
        parts = {"kept": self.kept, "target": self.target}
        return {f"{name}.{part}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def _largest(self, name: str, values: Tensor) -> Tensor:
        """The places of a parameter's values that the projection keeps, for this process's part of both."""
        parameter = self.parameters[name]
        moment = local(moments(self.optimizer, parameter)["exp_avg_sq"])
        scores = values.abs() * (moment.sqrt() + self.optimizer.param_groups[0]["eps"])
        return self.place(self._mask(name, self.gather(scores, parameter)), parameter)

    def _mask(self, name: str, scores: Tensor) -> Tensor:
        """The mask of a whole parameter that keeps the largest scores of each matrix in it."""
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for matrix, count in self.counts[name]:
            matrix.of(mask).copy_(largest(matrix.of(scores), count, self.n_of_m))
        return mask
