"""
A loss of one's own, to copy: AsymRE (arXiv 2506.20520), REINFORCE whose baseline lies a little below
the mean reward, so that right responses count for more than wrong ones.

    python train.py --algorithm=benchmarks/my_loss.py                 # trains by it
    python benchmarks/algorithms.py --mine=benchmarks/my_loss.py      # compares it with the others

`advantages` sees the rewards of a whole batch, (prompts, N). `loss` sees a piece of it: logprobs with
gradient, old_logprobs, those of the policy that sampled, and mask, (B, T), and advantages, (B,). What a file
leaves out but the loss is REINFORCE's, as in apo.py.
"""
grouped = False # True: --num_responses_per_prompt responses to every prompt; else one
per_token = True # True: the loss is a mean over the tokens under the mask; else over responses


def advantages(rewards):
    return rewards - rewards.mean() + 0.1


def loss(logprobs, old_logprobs, advantages, mask):
    return -(advantages[:, None] * logprobs * mask).sum() / mask.sum()
