"""What logits say of the tokens that came, and how far they are from a parent's logits, token by token.

Elements are float32, sums over the vocabulary float64. Callers hand over some rows at a time: these take
about six times the bytes of a chunk of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenComparison(NamedTuple):
    """A model beside its parent: one float64 figure a scored token."""

    nll_S: Tensor
    """Negative log-likelihood of the token that came, in nats."""
    parent_nll_S: Tensor
    """The same of the parent."""
    kl_S: Tensor
    """Divergence from the parent, sum of p * log(p / q) in nats, p the parent's probabilities."""
    is_same_top_S: Tensor
    """1 where both find the same token likeliest, else 0; among equals the first is meant."""
    acceptance_S: Tensor
    """Sum of min(p, q): the chance that a token drawn from one is kept in the other's place."""


def token_nll(logits_SV: Tensor, target_S: Tensor) -> Tensor:
    """Return nll_S float64, in nats, of the tokens that came; logits of any float dtype, targets int64."""
    return _nll(logits_SV, _softmax(logits_SV), target_S)


def compare_tokens(logits_SV: Tensor, parent_SV: Tensor, target_S: Tensor) -> TokenComparison:
    """Return what sets a model's finite logits apart from its parent's, of the same tokens and device.

    Source of the acceptance: Leviathan et al. 2022, corollary 3.6.
    """
    parent, model = _softmax(parent_SV), _softmax(logits_SV)
    return TokenComparison(
        nll_S=_nll(logits_SV, model, target_S),
        parent_nll_S=_nll(parent_SV, parent, target_S),
        kl_S=_divergence(parent, model),
        is_same_top_S=(logits_SV.argmax(1) == parent_SV.argmax(1)).double(),
        acceptance_S=torch.minimum(parent.probabilities(), model.probabilities()).sum(1, dtype=torch.float64),
    )


class _Softmax(NamedTuple):
    largest_S: Tensor
    """float32."""
    shifted_SV: Tensor
    """Logits less the largest of their row."""
    exp_SV: Tensor
    sum_S: Tensor
    """float64."""

    def probabilities(self) -> Tensor:
        return self.exp_SV / self.sum_S.float().unsqueeze(1)


def _softmax(logits_SV: Tensor) -> _Softmax:
    logits_SV = logits_SV.float()
    largest_S = logits_SV.amax(1)
    shifted_SV = logits_SV - largest_S.unsqueeze(1)
    exp_SV = shifted_SV.exp()
    return _Softmax(largest_S, shifted_SV, exp_SV, exp_SV.sum(1, dtype=torch.float64))


def _nll(logits_SV: Tensor, found: _Softmax, target_S: Tensor) -> Tensor:
    logit_S = logits_SV.gather(1, target_S.unsqueeze(1)).squeeze(1).double()
    return found.sum_S.log() + (found.largest_S.double() - logit_S)


def _divergence(parent: _Softmax, model: _Softmax) -> Tensor:
    # The logarithms of both sums are taken out of the sum over tokens: in float32 each log-probability
    # would carry their rounding, about 5e-7, and so would the sum, as much as the divergence of 16 bits.
    apart_S = (parent.exp_SV * (parent.shifted_SV - model.shifted_SV)).sum(1, dtype=torch.float64)
    return apart_S / parent.sum_S - (parent.sum_S.log() - model.sum_S.log())
