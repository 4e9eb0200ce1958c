"""
A control for pretrained weights: multiplication that pays for the format alone, so that what is left between it and
the true reward is arithmetic.

    python train.py --task=benchmarks/format_only.py --init_from=smollm2 ...    # as in README, Pretrained weights
"""
from tasks import Multiplication


class FormatOnly(Multiplication):
    """What is a × b? Any number in the format earns a half, right or wrong; accuracy is counted as ever."""

    def grade(self, problem, response):
        grade = super().grade(problem, response)
        return grade._replace(reward=0.5 * grade.formatted)
