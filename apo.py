"""
A*PO: policy optimisation by Optimal Advantage Regression (arXiv 2505.20686). Its formulas are on
this page; `main`, `estimate_values` and `policy_step` in train.py put them together.

The aim is the policy that maximises  E_pi[r(x, y)] - beta KL(pi || pi_ref).  It is known in closed form,
    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / beta),
and everything in it but V* is at hand. So A*PO estimates V* from the reference, and then fits pi to the formula:

    1.  V*(x) = beta1 log E_{y ~ pi_ref} [exp(r(x, y) / beta1)]                   optimal_value, value_loss
    2.  loss  = E_{y ~ pi} [(beta2 log(pi(y|x) / pi_ref(y|x)) - (r(x, y) - V*(x)))^2] / (2 beta2)    apo_loss
    3.  log pi(y|x) = sum over the tokens of y of log pi(y_t | x, y_<t)             sequence_logprobs

A* = r - V* is the optimal advantage. One response per prompt is enough, because V* comes from the
reference and not from other responses of the policy.

Left out on purpose: importance ratios and clipping (responses come from the current policy,
except with several updates_per_batch), normalised advantages (r - V* is the target itself, its
scale means something), a KL penalty (it is inside the square), a critic at every token.

Kept from the paper, and surprising: beta1 = 0.5 for V* and a much smaller beta2 for the policy.
They differ, so the loss does not go to 0, and is no measure of progress. On samples of the
current policy the gradient of the square is that of REINFORCE on r - beta2 log(pi / pi_ref) with
V* as the baseline, whatever V* is: a poor V* costs variance, not bias.

Where train.py differs from the paper (RESULTS.md has what most of this bought). To train as published:
`--centre=False --max_step_kl=0 --beta2=1e-3 --fresh_prompts=False --num_train_samples=256
--learning_rate=4e-4 --adam_eps=1e-8`.
  - A value head learns V* (formula 1 as a regression, value_loss), so that prompts can be new at
    every step. After stage 1 it learns from the policy's responses, and so follows the policy's V*
    instead of the reference's.
  - V* is shifted so that r - V* is 0 in the mean of each batch. V* with beta1 = 0.5 lies 0.1 to
    0.2 above the mean reward: without the shift the average response is pushed away, and AdamW
    turns that into steps. On samples of the current policy the shift leaves the optimum where it
    is (to be exact, at that of beta2 B / (B - 1), since a response's own reward is in the mean of
    the B). It does change the closed form that a fit to fixed samples would reach: pi_ref exp((r
    - V* - shift) / beta) does not sum to 1. There V* at the mean is the safe side; above it the
    policy loses more than it learns (arXiv 2506.20520). A prompt that is never solved, V* = 0,
    has r - V* = 0 in the paper and teaches nothing. Here its failures are pushed up a little, and
    so are right answers where V* = 1.
  - Stage 1 is small, 32 prompts: it only gives the value head a start, which then learns from the
    responses of stage 2.
  - beta2 is 0.01, not 0.001 (which pretrained weights keep). A response that loops to the limit
    lies 100 nats or more from the reference: that now costs as much as a wrong answer, while an
    ordinary response, a nat or two away, pays next to nothing.
  - A step is shortened where a batch moves the policy further than max_step_kl. beta2 pulls to
    the reference over many steps, it does not bound one. A step of the same learning rate moves a
    base that is unsure of its sums ten to a hundred times further than one that is sure.
  - AdamW's epsilon is 1e-2, not 1e-8 (on a CPU and from random weights). In countdown a gradient
    is 1e-4 a parameter or less. With a small epsilon AdamW gives every parameter a step of the same
    length, also where the gradient is noise. With a large one a step is about proportional to the
    gradient, as in SGD with momentum, which does well in RL (arXiv 2602.07729): half of the
    responses are enough.
  - The loss of a batch is divided by the tokens of an average response. So the gradient is about
    as long as GRPO's, grad_clip does not act, and steps become shorter when less is left to learn.
    As a mean over responses it is longer by that number, and clipped in most steps. (The authors
    do not divide by 2 beta2, and theirs is not clipped either.)
"""
from typing import Callable, NamedTuple

import torch


def optimal_value(rewards, beta1):
    """
    Estimate V*(x) from N rewards of the frozen reference (formula 1). The best reward m is taken
    out, so that no beta1 overflows; expm1 and log1p keep it exact where beta1 is large.

    rewards (prompts, N) -> (prompts,), between the mean (beta1 -> infinity) and the best (beta1 ->
    0) of each row.
    """
    best = rewards.amax(dim=1, keepdim=True) # m
    mean = torch.expm1((rewards - best) / beta1).mean(dim=1) # of exp((r - m) / beta1) - 1
    return best.squeeze(1) + beta1 * torch.log1p(mean)


def sequence_logprobs(token_logprobs, mask):
    """Sum log pi(y|x) (formula 3), not a mean, in float32, over the response up to and including
    end-of-sequence. token_logprobs, mask (B, T) -> (B,)."""
    return (token_logprobs.float() * mask).sum(dim=1)


