"""code_logprobs: parity, gradients, edges, compilation and errors."""

import math

import pytest
import torch

from latent_rl import ops
from latent_rl.reference.code_logprobs import code_logprobs_backward, code_logprobs_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def policy(dtype=torch.float32, n=29, num_codes=17):
    logits, ref = torch.randn(n, num_codes), torch.randn(n, num_codes)
    return logits.to(dtype), torch.randint(num_codes, (n,)), ref.to(dtype)


# parity


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, dtype, with_reference) -> None:
    logits, codes, ref = policy(dtype)
    ref = ref if with_reference else None
    out = ops.code_logprobs(logits.requires_grad_(), codes, ref)
    for got, wanted in zip(out, code_logprobs_forward(logits.detach(), codes, ref), strict=True):
        assert got.dtype == wanted.dtype
        # Statistics are float32 whatever the logits are.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    grads = [torch.randn(29).to(out.logprob.dtype) for _ in range(3)]
    got = torch.autograd.grad(tuple(out), logits, grads)[0]
    wanted = code_logprobs_backward(*grads, logits.detach(), codes, ref)
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_values_by_hand(backend) -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    out = ops.code_logprobs(logits, torch.tensor([1]), torch.zeros(1, 2))
    assert out.logprob.item() == pytest.approx(math.log(0.75))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert out.entropy.item() == pytest.approx(entropy)
    assert out.kl.item() == pytest.approx(math.log(2) - entropy)


def test_kl_equals_torch_distributions(backend) -> None:
    logits, codes, ref = policy()
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=ref)
    )
    torch.testing.assert_close(ops.code_logprobs(logits, codes, ref).kl, theirs)


# gradients


def test_gradcheck(backend) -> None:
    logits, codes, ref = policy(torch.float64, n=6, num_codes=5)
    assert torch.autograd.gradcheck(
        lambda z: tuple(ops.code_logprobs(z, codes, ref)), logits.requires_grad_()
    )


def test_the_reference_policy_receives_no_gradient(backend) -> None:
    logits, codes, ref = policy()
    ref.requires_grad_()
    out = ops.code_logprobs(logits.requires_grad_(), codes, ref)
    assert torch.autograd.grad(out.kl.sum(), ref, allow_unused=True)[0] is None


# torch registration


def test_opcheck() -> None:
    logits, codes, ref = policy(n=4)
    torch.library.opcheck(
        torch.ops.latent_rl.code_logprobs_forward.default, (logits.requires_grad_(), codes, ref)
    )


def test_compiled_equals_eager() -> None:
    logits, codes, ref = policy()
    logits.requires_grad_()

    def loss(z):
        out = ops.code_logprobs(z, codes, ref)
        return (out.logprob + out.entropy + out.kl).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(f(logits), logits)[0] for f in (compiled, loss))
    torch.testing.assert_close(ours, theirs)


# edges


def test_masked_codes_and_rows(backend) -> None:
    logits, codes, ref = policy(n=5)
    logits[0, 3] = ref[0, 3] = -torch.inf
    codes[0] = 2
    codes[1] = -1
    logits[2, 0] = torch.nan
    out = ops.code_logprobs(logits.requires_grad_(), codes, ref)
    assert all(value[0].isfinite() for value in out)
    assert all(value[1:3].isnan().all() for value in out)
    grad = torch.autograd.grad(sum(value[[0, 3, 4]].sum() for value in out), logits)[0]
    assert grad.isfinite().all()
    assert grad[1:3].eq(0).all()
    assert grad[0, 3] == 0


def test_extreme_logits_keep_their_log_probability(backend) -> None:
    out = ops.code_logprobs(torch.tensor([[1e4, 0.0], [-1e4, 0.0]]), torch.tensor([1, 0]))
    assert out.logprob.tolist() == [-1e4, -1e4]
    assert out.entropy.tolist() == [0, 0]


def test_leading_dimensions_are_free(backend) -> None:
    logits, codes, ref = policy()
    flat = ops.code_logprobs(logits, codes, ref)
    shaped = ops.code_logprobs(logits[None], codes[None], ref[None])
    assert all(torch.equal(a[0], b) for a, b in zip(shaped, flat, strict=True))


# errors


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"codes": torch.full((29,), 17)}, ValueError, r"codes must lie in \[-1, 17\)"),
        ({"codes": torch.zeros(29, dtype=torch.int32)}, TypeError, "codes must be int64"),
        ({"codes": torch.zeros(3, dtype=torch.int64)}, ValueError, "codes must have shape"),
        ({"ref_logits": torch.zeros(29, 3)}, ValueError, "ref_logits must have shape"),
        ({"ref_logits": torch.zeros(29, 17).half()}, TypeError, "ref_logits must have logits's"),
    ],
)
def test_bad_input_is_named(change, kind, message) -> None:
    logits, codes, ref = policy()
    arguments = {"logits": logits, "codes": codes, "ref_logits": ref, **change}
    with pytest.raises(kind, match=f"code_logprobs: .*{message}"):
        ops.code_logprobs(**arguments)
