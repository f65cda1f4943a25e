"""The softmax over few tokens, against the whole one."""

import pytest
import torch
from torch import Tensor, nn

import loramem.training.rivals as rivals_module
from loramem.training.rivals import LEAST_REST, Rivals

TARGETS = torch.tensor([3, 9, 3, 30])


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals_module, "SMALL_VOCABULARY", 10)


def hidden_states() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def test_what_competes_and_the_rest_together_are_the_whole_softmax() -> None:
    head = nn.Linear(6, 40)
    rivals = Rivals(head, TARGETS)
    rivals.add(torch.tensor([[1, 9], [2, 1]]))
    rivals.add(torch.tensor([1, 2]))  # again
    hidden = hidden_states()
    full = head(hidden).detach()
    few = rivals.head.few(hidden)
    assert few.shape == (4, 5)  # 3, 9, 30, 1 and 2
    assert not few.requires_grad
    for rows in (slice(0, 2), torch.tensor([2, 3])):
        rivals.look_at_rest(full[rows], full[rows].logsumexp(1), rows)
    whole = rivals.with_rest(few, slice(None))
    torch.testing.assert_close(whole.logsumexp(1), full.logsumexp(1))
    torch.testing.assert_close(few.gather(1, rivals.targets[:, None]), full.gather(1, TARGETS[:, None]))
    assert (whole.softmax(1)[:, :-1].sum(1) < 1).all()


def test_before_anyone_looked_nothing_but_what_competes_counts() -> None:
    rivals = Rivals(nn.Linear(6, 40, bias=False), TARGETS)
    few = rivals.head.few(hidden_states())
    torch.testing.assert_close(rivals.with_rest(few, slice(None)).logsumexp(1), few.logsumexp(1))


def test_with_every_token_competing_next_to_nothing_is_left() -> None:
    rivals = Rivals(nn.Linear(6, 10, bias=False), torch.arange(3))
    assert rivals.head.few(torch.randn(2, 6)).shape == (2, 10)  # a vocabulary that small competes as a whole
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(1))
    rivals.look_at_rest(logits, logits.logsumexp(1), slice(0, 2))
    share = rivals.with_rest(logits, slice(0, 2)).softmax(1)[:, -1]
    assert share.tolist() == pytest.approx([LEAST_REST] * 2, rel=0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_rounded_products_are_near_those_of_the_head(bias: bool) -> None:
    head = nn.Linear(6, 40, bias=bias)
    rivals = Rivals(head, TARGETS, torch.bfloat16)
    hidden = hidden_states()
    assert rivals.head.rounds
    torch.testing.assert_close(rivals.head.all(hidden), head(hidden).detach())
    rounded = rivals.head.all_rounded(hidden)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), head(hidden).detach(), rtol=0.02, atol=0.03)
    assert not Rivals(head, TARGETS).head.rounds
