"""RLOO and PPO against independent loops over Python floats, and against TRL where TRL has the same loss."""

import math
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

import async_online_dpo
import async_ppo
import async_rloo
from tests.test_algorithm import dpo_losses

K, B, R = 4, 3, 5
N = B * K


def random_rows(seed=0, spread=0.6):
    """Log-probabilities of pi, mu and reference, mask, scores, advantages: responses of 1 to R tokens, 0 at padding."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, R + 1, (N,), generator=g)
    mask = torch.arange(R)[None] < lengths[:, None]
    pi = -torch.rand(N, R, generator=g) * 2 - 0.1
    mu, ref = (pi + torch.randn(N, R, generator=g) * spread for _ in range(2))
    scores, advantages = torch.randn(N, generator=g), torch.randn(N, R, generator=g)
    return *(x * mask for x in (pi, mu, ref)), mask, scores, advantages * mask


def rloo_args(**changes):
    return async_rloo.Args(reward="m:f", gold="", samples_per_prompt=K, kl_coef=0.3, **changes)


def naive_rloo(kind, pi, mu, ref, scores, args):
    """Losses and gradients with respect to every log pi, one response and one token at a time."""
    beta, low, high, cap = args.kl_coef, 1 - args.clip_range, 1 + args.clip_range, args.importance_cap
    losses, gradients, cut = [], [], []
    for i in range(N):
        length = sum(p != 0 for p in pi[i])
        group = [j for j in range(N) if j // K == i // K]
        reward = {j: scores[j] - beta * sum(m - f for m, f in zip(mu[j], ref[j])) for j in group}
        own = {j: scores[j] - beta * sum(p - f for p, f in zip(pi[j], ref[j])) for j in group}  # Q: pi's own KL
        advantage = reward[i] - sum(reward[j] for j in group if j != i) / (K - 1)
        log_pi, rho = sum(pi[i]), math.exp(sum(p - m for p, m in zip(pi[i], mu[i])))
        share = 0.0  # of the response that is clipped or truncated
        if kind == "vanilla":
            loss, gradient = -advantage * log_pi, [-advantage] * R
        elif kind == "proximal":
            clipped = min(max(rho, low), high)
            loss = -min(rho * advantage, clipped * advantage)
            share = float(rho * advantage > clipped * advantage)
            gradient = [0.0 if share else -rho * advantage] * R
        elif kind == "truncated":
            weights = [min(math.exp(p - m), cap) for p, m in zip(pi[i], mu[i])]
            share = sum(w == cap for w in weights) / length
            loss = -sum(w * p for w, p in zip(weights, pi[i])) * advantage
            gradient = [-w * advantage for w in weights]
        elif kind == "copg":
            loss = sum((own[i] - own[j]) ** 2 for j in group) / (K - 1) / (4 * beta)
            gradient = [-(own[i] - sum(own[j] for j in group if j != i) / (K - 1))] * R
        elif kind == "tba":
            log_z = sum(own[j] / beta for j in group) / K
            loss = beta / 2 * (log_z - own[i] / beta) ** 2
            gradient = [-(own[i] - sum(own[j] for j in group) / K)] * R
        elif kind == "topr":
            weight = 1.0 if advantage >= 0 else min(rho, 1.0)
            share = float(weight < 1)
            loss, gradient = -weight * advantage * log_pi, [-weight * advantage] * R
        else:
            shifted = reward[i] - (sum(reward[j] for j in group) / K + args.baseline_shift)
            loss, gradient = -shifted * log_pi, [-shifted] * R
        losses.append(loss)
        gradients.append(gradient)
        cut.append(share)
    return losses, gradients, cut


@pytest.mark.parametrize("kind", ["proximal", "vanilla", "truncated", "copg", "tba", "topr", "asymre"])
def test_rloo_losses_and_gradients_against_loops(kind):
    args = rloo_args(rloo_loss=kind)
    for seed in range(3):
        pi, mu, ref, mask, scores, _ = random_rows(seed)
        leaf = pi.clone().requires_grad_()
        losses, active = async_rloo.rloo_loss(leaf, mu, ref, mask, scores, K, args)
        losses.sum().backward()
        want, gradients, cut = naive_rloo(kind, pi.tolist(), mu.tolist(), ref.tolist(), scores.tolist(), args)
        assert losses.tolist() == pytest.approx(want, rel=1e-4, abs=1e-5)
        assert leaf.grad[mask].tolist() == pytest.approx(torch.tensor(gradients)[mask].tolist(), rel=1e-4, abs=1e-5)
        assert active.tolist() == pytest.approx(cut)
        assert any(cut) == (kind in ("proximal", "truncated", "topr"))


def test_copg_and_tba_differ_by_a_factor_only():
    pi, mu, ref, mask, scores, _ = random_rows()
    gradients = {}
    for kind in ("copg", "tba"):
        leaf = pi.clone().requires_grad_()
        async_rloo.rloo_loss(leaf, mu, ref, mask, scores, K, rloo_args(rloo_loss=kind))[0].sum().backward()
        gradients[kind] = leaf.grad[mask]
    assert torch.allclose(gradients["copg"], gradients["tba"] * K / (K - 1), atol=1e-5)


def test_on_policy_all_unbiased_losses_have_the_vanilla_gradient():
    """pi = mu: nothing is clipped, nothing is stale."""
    pi, _, ref, mask, scores, _ = random_rows()
    gradients = {}
    for kind in ("vanilla", "proximal", "truncated", "copg", "topr"):
        leaf = pi.clone().requires_grad_()
        async_rloo.rloo_loss(leaf, pi, ref, mask, scores, K, rloo_args(rloo_loss=kind))[0].sum().backward()
        gradients[kind] = leaf.grad[mask]
    for kind, gradient in gradients.items():
        assert torch.allclose(gradient, gradients["vanilla"], atol=1e-5), kind


def ppo_args(**changes):
    return async_ppo.Args(reward="m:f", gold="", **changes)


@pytest.mark.parametrize("kind", ["behaviour", "recompute", "truncated", "decoupled", "cispo"])
def test_ppo_losses_and_gradients_against_loops(kind):
    args = ppo_args(ppo_loss=kind)
    pi, mu, _, mask, _, advantages = random_rows(1)
    old = mu if kind == "behaviour" else (pi + torch.randn(N, R, generator=torch.Generator().manual_seed(9)) / 3) * mask
    leaf = pi.clone().requires_grad_()
    losses, active = async_ppo.ppo_loss(leaf, old, mu, advantages, args)
    losses.sum().backward()
    assert active[mask].any() and not active[mask].all()
    for i, t in mask.nonzero().tolist():
        p, o, m, a = (x[i, t].item() for x in (pi, old, mu, advantages))
        u, weight = math.exp(p - o), {"truncated": min(math.exp(o - m), 2.0), "decoupled": math.exp(o - m)}.get(kind, 1)
        clipped = min(max(u, 0.8), 1.2)
        loss, slope = -weight * min(u * a, clipped * a), -weight * (u * a if u * a <= clipped * a else 0.0)
        cut = u * a > clipped * a or (kind == "truncated" and math.exp(o - m) > 2)
        if kind == "cispo":
            weight, cut = min(math.exp(p - m), 2.0), math.exp(p - m) > 2
            loss, slope = -weight * a * p, -weight * a
        assert active[i, t].item() == cut
        assert losses[i, t].item() == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert leaf.grad[i, t].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_value_loss_against_loops():
    args = ppo_args()
    new, old, returns = (torch.randn(40, generator=torch.Generator().manual_seed(s)) for s in range(3))
    leaf = new.clone().requires_grad_()
    losses = async_ppo.value_loss(leaf, old, returns, args)
    losses.sum().backward()
    for i in range(40):
        v, o, r = new[i].item(), old[i].item(), returns[i].item()
        near = min(max(v, o - 0.2), o + 0.2)
        assert losses[i].item() == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, rel=1e-5)
        free = (v - r) ** 2 >= (near - r) ** 2
        assert leaf.grad[i].item() == pytest.approx(v - r if free else 0.0, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 1.0), (0.97, 0.5)])
def test_gae_is_the_weighted_sum_of_temporal_differences(gamma, lambda_):
    args = ppo_args(gamma=gamma, gae_lambda=lambda_)
    _, _, _, mask, _, values = random_rows(2)
    rewards = torch.randn(N, R, generator=torch.Generator().manual_seed(3)) * mask
    got = async_ppo.gae(rewards, values, args)
    for i in range(N):
        length = int(mask[i].sum())
        v, r = [*values[i, :length].tolist(), 0.0], rewards[i].tolist()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            want = sum((gamma * lambda_) ** (s - t) * delta[s] for s in range(t, length))
            assert got[i, t].item() == pytest.approx(want, abs=1e-5)
        assert (got[i, length:] == 0).all()


# TRL ------------------------------------------------------------------------------------------------------------------
def trl_loss(trainer, logprobs, inputs, **settings):
    """TRL's own _compute_loss on given log-probabilities: everything else of the trainer is left out."""
    self = MagicMock(aux_loss_enabled=False, **settings)
    self._get_per_token_logps_and_entropies.return_value = (logprobs, torch.zeros_like(logprobs), None)
    self.model.training = False
    self.accelerator.gather.side_effect = self.accelerator.reduce.side_effect = lambda x, **_: x
    nothing = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), torch.zeros(len(logprobs), 1))
    return trainer._compute_loss(self, None, nothing | inputs)


