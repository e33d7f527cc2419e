"""A card in software: torch's device for others, renamed "npu", that computes on the CPU as a card would.

`install` makes it this process's accelerator, for good. See device.py for how it works.
"""
