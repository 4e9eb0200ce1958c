"""
A*PO: policy optimisation by Optimal Advantage Regression (arXiv 2505.20686). Its formulas are on this page; `main`,
`estimate_values` and `policy_step` in train.py put them together.

The aim is the policy that maximises  E_pi[r(x, y)] - beta KL(pi || pi_ref).  It is known in closed form,
    pi*(y|x) = pi_ref(y|x) exp((r(x, y) - V*(x)) / beta),
and everything in it but V* is at hand. So A*PO estimates V* from the reference, and then fits pi to the formula:

    1.  V*(x) = beta1 log E_{y ~ pi_ref} [exp(r(x, y) / beta1)]                   optimal_value, value_loss
    2.  loss  = E_{y ~ pi} [(beta2 log(pi(y|x) / pi_ref(y|x)) - (r(x, y) - V*(x)))^2]     apo_loss
    3.  log pi(y|x) = sum over the tokens of y of log pi(y_t | x, y_<t)             sequence_logprobs

A* = r - V* is the optimal advantage. One response per prompt is enough, because V* is known before training starts.

Left out on purpose: importance ratios and clipping (responses come from the current policy), normalised advantages
(r - V* is the target itself, its scale means something), a KL penalty (it is inside the square), a critic at every
token. Added: a value head that learns V* (formula 1 as a regression), so that prompts can be new at every step.

Kept from the paper, and surprising: beta1 = 0.5 for V* and beta2 = 0.001 for the policy. They differ, so the loss does
not go to 0, and is no measure of progress. On samples of the current policy the gradient of the square is that of
REINFORCE on r - beta2 log(pi / pi_ref) with V* as the baseline, whatever V* is: a poor V* costs variance, not bias.
"""
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
    r + beta2 log-ratio) grad log pi: so learning rate and gradient clipping mean what they mean
    elsewhere.
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


def group_advantages(rewards):
    """Standardise rewards within the group of responses to one prompt, which is GRPO's advantage.
    (prompts, N) -> (prompts, N)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """
    Compute the loss of GRPO, to compare with (DeepSeekMath, arXiv 2402.03300; no KL term and a mean
    over all tokens, as in DAPO, arXiv 2503.14476).

    The ratio to the policy that sampled is clipped at every token. On the first update of a batch
    the two are the same policy: the ratio is 1, the clip does nothing, and this is REINFORCE with
    the group as the baseline. From the second one on (train.py's updates_per_batch) it acts.
    logprobs with gradient, old_logprobs, mask (B, T), advantages (B,) -> scalar.
    """
    ratio, advantages = (logprobs - old_logprobs).exp(), advantages[:, None] # (B, T), (B, 1)
    objective = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(objective * mask).sum() / mask.sum()
