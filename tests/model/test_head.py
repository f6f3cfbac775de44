"""The head with its loss against torch's own cross-entropy under autograd, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from arriero.model import head
from arriero.model.head import IGNORE_INDEX, VocabularyShard, linear_cross_entropy


def inputs(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(tokens, hidden, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 0.3] = IGNORE_INDEX
    return x, weight, labels


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float) -> Results:
    x, weight = (t.double().detach().requires_grad_() for t in (x, weight))
    loss = F.cross_entropy(x @ weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum") * scale
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def ours(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, *,
    upstream: float = 1.0, cut: VocabularyShard | None = None,
) -> Results:  # fmt: skip
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    loss = linear_cross_entropy(x, weight, labels, scale=scale, cut=cut)
    return loss.detach().sum(), *torch.autograd.grad(loss.sum() * upstream, (x, weight))


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(2, 50)), matmul=st.integers(1, 400),
    softmax=st.integers(1, 200), scale=st.sampled_from([1.0, 0.25, 3e-4, 128.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_division_of_the_work_is_torchs_cross_entropy(
    sizes: tuple[int, int, int], matmul: int, softmax: int, scale: float, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "logits_chunk_size", lambda kind: matmul)
        patch.setattr(head, "softmax_chunk_size", lambda kind: softmax)
        x, weight, labels = inputs(*sizes, seed)
        for got, want in zip(ours(x, weight, labels, scale), reference(x, weight, labels, scale), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_low_precision_is_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, labels = inputs(64, 32, 200)
    x, weight = x.to(dtype), (weight / 6).to(dtype)
    found = ours(x, weight, labels, 1 / 64)
    assert found[0].dtype == torch.float32, "the loss is never rounded to the compute dtype"
    for got, want in zip(found, reference(x, weight, labels, 1 / 64), strict=True):
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_the_factor_goes_in_before_the_gradient_is_rounded() -> None:
    """float16 ends at 6e-8: without a loss scale the gradient of a vocabulary of a million would be zero."""
    x, weight, labels = torch.zeros(2, 4).half(), torch.ones(1000, 4).half(), torch.tensor([0, 1])
    _, small, _ = ours(x, weight * 1e-4, labels, 1e-5)
    _, large, _ = ours(x, weight * 1e-4, labels, 65536.0)
    assert (small == 0).all()
    assert large.isfinite().all()


def test_upstream_gradient_is_a_factor() -> None:
    x, weight, labels = inputs(10, 4, 20)
    for got, want in zip(
        ours(x, weight, labels, 0.5, upstream=3.0)[1:], reference(x, weight, labels, 1.5)[1:], strict=True
    ):
        torch.testing.assert_close(got, want)


def test_without_gradient_only_the_loss_is_computed() -> None:
    x, weight, labels = inputs(10, 4, 20)
    want = reference(x, weight, labels, 1.0)[0]
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.sum(), want)


def test_extreme_logits_stay_finite_and_exact() -> None:
    x = torch.tensor([[1.0], [1.0], [-1.0]])
    weight = torch.tensor([[0.0], [500.0], [-800.0]])
    labels = torch.tensor([1, 2, 0])
    loss, x_grad, weight_grad = ours(x, weight, labels, 1.0)
    assert loss.item() == 0.0 + 1300.0 + 800.0
    assert x_grad.isfinite().all()
    assert weight_grad.isfinite().all()


def test_an_ignored_token_adds_nothing_even_if_its_logits_overflow() -> None:
    x, weight = torch.tensor([[1.0], [3e38]]), torch.tensor([[1.0], [2.0], [3.0]])
    loss, _, _ = ours(x, weight, torch.tensor([0, IGNORE_INDEX]), 1.0)
    alone, _, _ = ours(x[:1], weight, torch.tensor([0]), 1.0)
    assert loss == alone


@pytest.mark.parametrize("vocabulary", [20, 23])
def test_a_cut_vocabulary_gives_the_whole_loss_and_summands_of_the_gradient(vocabulary: int) -> None:
    x, weight, labels = inputs(12, 5, vocabulary)
    each = -(-vocabulary // 3)
    pieces = weight.split(each)
    logits = x @ weight.t()

    def gathered(mine: torch.Tensor) -> torch.Tensor:
        """What all three would say, from their logits."""
        said = []
        for i, part in enumerate(logits.split(each, dim=1)):
            own = (labels >= i * each) & (labels < i * each + part.shape[1])
            at = torch.where(own, labels - i * each, 0)[:, None]
            said.append(torch.stack((part.logsumexp(1), part.gather(1, at)[:, 0] * own)))
        assert any(torch.allclose(mine, one) for one in said)
        return torch.stack(said)

    want = reference(x, weight, labels, 0.5)
    found = [ours(x, p, labels, 0.5, cut=VocabularyShard(i * each, gathered)) for i, p in enumerate(pieces)]
    for loss, _, _ in found:
        torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(sum(x_grad for _, x_grad, _ in found), want[1])
    torch.testing.assert_close(torch.cat([weight_grad for _, _, weight_grad in found]), want[2])


def test_memory_in_float32_is_bounded() -> None:
    """512 tokens of a vocabulary of 32,000 are 65 MB in float32; no float32 tensor as large as half of it is made."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                made.append(out.numel())
            return out

    x = torch.randn(512, 8).bfloat16().requires_grad_()
    weight = torch.randn(32000, 8).bfloat16().requires_grad_()
    labels = torch.randint(0, 32000, (512,))
    with Watch():
        linear_cross_entropy(x, weight, labels).backward()
    assert made
    assert max(made) <= 2**20