def test_proximal_rloo_is_trl_s():
    trl = pytest.importorskip("trl.trainer.rloo_trainer")
    pi, mu, ref, mask, scores, _ = random_rows(4)
    args = rloo_args()
    mine, theirs = pi.clone().requires_grad_(), pi.clone().requires_grad_()
    async_rloo.rloo_loss(mine, mu, ref, mask, scores, K, args)[0].mean().backward()
    rewards = (scores - args.kl_coef * (mu - ref).sum(1)).view(-1, K)
    advantages = (rewards - (rewards.sum(1, keepdim=True) - rewards) / (K - 1)).flatten()
    inputs = dict(completion_mask=mask.int(), old_logps=mu.sum(1), advantages=advantages)
    trl_loss(trl.RLOOTrainer, theirs, inputs, epsilon_low=0.2, epsilon_high=0.2).backward()
    assert mine.grad.abs().max() > 0 and torch.allclose(mine.grad * mask, theirs.grad, atol=1e-6)


@pytest.mark.parametrize("kind", ["behaviour", "truncated", "cispo"])
def test_ppo_losses_are_trl_s(kind):
    trl = pytest.importorskip("trl.trainer.grpo_trainer")
    pi, mu, _, mask, _, advantages = random_rows(5)
    old = (pi + 0.1 * torch.randn(N, R, generator=torch.Generator().manual_seed(6))) * mask
    old = old if kind == "truncated" else mu
    mine, theirs = pi.clone().requires_grad_(), pi.clone().requires_grad_()
    losses, _ = async_ppo.ppo_loss(mine, old, mu, advantages, ppo_args(ppo_loss=kind))
    (losses * mask).sum().div(mask.sum()).backward()
    inputs = dict(completion_mask=mask.int(), advantages=advantages, old_per_token_logps=old)
    inputs |= dict(importance_sampling_ratio=(old - mu).exp().clamp(max=2.0), num_items_in_batch=mask.sum())
    settings = dict(loss_type="cispo" if kind == "cispo" else "bnpo", importance_sampling_level="token", beta=0.0)
    settings |= dict(epsilon_low=0.2, epsilon_high=2.0 if kind == "cispo" else 0.2, top_entropy_quantile=1.0)
    settings |= dict(off_policy_mask_threshold=None, use_vllm=True, _entropy_bonus_enabled=False)
    settings |= dict(vllm_importance_sampling_correction=kind == "truncated")
    settings |= {"args.delta": None, "accelerator.num_processes": 1}
    trl_loss(trl.GRPOTrainer, theirs, inputs, **settings).backward()
    assert mine.grad.abs().max() > 0 and torch.allclose(mine.grad * mask, theirs.grad * mask, atol=1e-6)


