"""Rounding that is learned: up or down for each weight, so that a layer or a block answers as it did in float32.

learn           one block after the other: AdaRound, BRECQ with QDrop
layer_sums      one layer, from sums over what it reads: AdaRound without running it
soft_rounding   a weight between the two levels next to it, moved to one of them by gradients
samples         what a block reads and should answer, sample by sample
dropping        activations that are quantized at random only (QDrop)
grids           the scales that a scheme chose for each weight, and the levels that were learned for them
"""
