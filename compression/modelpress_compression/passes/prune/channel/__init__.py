"""Pruning of whole channels, attention heads and hidden units: the model gets smaller and faster on every runtime.

    prune       the pass, step by step
    criteria    how important each unit is: magnitude and random; activation and taylor read data
    limits      what the recipe permits
    costs       what a unit costs
    ranking     which units stay
    repair      the layers behind the cuts fitted to the uncut model's answers
    report      what layers cost before and after, and why others are whole

What must be cut together is found, and cut, by `modelpress_compression.channels`.
"""
