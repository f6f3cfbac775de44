"""A learning-rate schedule of one's own: `ARRIERO_PLUGINS=schedule arriero pretrain R --schedule.shape inverse-sqrt`.

The folder of this file must be on PYTHONPATH.
"""

from arriero.train.config import SCHEDULES, ScheduleConfig


def inverse_sqrt(config: ScheduleConfig, step: int, warmup: int, end: int) -> float:
    """The transformer's schedule (arXiv:1706.03762): after warm-up, `lr` times sqrt(warm-up / step)."""
    start = max(1, warmup)
    return max(config.min_lr, config.lr * (start / max(start, step + 1)) ** 0.5)


SCHEDULES.register("inverse-sqrt", inverse_sqrt)
