"""Intel's GPUs as devices: `ARRIERO_PLUGINS=device arriero pretrain R --device xpu`.

One line: the name that torch.accelerator gives to the kind, and torch.distributed's back end for it. Everything else is
reached through torch.accelerator; where another kind has a faster path of its own (common/device.py), a new one takes
the plain one. This example shows how a kind is added: it has not been tried on such a device.
"""

from arriero.common.device import DEVICES

DEVICES.register("xpu", "xccl")