def test_dpo_is_trl_s():
    """The sigmoid loss. TRL's ipo divides by the length, which the paper's equation does not: not compared."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    pi, _, ref, mask, _, _ = random_rows(6)  # rows in halves: chosen, rejected
    mine, theirs = pi.clone().requires_grad_(), pi.clone().requires_grad_()
    args = async_online_dpo.Args(reward="m:f", gold="", beta=0.3)
    sums, ref_sums = mine.sum(1), ref.sum(1)
    losses = dpo_losses(*sums.chunk(2), *ref_sums.chunk(2), args)
    losses.mean().backward()
    self = MagicMock(aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl")
    self.loss_types, self.loss_weights, self.beta, self.use_weighting = ["sigmoid"], [1.0], 0.3, False
    self.label_smoothing, self.model.training = 0.0, False
    self.accelerator.gather.side_effect = self.accelerator.gather_for_metrics.side_effect = lambda x: x
    completion = torch.cat([torch.zeros(N, 1), mask], 1).long()
    other = dict(entropy=torch.zeros(N, R), mean_logits=torch.zeros(N, R), is_top1=torch.zeros(N, R, dtype=torch.bool))
    outputs = MagicMock(log_probs=theirs, **other)
    inputs = dict(input_ids=completion, completion_mask=completion)
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref_sums.chunk(2)))
    trl.DPOTrainer._compute_loss(self, lambda **_: outputs, inputs, False).backward()
    assert mine.grad.abs().max() > 0 and torch.allclose(mine.grad, theirs.grad, atol=1e-6)
    assert np.isfinite(losses.detach().numpy()).all()
