"""Which channels, heads and hidden units of a graph can be cut together, and the cut itself.

find_groups(model)      dependency groups by index propagation; what cannot be traced is frozen, with the reason
cut(model, kept)        the model without the units that are not kept
"""

from modelpress_compression.channels.cut import cut
from modelpress_compression.channels.find import find_groups
from modelpress_compression.channels.groups import Analysis, Frozen, Group, Indices, Member

__all__ = ["Analysis", "Frozen", "Group", "Indices", "Member", "cut", "find_groups"]
