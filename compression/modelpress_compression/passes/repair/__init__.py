"""Repair: layers that read changed values, behind cuts or of factors, are fitted to the answers of the model before.

least_squares       the whole of it, level by level
layers              which layers can be fitted, and in which order
paired              both models side by side, sample by sample
fitter              one layer's rows, gathered and fitted
normal_equations    ridge regression from sums
correction          the penalty, chosen on samples that no fit saw
"""
