"""What an expert is, on disk and in memory, and pools of them."""

from phatgoose.experts.expert import Expert
from phatgoose.ops.update import Update

__all__ = ["Expert", "Update"]