def apo_loss(logprobs, ref_logprobs, rewards, values, beta2):
    """
    Regress on the optimal advantage (formula 2). All arguments (B,); logprobs carries the gradient
    -> scalar.

    Zero exactly when beta2 (logprobs - ref_logprobs) = rewards - values. Divided by 2 beta2, which
    leaves the minimum where it is and brings the gradient to the scale of a policy gradient, (V* -
    r + beta2 log-ratio) grad log pi. policy_step divides by the tokens of an average response too.
    """
    return residual(logprobs, ref_logprobs, rewards, values, beta2).square().mean() / (2 * beta2)


def residual(logprobs, ref_logprobs, rewards, values, beta2):
    """Return how far beta2 log(pi / pi_ref) is from the optimal advantage r - V*, all (B,)."""
    return beta2 * (logprobs - ref_logprobs) - (rewards - values)


def value_loss(values, rewards, beta1):
    """
    Regress the value head on V* (Gumbel regression, arXiv 2301.02328): at its minimum E[exp((r - V)
    / beta1)] = 1, which is formula 1. It needs no groups: the mean over samples of one prompt, or
    one sample of each of many, will do.

    values (B,) with gradient, rewards (B, N) with any N -> scalar, 0 at best.
    """
    error = (rewards - values[:, None]) / beta1
    return (error.exp() - error - 1).mean()


# --------------------------------------------------------------------------------------------------
# The algorithms to compare with: an advantage, one number per response, and a loss. As long as a
# batch serves one update, the policy is still the one that sampled, every ratio is 1, nothing is
# clipped, and all these losses but GSPO's have the gradient of reinforce_loss.

def batch_advantages(rewards):
    """Take the batch's mean out of the rewards: REINFORCE with a baseline (Williams, 1992)."""
    return rewards - rewards.mean()


def leave_one_out_advantages(rewards):
    """Take the mean of the prompt's other responses out of each reward: RLOO (arXiv 2402.14740).
    (prompts, N) -> (prompts, N)."""
    N = rewards.size(1)
    return (rewards - rewards.mean(1, keepdim=True)) * N / (N - 1)


def group_advantages(rewards):
    """Standardise rewards within the responses to one prompt: GRPO (arXiv 2402.03300). (prompts, N)
    -> (prompts, N)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def positive_advantages(rewards):
    """Take the rewards as they are, so that wrong responses count for nothing: rejection sampling,
    or RAFT (arXiv 2304.06767)."""
    return rewards


def reinforce_loss(logprobs, old_logprobs, advantages, mask):
    """Compute the policy gradient's loss, a mean over tokens. logprobs with gradient, old_logprobs,
    those of the policy that sampled, and mask (B, T), advantages (B,) -> scalar."""
    return -(advantages * sequence_logprobs(logprobs, mask)).sum() / mask.sum()


def grpo_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """Clip the ratio to the policy that sampled at every token, as in PPO; a mean over all tokens
    and no KL term, as in DAPO (arXiv 2503.14476). Arguments as in reinforce_loss."""
    ratio, advantages = (logprobs - old_logprobs).exp(), advantages[:, None] # (B, T), (B, 1)
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(objective * mask).sum() / mask.sum()


def cispo_loss(logprobs, old_logprobs, advantages, mask, clip=0.28):
    """Weight every token by its ratio, truncated from above and without gradient, so that no token
    is left out: CISPO (arXiv 2506.13585). Arguments as in reinforce_loss."""
    weight = (logprobs - old_logprobs).exp().clamp(max=1 + clip).detach() # (B, T)
    return -(weight * advantages[:, None] * logprobs * mask).sum() / mask.sum()


def gspo_loss(logprobs, old_logprobs, advantages, mask, low=3e-4, high=4e-4):
    """Clip one ratio per response, the geometric mean of its tokens': GSPO (arXiv 2507.18071).
    Arguments as in reinforce_loss."""
    ratio = (((logprobs - old_logprobs) * mask).sum(1) / mask.sum(1)).exp() # (B,)
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).mean()


class Algorithm(NamedTuple):
    """What one algorithm puts into the place of A*PO."""
    advantages: Callable # rewards (prompts, N) -> (prompts, N)
    loss: Callable # as reinforce_loss
    grouped: bool # N responses to every prompt; else one
    per_token: bool # its loss is a mean over tokens; else over responses


ALGORITHMS = dict(
    reinforce=Algorithm(batch_advantages, reinforce_loss, grouped=False, per_token=True),
    rejection=Algorithm(positive_advantages, reinforce_loss, grouped=False, per_token=True),
    rloo=Algorithm(leave_one_out_advantages, reinforce_loss, grouped=True, per_token=True),
    grpo=Algorithm(group_advantages, grpo_loss, grouped=True, per_token=True),
    cispo=Algorithm(group_advantages, cispo_loss, grouped=True, per_token=True),
    gspo=Algorithm(group_advantages, gspo_loss, grouped=True, per_token=False))
